"""Generation end to end with a tiny random model: gaps, batches, the manifest, and videos that can be watched."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.prompts import Prompt
from pipelines.sampling import (
    Sampler,
    SampleWriter,
    check_steps,
    even_batches,
    generate,
    model_id,
    read_frames,
    sample_key,
    sampler_settings,
)
from t2v.config import DiffusionConfig, SampleConfig, TextConfig

CONFIG = SampleConfig(steps=2, guidance=2.0, frames=3, batch=2, workers=1, gpus_per_worker=0)
PROMPTS = [Prompt("a red circle", 1), Prompt("../../../etc/passwd\0", 2), Prompt("a red circle", 3)]
SIZE = 32


def fill(run_dir: Path, model: str, prompts: list[Prompt]) -> list[str]:
    """Samples in this process."""
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


def test_a_batch_is_filled_up_and_a_video_is_the_same_in_any(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2v import sampler

    texts, plain = [], sampler.sample

    def counted(unet: Any, text: Any, *rest: Any) -> Any:
        texts.append(len(text))
        return plain(unet, text, *rest)

    monkeypatch.setattr(sampler, "sample", counted)
    together = Sampler(tiny_model, replace(CONFIG, batch=2), SIZE).sample(PROMPTS)
    assert texts == [2, 2] and together.shape == (3, 3, SIZE, SIZE, 3)
    again = Sampler(tiny_model, replace(CONFIG, batch=2), SIZE).sample(PROMPTS[2:])
    assert (again[0] == together[2]).all()  # to the last bit: it was in a batch of two each time
    larger = Sampler(tiny_model, replace(CONFIG, batch=4), SIZE).sample(PROMPTS)
    assert texts == [2, 2, 2, 4]
    assert abs(larger.astype(int) - together.astype(int)).max() <= 1


@pytest.mark.parametrize(("videos", "batch"), [(1, 1), (8, 8), (9, 5), (20, 7), (2048, 8)])
def test_batches_are_even(videos: int, batch: int) -> None:
    config = even_batches(SampleConfig(batch=8), videos)
    assert config == SampleConfig(batch=batch)
    assert -(-videos // config.batch) == -(-videos // 8)


@pytest.mark.parametrize("where", ["{}", "file://{}"])
def test_an_exported_model_can_be_moved_anywhere(tiny_model: str, tmp_path: Path, where: str) -> None:
    expected = Sampler(tiny_model, CONFIG, SIZE).sample(PROMPTS[:1])
    shutil.copytree(tiny_model, tmp_path / "elsewhere")
    moved = where.format(tmp_path / "elsewhere")
    described = json.loads((tmp_path / "elsewhere" / "t2v.json").read_text())
    described["text"]["weights"] = "/where/the/tower/was/when/training.bin"
    (tmp_path / "elsewhere" / "t2v.json").write_text(json.dumps(described))
    assert (Sampler(moved, CONFIG, SIZE).sample(PROMPTS[:1]) == expected).all()
    assert model_id(moved) == model_id(tiny_model)


def test_the_exported_text_tower_is_the_one_trained_with(tiny_model: str) -> None:
    from t2v.frozen import load_text

    trained = TextConfig(**json.loads(Path(tiny_model, "t2v.json").read_text())["text"])
    prompts = [prompt.text for prompt in PROMPTS] + [""]
    states = Sampler(tiny_model, CONFIG, SIZE)._text.encode(prompts)
    assert states.equal(load_text(trained).encode(prompts))


def test_a_model_is_known_by_all_its_parts(tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    ids = {model_id(tiny_model)}
    for part in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / "model" / part).iterdir():
            file.write_bytes(file.read_bytes() + b" ")
            ids.add(model_id(str(tmp_path / "model")))
    assert len(ids) == 7
    described = json.loads((tmp_path / "model" / "t2v.json").read_text())
    described["diffusion"]["prediction"] = "v"
    (tmp_path / "model" / "t2v.json").write_text(json.dumps(described))
    assert model_id(str(tmp_path / "model")) not in ids


def test_steps_that_the_sampler_cannot_take_fail_before_anything_starts(tiny_model: str, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from pipelines.prompts import Prompt
        from pipelines.sampling import generate
        from t2v.config import SampleConfig
        try:
            generate({str(tmp_path)!r}, [Prompt("a", 1)], {tiny_model!r}, SampleConfig(steps=1000), {SIZE})
        except ValueError as error:
            print(error)
        assert "ray" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "sample.steps: 1000 are too many for ddim over 1000 timesteps"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_steps_that_are_not_tried_can_be_taken(sampler: Any) -> None:
    from t2v.frozen import make_scheduler

    for steps in (*range(1, 500, 9), 500):
        make_scheduler(DiffusionConfig(), sampler, steps)
    check_steps(SampleConfig(sampler=sampler), DiffusionConfig())
    with pytest.raises(ValueError, match=r"^sample\.steps: 61 cannot be spaced over 1000 timesteps"):
        check_steps(SampleConfig(sampler=sampler, steps=61), DiffusionConfig(prediction="v", zero_terminal_snr=True))


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
