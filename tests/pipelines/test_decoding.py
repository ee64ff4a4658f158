import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.config import DecodeConfig
from pipelines.decoding import Decoders
from pipelines.media import MediaError, read_clip
from pipelines.pictures import read_image
from tests.pipelines import misbehaving
from tests.pipelines.misbehaving import counts
from tests.pipelines.test_media import encode, evenly, x264
from tests.pipelines.test_pictures import saved


@pytest.fixture(scope="module")
def decoders():
    made = Decoders(DecodeConfig(timeout_s=1, max_memory_mb=1024))
    yield made
    made.close()


def process_of(decoders):
    return int(decoders.call(counts, b"").view("<u4")[0])


def test_a_clip_and_a_picture_are_what_they_are_without_a_process(decoders):
    video, picture = encode(evenly(25, 7), options=x264(50)), saved(Image.linear_gradient("L"), "PNG")
    clip, here = (
        call(video, 16, 3.0, 32, "random", "key") for call in (lambda *a: decoders.call(read_clip, *a), read_clip)
    )
    np.testing.assert_array_equal(clip.frames, here.frames)
    assert (clip.source_fps, clip.start_s) == (here.source_fps, here.start_s)
    made = decoders.call(read_image, picture, 64, 9_000_000, [32, 8])
    for frames, expected in zip((made.frames, *made.also), (64, 32, 8), strict=True):
        np.testing.assert_array_equal(frames, read_image(picture, expected).frames)


def test_what_is_wrong_with_a_file_does_not_cost_the_process(decoders):
    before = process_of(decoders)
    for body, status in (
        (b"<!doctype html>", "not_media"),
        (saved(Image.new("L", (99, 99)), "PNG"), "too_many_pixels"),
    ):
        with pytest.raises(MediaError) as refused:
            decoders.call(read_image, body, 64, 9000)
        assert refused.value.status == status
    with pytest.raises(MediaError, match="out of memory"):
        decoders.call(misbehaving.fills_memory, b"")
    assert process_of(decoders) == before


@pytest.mark.parametrize(
    ("misbehaviour", "status", "message"),
    [
        ("crashes", "decoder_crashed", "SIGSEGV"),
        ("leaves", "decoder_crashed", "exit code 3"),
        ("raises", "decoder_crashed", "exit code 1"),
        ("answers_floats", "decoder_crashed", "exit code 0"),
        ("hangs", "decode_timeout", "1 s"),
        ("hangs_in_c", "decode_timeout", "1 s"),
    ],
)
def test_a_process_that_misbehaves_is_replaced(decoders, misbehaviour, status, message):
    before = process_of(decoders)
    with pytest.raises(MediaError, match=message) as lost:
        decoders.call(getattr(misbehaving, misbehaviour), b"body")
    assert lost.value.status == status
    assert not psutil.pid_exists(before)
    assert process_of(decoders) != before


def test_rows_beside_a_crash_are_untouched():
    numbers = range(40)
    decoders = Decoders(DecodeConfig(timeout_s=30))

    def row(number):
        try:
            return int(decoders.call(misbehaving.crashes if number % 7 == 3 else counts, bytes(number)).view("<u4")[1])
        except MediaError as lost:
            return lost.status

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(row, numbers))
    decoders.close()
    assert ended == ["decoder_crashed" if number % 7 == 3 else number for number in numbers]


def test_large_bodies_and_frames_pass_whole(decoders):
    body = np.random.default_rng(0).bytes(100_000_000)
    assert decoders.call(counts, body).view("<u4")[1] == len(body)


def test_closing_ends_the_processes():
    decoders = Decoders(DecodeConfig())
    process = psutil.Process(process_of(decoders))
    decoders.close()
    assert not process.is_running()


def test_a_process_ends_with_its_parent_even_while_it_is_busy():
    script = """if True:
        import os, threading, time
        from pipelines.config import DecodeConfig
        from pipelines.decoding import Decoders
        from tests.pipelines.misbehaving import counts, hangs
        decoders = Decoders(DecodeConfig())
        print(decoders.call(counts, b"").view("<u4")[0], flush=True)
        decoders.call(hangs, b"")
    """
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as parent:
        decoder = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        assert decoder.is_running()
        parent.kill()
    assert not psutil.wait_procs([decoder], timeout=5)[1]


def test_a_decoder_process_is_light(decoders):
    loaded = Path(f"/proc/{process_of(decoders)}/maps").read_text()
    assert not any(f"/{library}/" in loaded for library in ("torch", "pyarrow", "ray"))
    assert "/av/" in loaded


def test_an_installation_that_starts_no_process_is_no_files_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no decoder process starts"):
        Decoders(DecodeConfig()).call(counts, b"")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"timeout_s": 0}, "timeout_s: 0 is below"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"max_memory_mb": 64}, "max_memory_mb: 64 is below"),
    ],
)
def test_bounds_within_which_nothing_can_be_decoded_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**bounds)
