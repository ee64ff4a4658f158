"""Prompt files of every kind, and errors that name the file, the place and the remedy."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prompts import Prompt, read_prompts

WANTED = [Prompt("a red circle", 7), Prompt("a blue ring, far away", 3), Prompt("a red circle", 8)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_all_kinds_of_files_give_the_same_prompts(tmp_path: Path) -> None:
    rows = 'caption,seed\na red circle,\n"a blue ring, far away",3\na red circle,\n'
    lines = '{"prompt": "a red circle"}\n{"prompt": "a blue ring, far away", "seed": 3}\n\n{"prompt": "a red circle"}\n'
    table = pa.table({"text": [prompt.text for prompt in WANTED], "seed": pa.array([None, 3, None], pa.float64())})
    pq.write_table(table, tmp_path / "prompts.parquet")
    assert read_prompts(write(tmp_path / "prompts.csv", rows), seed=7) == WANTED
    assert read_prompts(write(tmp_path / "prompts.jsonl", lines), seed=7) == WANTED
    assert read_prompts(str(tmp_path / "prompts.parquet"), seed=7) == WANTED


def test_lines_of_text_and_repeated_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "\ufeffa red circle\r\n\n  naïve \u2028 art\na red circle")
    assert read_prompts(path, seed=7) == [("a red circle", 7), ("naïve \u2028 art", 7), ("a red circle", 8)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "no prompts in it"),
        ("p.txt", b"caf\xe9", "cannot be read .*utf-8"),
        ("p.docx", "x", "prompts come from .txt, .csv, .jsonl or .parquet"),
        ("p.csv", "title,seed\nx,1\n", "none of the columns prompt, caption, .* it has title, seed"),
        ("p.csv", 'prompt\nx\n""\n', "row 2: the prompt is empty"),
        ("p.csv", "prompt,seed\nx,-1\n", "row 1: seed '-1' is no whole number"),
        ("p.csv", "prompt,seed\nx,many\n", "seed 'many' is no whole number"),
        ("p.jsonl", '{"prompt": "x", "seed": 1.5}', "seed 1.5 is no whole number"),
        ("p.jsonl", '{"prompt": "x"}\nx\n', "line 2: not JSON"),
        ("p.jsonl", "[1]", "line 1: not a JSON object"),
        ("p.parquet", "PAR1", "cannot be read"),
    ],
)
def test_errors_say_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(path, seed=0)
    assert str(raised.value).startswith(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompts(str(tmp_path / "none.txt"), seed=0)
