"""One tree of dataclasses <- YAML preset <- dotted overrides, for every job.

python jobs/train.py --config jobs/configs/nano.yaml --train.samples 20000
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from pipelines.config import CorpusConfig, DataConfig, EvaluateConfig
from t2v import storage
from t2v.bounds import at_least
from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, TrainConfig
from t2v.digest import digest_of
from t2v.tracking import tracking_uri

_PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# How jsonargparse says that it does not know a key: on the command line, within a section, at the top of a file.
_UNKNOWN = (
    r"unrecognized arguments: --([\w.]+)",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
)


@dataclass
class Config:
    """The whole of a run; `run_dir` (a folder or an fsspec URL) holds all that it makes."""

    run_dir: str = "runs/default"
    seed: int = 0
    corpus: CorpusConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        at_least(0, self, "seed")


def parser(description: str) -> ArgumentParser:
    """A parser of every key of Config, to which a job adds its own arguments."""
    result = ArgumentParser(description=description, exit_on_error=False, print_config=None)
    result.add_argument("--config", action="config", help="a YAML preset, for example jobs/configs/nano.yaml")
    result.add_argument("--print_config", action="store_true", help="print the checked configuration and exit")
    result.add_class_arguments(Config)
    return result


def parse(jobs_parser: ArgumentParser, arguments: list[str] | None = None) -> tuple[Config, Namespace]:
    """The checked configuration and the job's own arguments; a bad one ends the process with one line and code 2.

    `--print_config` ends it as well, once the configuration is printed as a job would keep it.
    """
    try:
        found = jobs_parser.parse_args(arguments)
        config = _build(Config, found.as_dict())
    except (ArgumentError, ValueError, TypeError) as error:
        _refuse(" ".join(str(error).split()), jobs_parser)
    if found.print_config:
        print(_yaml(config), end="")
        raise SystemExit
    return config, found


@contextmanager
def job(name: str, config: Config) -> Iterator[None]:
    """Prints and keeps the resolved configuration; bad input ends the block with one line and exit code 2.

    The traceback behind that line is kept beside the configuration. A run folder that cannot be written, or that has no
    place for MLflow's runs, ends the process before the block begins.
    """
    folder = storage.join(config.run_dir, "config")
    try:
        tracking_uri(config.run_dir)
        _keep(storage.join(folder, f"{name}.yaml"), config)
    except (ValueError, OSError, ImportError) as error:  # fsspec's word for an object store whose package is missing
        print(f"error: run_dir {config.run_dir}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"[{name}] configuration {digest_of(dataclasses.asdict(config))}, kept in {folder}/{name}.yaml", flush=True)
    try:
        yield
    except (ValueError, ArithmeticError, FileNotFoundError, ImportError) as error:
        if type(error).__name__.startswith("RayTaskError"):
            raise
        with storage.open_atomic(storage.join(folder, f"{name}.traceback.txt")) as file:
            file.write(traceback.format_exc().encode())
        print(f"error: {error} (traceback in {folder}/{name}.traceback.txt)", file=sys.stderr)
        raise SystemExit(2) from None


def _keep(path: str, config: Config) -> None:
    with storage.open_atomic(path) as file:
        file.write(_yaml(config).encode())


def _yaml(config: Config) -> str:
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def _build(cls: type, values: dict[str, Any], path: str = "") -> Any:
    kwargs = {}
    for name, hint in get_type_hints(cls).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        nested = kinds and values[name] is not None
        kwargs[name] = _build(kinds[0], values[name], f"{path}{name}.") if nested else values[name]
    try:
        built = cls(**kwargs)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None
    return _settle(built) if cls is Config else built


def _settle(config: Config) -> Config:
    """Makes paths mean the same in every process of the run, and points a run with its own corpus at that."""
    if "://" not in config.run_dir:
        expanded = os.path.expanduser(config.run_dir)
        if not os.path.isabs(expanded) and "working_dir_files" in os.getcwd():
            raise ValueError(
                f"run_dir: {config.run_dir} is relative, but this job runs in Ray's copy of the working directory, "
                "which goes with the cluster: give an absolute path or a URL, for example --run_dir $PWD/runs/one"
            )
        config.run_dir = os.path.abspath(expanded)
    vae = config.model.vae
    if vae and "://" not in vae:  # what is not found from here may be one of the project's own
        config.model.vae = os.path.abspath(vae if os.path.exists(vae) else os.path.join(_PROJECT, vae))
    if config.corpus is not None:
        folder = f"{config.run_dir}/corpus"
        config.data.videos.manifest, config.data.videos.columns = f"{folder}/webvid.csv", "webvid"
        config.data.images.manifest, config.data.images.columns = f"{folder}/laion.parquet", "laion2b-en"
        config.evaluate.test, config.evaluate.columns = f"{folder}/test.csv", "msrvtt"
    return config


def _refuse(message: str, jobs_parser: ArgumentParser) -> NoReturn:
    for pattern in _UNKNOWN:
        if unknown := re.search(pattern, message):
            known = [action.dest for action in jobs_parser._actions]
            near = difflib.get_close_matches(".".join(unknown.groups()), known, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
