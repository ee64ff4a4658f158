"""Pictures per CPU second from URL to a stored 256 x 256 square, beside img2dataset, and how good the squares are.

A corpus of JPEGs of about 640 x 480, some lying on their side by their EXIF orientation, made here from noise and
shapes with about the spectrum of photographs, is served on loopback by a process whose time is not counted. Both sides
store JPEGs of quality 95 in WebDataset tars with captions and json, retry, read EXIF, and heed X-Robots-Tag:
  this code     the stages of pipelines/ up to the frames (Fetcher, read_image), a JPEG of each frame by cv2, TarWriter
  img2dataset   the Downloader of one of its processes with its Resizer (center_crop, 256) and its writer, set up as its
                download() does; its start-up, its reader of lists and its logger are left out
Each side runs shard by shard in a process of its own, which tells the CPU time of all its threads after a first shard
that is not counted; this code in one that keeps freed memory as its decoder processes do (pipelines/decoding.py),
img2dataset as it comes and once so. PSNR is against a reference: the middle square of the upright full-resolution
picture, averaged in double precision over the area of each pixel. img2dataset does not turn pictures upright, so those
are told apart.

    python tests/benchmarks/images.py > tests/benchmarks/results/images.txt
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines.decoding import _ENVIRONMENT
from pipelines.web import serve
from tests.benchmarks.header import PYTHON, header

PICTURES, ROUNDS, SIZE, QUALITY, THREADS, SHARD = 1500, 3, 256, 95, 32, 500
ORIENTATION = 0x0112


def write_corpus(folder: Path) -> None:
    """Pictures 00000.jpg to 01499.jpg of 600-680 x 440-520, every tenth turned by its EXIF orientation."""
    numbers = np.random.default_rng(0)
    plane = landscape(numbers)
    for index in range(PICTURES):
        picture = photograph(numbers, plane)
        exif = Image.Exif()
        if index % 10 == 9:
            exif[ORIENTATION] = (6, 8, 3)[index // 10 % 3]
        picture.save(folder / f"{index:05d}.jpg", quality=int(numbers.integers(80, 96)), exif=exif)


def landscape(numbers: np.random.Generator, side: int = 2400) -> np.ndarray:
    """Brightness, and fainter colour, with spectra that fall as those of photographs do, about as 1/f, or steeper."""
    import cv2

    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1
    planes = []
    for slope, contrast in ((1.2, 45), (1.5, 15), (1.5, 15)):
        plane = np.fft.irfft2(np.fft.rfft2(numbers.normal(size=(side, side))) / frequency**slope, (side, side))
        planes.append(np.clip(128 + contrast * plane / plane.std(), 0, 255).astype(np.uint8))
    return cv2.cvtColor(np.stack(planes, axis=-1), cv2.COLOR_YCrCb2RGB)


def photograph(numbers: np.random.Generator, plane: np.ndarray) -> Image.Image:
    """A piece of the landscape with a few hard-edged discs and rings in it."""
    import cv2

    width, height = int(numbers.integers(600, 681)), int(numbers.integers(440, 521))
    top, left = (int(value) for value in numbers.integers(0, len(plane) - 700, 2))
    image = plane[top : top + height, left : left + width].copy()
    for _ in range(6):
        centre = (int(numbers.integers(width)), int(numbers.integers(height)))
        colour = tuple(int(value) for value in numbers.integers(0, 256, 3))
        cv2.circle(image, centre, int(numbers.integers(10, 70)), colour, int(numbers.choice([-1, 2])), cv2.LINE_AA)
    return Image.fromarray(image)


def this_code(shards: list[list[dict]], output: Path) -> Iterator[None]:
    """The stages of the pipeline: download, decode, store."""
    import cv2
    from webdataset.writer import TarWriter

    from pipelines.config import FetchConfig
    from pipelines.fetch import Fetcher
    from pipelines.pictures import read_image
    from t2v import storage

    cv2.setNumThreads(1)
    config = FetchConfig(allow_networks=["127.0.0.0/8"], concurrency=THREADS, per_host=THREADS, retries=2)
    download = Fetcher(config)
    for index, rows in enumerate(shards):
        fetched = download([row["url"] for row in rows])
        with storage.open_atomic(f"{output}/{index:05d}.tar") as file, TarWriter(file, mtime=0) as tar:
            for row, one in zip(rows, fetched, strict=True):
                (frame,) = read_image(one.body, SIZE).frames
                frame = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
                jpeg = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
                members = {"jpg": jpeg, "txt": row["caption"].encode(), "json": json.dumps(row).encode()}
                tar.write({"__key__": f"{row['number']:09d}", **members})
        yield
    download.close()


def img2dataset(shards: list[list[dict]], output: Path) -> Iterator[None]:
    """The package's worker as its download() sets it up, all else being its defaults."""
    import pyarrow as pa
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    work = Downloader(
        WebDatasetSampleWriter,
        Resizer(SIZE, "center_crop", False, encode_quality=QUALITY),
        thread_count=THREADS,
        save_caption=True,
        extract_exif=True,
        output_folder=str(output),
        column_list=["url", "caption", "number"],
        timeout=10,
        number_sample_per_shard=SHARD,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=2,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai"],
    )
    for index, rows in enumerate(shards):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(f"{output}/{index}.arrow", table.schema) as writer:
            writer.write_table(table)
        work.download_shard((index, f"{output}/{index}.arrow"))
        yield


