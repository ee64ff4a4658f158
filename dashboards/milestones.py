"""What a model in training made of the same prompts at each milestone: one HTML file that fetches nothing."""

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


def _milestones(folder: str) -> list[tuple[int, list[Clip]]]:
    """Samples seen and clips; evenly thinned out, the newest always there, until the page is small enough."""
    names = [name for name in storage.folders(folder) if storage.exists(storage.join(folder, name, "prompts.json"))]
    names = names[:: -max(1, -(-len(names) // AT_MOST))]
    found = [(int(name), _clips(storage.join(folder, name))) for name in names]
    while len(found) > 1 and sum(len(clip.uri) for _, clips in found for clip in clips) > MAX_BYTES:
        found = found[::2]
    return found


def _clips(folder: str) -> list[Clip]:
    rows = storage.read_json(storage.join(folder, "prompts.json"))
    videos = storage.read_many([storage.join(folder, f"{index}.mp4") for index in range(len(rows))])
    return [
        Clip(row["prompt"], row["seed"], "data:video/mp4;base64," + b64encode(video).decode())
        for row, video in zip(rows, videos, strict=True)
    ]
