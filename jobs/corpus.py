"""The corpus of its own that a run may have (`corpus` in the configuration), for jobs that read from it."""

from collections.abc import Iterator
from contextlib import contextmanager

from jobs.config import Config


@contextmanager
def own_corpus(config: Config) -> Iterator[None]:
    """Makes the corpus, if the run has one and it is not there yet, and serves it on loopback meanwhile."""
    if config.corpus is None:
        yield
        return
    from pipelines.corpus import corpus_port, write_corpus
    from pipelines.web import serve

    folder = f"{config.run_dir}/corpus"
    with serve(folder, corpus_port(folder)) as base_url:
        print(f"[corpus] {folder}, served on {base_url}", flush=True)
        write_corpus(folder, config.corpus, base_url)
        yield
