"""Fuzzes the decoder entry: read_clip and read_image on files that hypothesis changes, in decoder processes.

A case is a good or odd file of tests/pipelines/hostile_files.py with up to four edits (bits, numbers as headers hold
them, bytes cut, doubled, moved in from another file). Hypothesis steers towards slow ones. A finding is a process that
dies or overruns, or an answer of the wrong shape; running out of the process's memory is counted but is no finding,
for that is what the bound is for. Findings are written to a folder; the exit status tells whether there were any.

    python tests/benchmarks/fuzz_decoders.py 600 > tests/benchmarks/results/fuzz_decoders.txt
"""

import argparse
import hashlib
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines.config import DecodeConfig
from pipelines.decoding import Decoders
from pipelines.media import MediaError, read_clip
from pipelines.pictures import read_image
from tests.benchmarks.header import header
from tests.pipelines import hostile_files

SIZE, FRAMES, MAX_PIXELS, TIMEOUT_S, MAX_MEMORY_MB = 32, 16, 4_000_000, 10.0, 1024
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
Edit = tuple[str, float, int]  # what, at which part of the file, how much or which

edits = st.lists(
    st.tuples(
        st.sampled_from(["bit", "big", "little", "cut", "double", "end", "graft"]),
        st.floats(0, 1, exclude_max=True) | st.floats(0, 0.03),  # headers matter more than what follows
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[Edit], other: bytes) -> bytes:
    """`data` after the changes; none of them grows it beyond twice the size."""
    for what, part, amount in changes:
        at, some = int(part * len(data)), amount % 257
        number = NUMBERS[amount % len(NUMBERS)]
        match what:
            case "bit" if data:
                data = hostile_files.patched(data, at, bytes([data[at] ^ 1 << amount % 8]))
            case "big" | "little":
                data = hostile_files.patched(data, at, struct.pack(">I" if what == "big" else "<I", number))
            case "cut":
                data = data[:at] + data[at + some :]
            case "double":
                data = data[: at + some] + data[at:]
            case "end":
                data = data[:at]
            case "graft":
                start = int(part * len(other))
                data = hostile_files.patched(data, at, other[start : start + some])
    return data


class Fuzzer:
    """Counts how cases ended and keeps the findings."""

    def __init__(self, folder: Path) -> None:
        self.decoders = Decoders(DecodeConfig(TIMEOUT_S, MAX_MEMORY_MB))
        self.folder, self.ended, self.slowest_s, self.findings = folder, Counter[str](), 0.0, list[str]()
        self.bases = {
            kind: [body for body, statuses in made().values() if statuses == "ok"]
            for kind, made in (("clip", hostile_files.videos), ("picture", hostile_files.pictures))
        }

    def decode(self, kind: str, body: bytes) -> str:
        """One case; how it ended."""
        try:
            if kind == "clip":
                frames = self.decoders.call(read_clip, body, FRAMES, 3.0, SIZE, "random", "key", MAX_PIXELS).frames
            else:
                frames = self.decoders.call(read_image, body, SIZE, MAX_PIXELS).frames
        except MediaError as error:
            return "out of memory" if error.message == "out of memory" else error.status
        return "ok" if frames.shape == (FRAMES if kind == "clip" else 1, SIZE, SIZE, 3) else "wrong shape"

    def case(self, kind: str, base: int, changes: list[Edit], other: int) -> None:
        bases = self.bases[kind]
        body = edited(bases[base % len(bases)], changes, bases[other % len(bases)])
        begun = time.monotonic()
        ended = self.decode(kind, body)
        seconds = time.monotonic() - begun
        target(seconds, label=kind)
        self.ended[f"{kind}: {ended}"] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if ended in ("decoder_crashed", "decode_timeout", "wrong shape"):
            name = f"{kind}-{ended}-{hashlib.blake2b(body, digest_size=6).hexdigest()}"
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(body)
            self.findings.append(name)

    def run(self, seconds: float, first_seed: int) -> None:
        """Rounds of 500 examples, each from its own seed, until the time is over."""
        until = time.monotonic() + seconds
        number = first_seed
        while time.monotonic() < until:
            quick = settings(
                max_examples=500, database=None, deadline=None, phases=[Phase.generate, Phase.target],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip

            @seed(number)
            @quick
            @given(st.sampled_from(["clip", "picture"]), st.integers(0, 999), edits, st.integers(0, 999))
            def one_round(kind: str, base: int, changes: list[Edit], other: int) -> None:
                if time.monotonic() < until:
                    self.case(kind, base, changes, other)

            one_round()
            number += 1
        self.decoders.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    fuzzer = Fuzzer(options.findings)
    fuzzer.run(options.seconds, options.seed)
    print(header())
    print(f"{options.seconds:g} s from seed {options.seed}: {fuzzer.ended.total():,} cases of", end=" ")
    print(f"{sum(map(len, fuzzer.bases.values()))} files, at most {TIMEOUT_S:g} s and {MAX_MEMORY_MB:,} MiB each")
    for ended, count in sorted(fuzzer.ended.items()):
        print(f"  {ended:28s}{count:8,}")
    print(f"slowest {fuzzer.slowest_s:.2f} s; this process holds {psutil.Process().memory_info().rss / 1e6:.0f} MB")
    print(f"findings: {len(fuzzer.findings)}", *fuzzer.findings, sep="\n  ")
    return bool(fuzzer.findings)


if __name__ == "__main__":
    sys.exit(main())
