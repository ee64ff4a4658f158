"""URL lists -> latent shards, a ledger of every row, and the funnel.

    ray job submit --working-dir . -- python jobs/prepare_data.py --config jobs/configs/nano.yaml

A run with a corpus of its own (`corpus` in the configuration) makes it first and serves it on loopback meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from jobs.config import Config, job, parse, parser


def main() -> None:
    config, _ = parse(parser(__doc__))
    with job("prepare_data", config):
        from pipelines.prepare import prepare
        from t2v import storage

        note = storage.join(config.run_dir, "data", "funnel.json")
        before = storage.read_json(note) if storage.exists(note) else None
        with _corpus(config):
            prepare(config.run_dir, config.data, config.model.vae, config.seed)
        if (funnel := storage.read_json(note)) != before:
            _record(config, funnel)


@contextmanager
def _corpus(config: Config) -> Iterator[None]:
    if config.corpus is None:
        yield
        return
    from pipelines.corpus import corpus_port, write_corpus
    from pipelines.web import serve

    folder = f"{config.run_dir}/corpus"
    with serve(folder, corpus_port(folder)) as base_url:
        print(f"[prepare_data] corpus in {folder}, served on {base_url}", flush=True)
        write_corpus(folder, config.corpus, base_url)
        yield


def _record(config: Config, funnel: dict) -> None:
    from t2v.record import Record

    record = Record(config.run_dir, "prepare_data", asdict(config.data))
    record.table(
        [
            {"stream": stream, "status": status, "rows": count}
            for stream, counts in funnel.items()
            for status, count in counts["status"].items()
        ],
        "funnel.json",
    )
    record.metrics({f"yield_percent_{stream}": counts["yield_percent"] for stream, counts in funnel.items()}, step=0)
    record.close()


if __name__ == "__main__":
    main()
