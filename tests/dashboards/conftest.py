"""A finished run in small, as the jobs leave it: frames really drawn, clips really encoded."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from jobs.config import Config
from pipelines.config import CorpusConfig
from pipelines.corpus import write_corpus
from pipelines.evidence import shapes
from pipelines.shapes import Scene, caption, draw_scene, render

FUNNEL = {
    "videos": {
        "rows": 204,
        "status": {
            "ok": 194,
            "corrupt": 3,
            "forbidden_address": 2,
            "http_404": 2,
            "opt_out": 1,
            "timeout": 1,
            "too_short": 1,
        },
        "yield_percent": 95.1,
    },
    "images": {
        "rows": 394,
        "status": {"ok": 388, "http_404": 2, "not_media": 1, "too_many_pixels": 1, "some_new_reason": 2},
        "yield_percent": 98.5,
    },
}
HOSTILE = '<script>alert("caption")</script> & <img src=x onerror=alert(1)>'


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything: corpus, funnel, training log, samples, scores."""
    folder = tmp_path_factory.mktemp("runs") / "tiny & true"
    fill(folder, samples=3)
    return folder


def fill(folder: Path, samples: int) -> None:
    """Write a whole run with `samples` generated clips; the last prompt is a stranger's."""
    config = CorpusConfig(clips=1, pictures=1, test_clips=samples, faults=False)
    write_corpus(folder / "corpus", config, "http://127.0.0.1:1")
    scenes = [draw_scene(config, "test", index) for index in range(samples)]
    write_samples(folder / "samples", [*map(caption, scenes[:-1]), HOSTILE], scenes)
    write_config(folder / "config" / "train.yaml")
    write_log(folder / "train" / "log.jsonl", intervals=60)
    write_json(folder / "data" / "funnel.json", FUNNEL)
    write_scores(folder / "scores", scenes)


def write_samples(folder: Path, prompts: list[str], scenes: list[Scene]) -> None:
    """Clips that look generated: the scene that the prompt asks for under noise; every fourth runs backwards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    settings = {"sampler": "ddim", "steps": 50, "guidance": 9.0, "frames": 16, "fps": 8, "size": 64, "model": "0" * 16}
    rows = []
    for seed, (prompt, scene) in enumerate(zip(prompts, scenes, strict=True)):
        clean = np.stack([render(scene, k / 3, 64, 64) for k in range(16)])[:: -1 if seed % 4 == 1 else 1]
        frames = (clean + rng.normal(0, 6, clean.shape)).clip(0, 255).astype(np.uint8)
        np.savez_compressed(folder / f"{seed:016x}.npz", frames=frames)
        rows.append({"key": f"{seed:016x}", "prompt": prompt, "seed": seed, "file": f"{seed:016x}.mp4", **settings})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_scores(folder: Path, scenes: list[Scene]) -> None:
    """Scores in the evaluation's own form: of the shapes by the real judge, of the networks made up."""
    said = [scene.fields for scene in scenes]
    seen = [fields._replace(colour="red") if place % 3 else fields for place, fields in enumerate(said)]
    judged = shapes(said, seen, said, new_colours=["orange"], seed=0)
    about = {"network": "EfficientNet-Lite0", "network_id": "57934424", "clips": len(scenes)}
    names = ("Frechet distance of frames", "Frechet distance of clips", "text alignment")
    rows = [
        about | {"score": name, "of": of, "against": against, "value": value}
        for name in names
        for of, against, value in (("generated", "real", 143.2), ("real", "real, other half", 0.211))
    ]
    inputs = {"model": "0" * 16, "test": "corpus/test.csv", "columns": "msrvtt", "real_fps": 3.0, "seed": 0}
    left_out = [{"path": "test/video9.mp4", "reason": f"corrupt: {HOSTILE}"}]
    scores = {"inputs": inputs, "notes": ["A frozen clip repeats its first frame."], "scores": rows}
    write_json(folder / "scores.json", scores | {"shapes": judged.rows, "left_out": left_out})
    write_json(folder / "confusion.json", judged.confusion)


def write_config(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(Config()))), sort_keys=False))


def write_log(path: Path, intervals: int) -> None:
    """A log whose losses fall, with an interval that held no images and a last line cut short by a kill."""
    path.parent.mkdir(parents=True)
    rng = random.Random(0)
    lines = []
    for index in range(1, intervals + 1):
        samples = index * 320
        loss = 0.09 + 0.9 * math.exp(-samples / 2500)
        lines.append(
            {
                "samples": samples,
                "step": index * 10,
                "loss_images": None if index == 7 else loss * rng.uniform(0.7, 1.15),
                "loss_videos": loss * rng.uniform(0.85, 1.3),
                "samples_per_s": rng.uniform(90, 115),
                "data_wait_share": rng.uniform(0.005, 0.03),
                "memory_gib": min(1.9, 1.2 + index / 20),
                "seconds": 2.7,
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"samples": 99')


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
