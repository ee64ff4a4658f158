"""What a model in training made of the same prompts at each milestone, and its loss on rows that it does not see: one
HTML file that fetches nothing.
"""

import os
from base64 import b64encode
from dataclasses import dataclass

from t2v import storage

AT_MOST = 24  # milestones
MAX_BYTES = 7_000_000  # of all clips in the page


@dataclass
class Clip:
    """One prompt's clip, as a data: URI."""

    prompt: str
    seed: int
    uri: str


@dataclass
class Milestone:
    """Samples seen, clips, and losses on held-out rows, if any are kept: by stream and first timestep, "" for all."""

    samples: int
    clips: list[Clip]
    losses: dict[str, dict[str, float]]


def milestones_page(run_dir: str) -> str:
    """The HTML of the milestones in `run_dir`/train/milestones (pipelines/preview.py), the newest first.

    Of very many it shows some, evenly. Prompts are escaped, because captions come from strangers.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    milestones = _milestones(storage.join(run_dir, "train", "milestones"))
    name = os.path.basename(run_dir.rstrip("/"))
    return environment.get_template("milestones.html.jinja").render(name=name, milestones=milestones)


def _milestones(folder: str) -> list[Milestone]:
    """Evenly thinned out, the newest always there, until the page is small enough."""
    names = [name for name in storage.folders(folder) if storage.exists(storage.join(folder, name, "prompts.json"))]
    names = names[:: -max(1, -(-len(names) // AT_MOST))]
    places = [storage.join(folder, name) for name in names]
    found = [Milestone(int(name), _clips(place), _losses(place)) for name, place in zip(names, places, strict=True)]
    while len(found) > 1 and sum(len(clip.uri) for milestone in found for clip in milestone.clips) > MAX_BYTES:
        found = found[::2]
    return found


def _clips(folder: str) -> list[Clip]:
    rows = storage.read_json(storage.join(folder, "prompts.json"))
    videos = storage.read_many([storage.join(folder, f"{index}.mp4") for index in range(len(rows))])
    return [
        Clip(row["prompt"], row["seed"], "data:video/mp4;base64," + b64encode(video).decode())
        for row, video in zip(rows, videos, strict=True)
    ]


def _losses(folder: str) -> dict[str, dict[str, float]]:
    path = storage.join(folder, "held_out.json")
    losses: dict[str, dict[str, float]] = {}
    for name, loss in sorted(storage.read_json(path).items() if storage.exists(path) else ()):
        stream, _, timestep = name.removeprefix("held_out_").partition("_t")
        losses.setdefault(stream, {})[timestep] = loss
    return losses
