"""What users type: presets, overrides, and one clear line for what cannot be."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from jobs.config import job, parse, parser
from t2v.digest import digest_of
from t2v.mix import plan_step

PROJECT = Path(__file__).parents[2]
PRESETS = sorted((PROJECT / "jobs/configs").glob("*.yaml"))
JOBS = ("prepare_data", "train", "generate", "evaluate", "quickstart")


@pytest.mark.parametrize("name", JOBS)
def test_help_needs_neither_torch_nor_ray(name: str) -> None:
    show = (
        f"import runpy, sys; sys.argv = ['{name}.py', '--help']; runpy.run_path('jobs/{name}.py', run_name='__main__')"
    )
    program = f"import atexit, json, sys; atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); {show}"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    usage, modules = done.stdout.rstrip().rsplit("\n", 1)
    assert "--train.mix.frames_per_slot" in usage and "--config" in usage
    assert not {"torch", "ray", "numpy", "mlflow"} & set(json.loads(modules))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_complete_and_their_steps_possible(preset: Path) -> None:
    config, _ = parse(parser(""), ["--config", str(preset)])
    step = plan_step(config.train.mix, config.data.frames)
    slots = [step.of_rank(rank, config.train.workers) for rank in range(config.train.workers)]
    assert sum(slot.count for rank in slots for slot in rank) == step.total
    assert len({len(rank) for rank in slots}) == 1


def test_the_papers_two_readings_of_the_batch_sizes() -> None:
    totals = {}
    for name in ("modelscope", "modelscope_as_printed"):
        config, _ = parse(parser(""), ["--config", f"{PROJECT}/jobs/configs/{name}.yaml"])
        step = plan_step(config.train.mix, config.data.frames)
        totals[name] = (step.samples["images"], step.samples["videos"])
        assert round(config.train.samples / step.total) == 267_000
    assert totals == {"modelscope": (3200, 1400), "modelscope_as_printed": (1400, 3200)}


def test_overrides_come_last_and_the_digest_follows_the_values() -> None:
    nano = ["--config", f"{PROJECT}/jobs/configs/nano.yaml"]
    plain, _ = parse(parser(""), nano)
    changed, _ = parse(parser(""), [*nano, "--train.learning_rate", "0.5", "--run_dir", "/tmp/elsewhere"])
    assert plain.train.learning_rate != changed.train.learning_rate == 0.5
    assert changed.data.videos.manifest == "/tmp/elsewhere/corpus/webvid.csv"
    again, _ = parse(parser(""), nano)
    assert digest_of(asdict(plain)) == digest_of(asdict(again)) != digest_of(asdict(changed))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--train.sampels", "3"], "--train.sampels 3; did you mean train.samples?"),
        (["--train.samples", "many"], """"train.samples": Expected a <class 'int'>. Got value: many"""),
        (["--train.samples", "-1"], "train.samples: -1 is below 1"),
        (["--sample.sampler", "euler"], "'ddim', 'dpm++', 'unipc'"),
        (["--model.unet.block_out_channels", "[100]"], "model.unet.block_out_channels: 100 is no multiple of"),
        (["--data.size", "60"], "data.size: 60 is no multiple of 8"),
        (["--data.also_sizes", "[64, 60]"], "data.also_sizes: 60 is no multiple of 8"),
        (["--data.also_sizes", "[64, 64]"], "data.also_sizes: [64, 64] names a size twice"),
        (["--train.mix.slots", "9"], "train.mix.slots: 9 is no multiple of image_every (8)"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--data.fetch.allow_networks", "[home]"], "data.fetch.allow_networks: 'home' does not appear to be"),
        (["--data.fetch.retries", "-1"], "data.fetch.retries: -1 is below 0"),
        (["--data.fps", "0"], "data.fps: 0.0 is not above 0"),
        (["--corpus.width", "191"], "corpus.width: 191 is odd"),
        (["--evaluate.clips", "0"], "evaluate.clips: 0 is below 1"),
        (["--seed", "-4"], "seed: -4 is below 0"),
        (["--train.mix.images_per_step", "0"], "train.mix.images_per_step: 0 is below 1"),
        (["--train.betas", "[0.9, 1.5]"], "train.betas: (0.9, 1.5) is not in [0, 1)"),
        (["--model.text.layers", "-3"], "model.text.layers: -3 is below 1"),
        (["--sample.guidance", ".nan"], "sample.guidance: nan is not a number"),
        (["--data.fps", ".inf"], "data.fps: inf is not a finite number"),
        (["--data.videos.columns", "webvit"], "data.videos.columns: 'webvit' is neither one of webvid, laion2b-en"),
        (["--data.images.columns", "url=link"], "data.images.columns: 'url=link' is neither one of"),
        (["--evaluate.columns", ""], "evaluate.columns: '' is neither one of"),
        (["--train.samples", "-1", "--print_config"], "train.samples: -1 is below 1"),
    ],
)
def test_bad_values_are_one_line_that_names_the_key(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(parser(""), given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  sampels: 3\n", "'sampels'; did you mean train.samples?"),
        ("trian:\n  samples: 3\n", "'trian.samples' is not accepted; did you mean train.samples?"),
        ("train: [\n", "error: "),
    ],
)
def test_bad_files_are_one_line_too(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse(parser(""), ["--config", str(tmp_path / "bad.yaml")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_what_print_config_shows_is_a_preset_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", f"{PROJECT}/jobs/configs/nano.yaml", "--train.samples", "92"]
    with pytest.raises(SystemExit) as stopped:
        parse(parser(""), [*given, "--print_config"])
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert not stopped.value.code
    assert parse(parser(""), ["--config", str(tmp_path / "shown.yaml")])[0] == parse(parser(""), given)[0]


def test_a_relative_run_dir_within_rays_copy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "working_dir_files").mkdir()
    monkeypatch.chdir(tmp_path / "working_dir_files")
    with pytest.raises(SystemExit):
        parse(parser(""), ["--run_dir", "runs/one"])
    assert "run_dir: runs/one is relative" in capsys.readouterr().err
    assert parse(parser(""), ["--run_dir", "s3://bucket/run"])[0].run_dir == "s3://bucket/run"


@pytest.mark.parametrize(
    ("run_dir", "said"),
    [
        ("s3://bucket/run", "set MLFLOW_TRACKING_URI to a server"),
        ("/dev/null/run", "Not a directory"),
        ("nowhere://run", "nowhere"),
    ],
)
def test_a_run_folder_that_cannot_work_is_told_before_anything_is_done(
    run_dir: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if run_dir.startswith("nowhere"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    config, _ = parse(parser(""), ["--run_dir", run_dir])
    begun = False
    with pytest.raises(SystemExit) as stopped, job("train", config):
        begun = True
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and not begun
    assert error.startswith(f"error: run_dir {run_dir}: ") and error.count("\n") == 1 and said in error


def test_a_job_keeps_its_configuration_and_says_bad_input_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = parse(parser(""), ["--run_dir", str(tmp_path), "--seed", "7"])
    with pytest.raises(SystemExit) as stopped, job("train", config):
        raise ValueError("there is nothing")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is nothing (traceback in ")
    assert "ValueError: there is nothing" in (tmp_path / "config/train.traceback.txt").read_text()
    again, _ = parse(parser(""), ["--config", str(tmp_path / "config/train.yaml")])
    assert again == config
