"""Every command of the README is one that can be typed: its targets exist, its jobs take its options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()


def commands() -> list[str]:
    """The lines of its code blocks, joined where they go on, with $RUN put in."""
    lines = [line[4:] for line in README.splitlines() if line.startswith("    ")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    run = re.search(r'RUN="(.*?)"', text, re.DOTALL)
    assert run
    return [line.partition(" #")[0] for line in text.replace("$RUN", " ".join(run[1].split())).splitlines()]


JOBS = [command.partition(" -- ")[2] for command in commands() if command.startswith("ray job submit")]


@pytest.mark.parametrize("command", JOBS)
def test_a_job_takes_the_options_that_the_readme_gives_it(command: str) -> None:
    python, *arguments = shlex.split(command)
    assert python == "python"
    shown = subprocess.run(
        [sys.executable, *arguments, "--print_config"], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    assert "frames_per_slot" in shown.stdout


def test_the_readme_shows_all_four_jobs_and_no_target_that_make_lacks() -> None:
    assert {command.split()[1] for command in JOBS} == {
        f"jobs/{name}.py" for name in ("prepare_data", "train", "generate", "evaluate")
    }
    targets = set(re.findall(r"\bmake ([a-z]+)(?=[` ]|$)", README, re.MULTILINE))
    assert targets >= {"quickstart", "test", "bench", "mlflow"}
    known = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known
