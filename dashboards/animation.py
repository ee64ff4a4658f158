"""A run's generated clips as one animated picture: `python -m dashboards.animation RUN_DIR OUT.gif [PROMPTS.txt]`."""

import sys
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.sampling import read_frames
from t2v import storage

COLUMNS = 4
SCALE = 2  # of a clip's pixels
MARGIN = 10
CAPTION = 42
FRAME_MS = 125  # 8 frames a second
PAPER, INK = (250, 249, 246), (60, 60, 64)


def animation(run_dir: str, prompts: list[str]) -> list[Image.Image]:
    """One picture a frame: the first sample of each prompt with its words below, `COLUMNS` in a row."""
    records = storage.read_lines(storage.join(run_dir, "samples", "manifest.jsonl"))
    keys = {record["prompt"]: record["key"] for record in reversed(records)}
    clips = [read_frames(run_dir, keys[prompt]) for prompt in prompts]
    return [_page([clip[index] for clip in clips], prompts) for index in range(len(clips[0]))]


def _page(frames: list[np.ndarray], prompts: list[str]) -> Image.Image:
    side = frames[0].shape[0] * SCALE
    cell = (side + MARGIN, side + MARGIN + CAPTION)
    rows = -(-len(frames) // COLUMNS)
    page = Image.new("RGB", (cell[0] * COLUMNS + MARGIN, cell[1] * rows + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for index, (frame, prompt) in enumerate(zip(frames, prompts, strict=True)):
        x, y = MARGIN + cell[0] * (index % COLUMNS), MARGIN + cell[1] * (index // COLUMNS)
        page.paste(Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + side + 3), "\n".join(wrap(prompt, 24)), INK, font, spacing=2)
    return page


def main() -> None:
    run_dir, out, *files = sys.argv[1:]
    source = files[0] if files else "jobs/configs/nano_prompts.txt"
    prompts = [line for line in storage.read_bytes(source).decode().splitlines() if line]
    first, *others = animation(run_dir, prompts)
    first.save(out, save_all=True, append_images=others, duration=FRAME_MS, loop=0, optimize=True)


if __name__ == "__main__":
    main()
