"""Generation end to end with a tiny random model: gaps, batches, the manifest, and videos that can be watched."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.prompts import Prompt
from pipelines.sampling import (
    SampleWriter,
    generate,
    model_id,
    read_frames,
    sample_key,
    sampler_settings,
)
from t2v.config import SampleConfig

CONFIG = SampleConfig(steps=2, guidance=2.0, frames=3, batch=2, workers=1, gpus_per_worker=0)
PROMPTS = [Prompt("a red circle", 1), Prompt("../../../etc/passwd\0", 2), Prompt("a red circle", 3)]
SIZE = 32


def fill(run_dir: Path, model: str, prompts: list[Prompt]) -> list[str]:
    """Samples in this process, all in one batch."""
    settings = sampler_settings(CONFIG, SIZE)
    keys = [sample_key(model_id(model), prompt, settings) for prompt in prompts]
    writer = SampleWriter(str(run_dir / "samples"), model, model_id(model), CONFIG, SIZE)
    texts, seeds = zip(*prompts, strict=True)
    writer({"key": np.array(keys), "text": np.array(texts, object), "seed": np.array(seeds)})
    return keys


def test_a_rerun_fills_the_gap_alone_and_batches_change_nothing(
    tiny_model: str, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path / "whole", tiny_model, PROMPTS)
    fill(tmp_path / "run", tiny_model, PROMPTS[:2])
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "samples").iterdir()}

    samples = generate(str(tmp_path / "run"), PROMPTS, tiny_model, CONFIG, SIZE)

    assert [sample.key for sample in samples] == keys
    assert capsys.readouterr().out.splitlines() == ["[generate] 2/3 videos", "[generate] 3/3 videos"]
    names = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "samples").iterdir()}
    assert {name: names[name] for name in before} == before
    assert set(names) == {f"{key}.{kind}" for key in keys for kind in ("mp4", "npz", "json")} | {"manifest.jsonl"}
    for key in keys:
        frames, alone = (read_frames(str(tmp_path / run), key).astype(int) for run in ("whole", "run"))
        assert frames.shape == (3, SIZE, SIZE, 3)
        assert frames.std() > 5
        assert abs(frames - alone).max() <= 1  # the sums of another batch size may round otherwise
    assert abs(read_frames(str(tmp_path / "run"), keys[0]).astype(int) - frames).mean() > 5  # another seed


def test_nothing_missing_needs_neither_torch_nor_ray(tiny_model: str, tmp_path: Path) -> None:
    fill(tmp_path, tiny_model, PROMPTS)
    code = f"""if True:
        import sys
        from pipelines.prompts import Prompt
        from pipelines.sampling import generate
        from t2v.config import SampleConfig
        config = SampleConfig(steps=2, guidance=2.0, frames=3, batch=5, workers=3)
        prompts = [Prompt(*row) for row in {list(map(tuple, PROMPTS))!r}]
        generate({str(tmp_path)!r}, prompts, {tiny_model!r}, config, {SIZE})
        assert not {{"torch", "ray"}} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[generate] 3/3 videos\n"
    rows = [json.loads(line) for line in (tmp_path / "samples" / "manifest.jsonl").read_text().splitlines()]
    assert {(row["prompt"], row["seed"]) for row in rows} == set(PROMPTS)
    assert all(row["file"] == f"{row['key']}.mp4" and row["steps"] == 2 and row["seconds"] > 0 for row in rows)


def test_keys_depend_on_what_videos_depend_on() -> None:
    settings = sampler_settings(CONFIG, SIZE)
    key = sample_key("model", PROMPTS[0], settings)
    others = [
        sample_key("another", PROMPTS[0], settings),
        sample_key("model", PROMPTS[2], settings),
        sample_key("model", PROMPTS[0], settings | {"steps": 3}),
        sample_key("model", PROMPTS[0], sampler_settings(CONFIG, 64)),
    ]
    assert len({key, *others}) == 5
    spread = SampleConfig(**vars(CONFIG) | {"batch": 7, "workers": 5, "cpus_per_worker": 2})
    assert sample_key("model", PROMPTS[0], sampler_settings(spread, SIZE)) == key


def test_a_folder_without_a_model_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no exported model"):
        generate(str(tmp_path), PROMPTS, str(tmp_path / "model"), CONFIG, SIZE)