SIDES = {"this code": this_code, "img2dataset": img2dataset}
RUNS = {  # the code and the environment of its process
    "this code": ("this code", _ENVIRONMENT),
    "img2dataset": ("img2dataset", {}),
    "keeping memory": ("img2dataset", _ENVIRONMENT),
}


def run(side: str, base_url: str, output: Path) -> None:
    """Prints the CPU seconds of all shards but the first, the first of which is fetched twice."""
    rows = [{"url": f"{base_url}/{n:05d}.jpg", "caption": f"picture {n}", "number": n} for n in range(PICTURES)]
    shards = [rows[start : start + SHARD] for start in range(0, PICTURES, SHARD)]
    done = SIDES[side]([shards[0], *shards], output)
    next(done)
    begun = time.process_time()
    for _ in done:
        pass
    print(time.process_time() - begun)


def cpu_seconds(name: str, base_url: str, output: Path) -> float:
    output.mkdir()
    side, environment = RUNS[name]
    told = subprocess.run(
        [PYTHON, str(Path(__file__).resolve()), side, base_url, str(output)],
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(told.stdout.split()[-1])


def stored(output: Path) -> dict[int, bytes]:
    """What a side stored, by the picture's number."""
    pictures: dict[int, bytes] = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".jpg"):
                pictures[int(json.loads(members[name[:-3] + "json"])["number"])] = content
    return pictures


def reference(path: Path) -> np.ndarray:
    """The middle square of the upright picture, each pixel the mean over its area, in double precision."""
    from PIL import ImageOps

    image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), np.float64)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    weights = area_weights(side)
    return np.einsum("iy,yxc,jx->ijc", weights, image[top : top + side, left : left + side], weights, optimize=True)


def area_weights(side: int) -> np.ndarray:
    """[SIZE, side]: how much of each of `side` pixels lies in each of SIZE equal parts; rows sum to 1."""
    edges = np.linspace(0, side, SIZE + 1)
    low = np.clip(np.arange(side)[None, :], edges[:-1, None], edges[1:, None])
    high = np.clip(np.arange(1, side + 1)[None, :], edges[:-1, None], edges[1:, None])
    return (high - low) * SIZE / side


def psnr(content: bytes, wanted: np.ndarray) -> float:
    found = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)
    return float(10 * np.log10(255**2 / np.mean((found - wanted) ** 2)))


def main() -> None:
    print(header())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus")
        spent: dict[str, list[float]] = {name: [] for name in RUNS}
        with serve(folder / "corpus") as base_url:
            for turn in range(ROUNDS):
                for side in RUNS:
                    spent[side].append(cpu_seconds(side, base_url, folder / f"{side}-{turn}") / PICTURES)
        report(folder, spent)


def report(folder: Path, spent: dict[str, list[float]]) -> None:
    kilobytes = mean(path.stat().st_size for path in (folder / "corpus").iterdir()) / 1e3
    print(f"\n{PICTURES} pictures of {kilobytes:.0f} kB; medians of {ROUNDS} alternating rounds of CPU time")
    ours = median(spent["this code"])
    wanted = {index: reference(folder / "corpus" / f"{index:05d}.jpg") for index in range(0, PICTURES, 3)}
    for side, seconds in spent.items():
        pictures = stored(folder / f"{side}-0")
        each = median(seconds)
        quality = {n: psnr(pictures[n], wanted[n]) for n in wanted}
        upright, turned = (
            mean(value for n, value in quality.items() if (n % 10 == 9) is lies) for lies in (False, True)
        )
        print(f"  {side:15s}{each * 1e3:6.2f} ms a picture ({min(seconds) * 1e3:.2f}-{max(seconds) * 1e3:.2f})", end="")
        print(f"{1 / each:6.0f} a second and core {each / ours:5.2f} x this code   {len(pictures)} stored   ", end="")
        print(f"PSNR upright {upright:.2f} dB, turned {turned:.2f} dB")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        begun = time.monotonic()
        main()
        print(f"\ntook {time.monotonic() - begun:.0f} s")
