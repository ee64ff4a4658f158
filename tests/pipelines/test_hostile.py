"""Input that means harm goes through the real pipeline; only loopback is ever reached."""

import asyncio
import io
import ipaddress
import json
import sys
import time
from collections import defaultdict

import aiohttp
import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp.abc import AbstractResolver

from pipelines.addresses import ForbiddenAddress, GuardedResolver, guarded_socket
from pipelines.config import DataConfig, DecodeConfig, EncodeConfig, FetchConfig, StreamConfig
from pipelines.download import open_engine
from pipelines.media import read_clip
from pipelines.prepare import prepare
from t2v import shards
from tests.pipelines import hostile_files, hostile_web
from tests.pipelines.test_pictures import saved

FETCH = FetchConfig(timeout_s=2, retries=0, max_bytes=3_000_000, max_pixels=4_000_000, allow_networks=["127.0.0.1/32"])
CAPTIONS = [
    "x" * 1_000_000,
    "nul \0 and \x1b[2J",
    "lone \ud800",
    "../../etc/passwd",
    "",
    "\u202etxt.exe",
    "'; DROP TABLE--",
]


@pytest.fixture(scope="module")
def web():
    """All files and answers on one port of 127.0.0.1; the same port of 127.0.0.2 is not to be reached."""
    files = {"videos": hostile_files.videos(), "images": hostile_files.pictures()}
    contents = {
        f"/{stream}/{name}": hostile_web.whole(body)
        for stream, cases in files.items()
        for name, (body, _) in cases.items()
    }
    for number in range(8):
        contents[f"/videos/good-{number}"] = hostile_web.whole(hostile_files.clip(6 + number / 4))
        picture = hostile_files.Image.linear_gradient("L").rotate(9 * number)
        contents[f"/images/good-{number}"] = hostile_web.whole(saved(picture, "JPEG"))
    contents |= {f"/answers/{name}": answer for name, (answer, _) in hostile_web.answers().items()}
    with hostile_web.serve(contents) as (port, _), hostile_web.serve({}, "127.0.0.2", port) as (_, canary):
        contents |= {f"/answers/{name}": answer for name, (answer, _) in hostile_web.redirects(port).items()}
        base = f"http://127.0.0.1:{port}"
        wanted = {
            stream: {f"{base}/{stream}/{name}": statuses for name, (_, statuses) in cases.items()}
            for stream, cases in files.items()
        }
        strange = {f"{base}/answers/{name}": statuses for name, (_, statuses) in hostile_web.answers().items()}
        strange |= {f"{base}/answers/{name}": statuses for name, (_, statuses) in hostile_web.redirects(port).items()}
        wanted["images"] |= strange | hostile_web.urls(port)
        yield base, wanted, canary
        assert not canary


def prepared(run_dir, vae, manifests):
    """Runs the pipeline over rows of each stream; the ledger by URL and the latents by row_id."""
    for stream, rows in manifests.items():
        lines = [json.dumps({"url": url, "caption": caption}) for url, caption in rows]
        (run_dir / f"{stream}.jsonl").write_text("\n".join(lines))
    streams = {
        stream: StreamConfig(str(run_dir / f"{stream}.jsonl"), "generic", shard_rows=100) for stream in manifests
    }
    encode = EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1, batch_frames=1)
    data = DataConfig(size=32, fetch=FETCH, decode=DecodeConfig(30, 1024), encode=encode, **streams)
    prepare(str(run_dir), data, vae, seed=0)
    ledger, latents = {}, {}
    for stream in manifests:
        ledger[stream] = pq.read_table(run_dir / "data/ledger" / stream).to_pylist()
        for shard in shards.list_shards(str(run_dir / "data/latents" / stream)):
            for group in range(len(shard.row_groups)):
                rows = shards.read_rows(shard.path, group)
                columns = (rows.caption, rows.mean, rows.logvar, rows.fps, rows.start_s)
                latents |= dict(zip(rows.row_id, zip(*columns, strict=True), strict=True))
    return ledger, latents


@pytest.fixture(scope="module")
def runs(ray_session, web, tiny_model, tmp_path_factory):
    """One run with a good row beside every other bad one, and one of the good rows alone."""
    base, wanted, _ = web
    manifests, good = defaultdict(list), {}
    for stream, cases in wanted.items():
        good[stream] = [
            (f"{base}/{stream}/good-{number % 8}?{number}", CAPTIONS[number % len(CAPTIONS)])
            for number in range(len(cases) // 4)
        ]
        for number, url in enumerate(cases):
            manifests[stream].append((url, CAPTIONS[1 + number % 6]))
            if number % 4 == 3:
                manifests[stream].append(good[stream][number // 4])
    vae = f"{tiny_model}/vae"
    with_bad = prepared(tmp_path_factory.mktemp("bad"), vae, manifests)
    alone = prepared(tmp_path_factory.mktemp("good"), vae, good)
    return manifests, with_bad, alone


def test_the_corpus_is_large(web):
    _, wanted, _ = web
    assert sum(map(len, wanted.values())) >= 300


@pytest.mark.parametrize("stream", ["videos", "images"])
def test_every_row_ends_with_a_right_reason(web, runs, stream):
    _, wanted, _ = web
    manifests, (ledger, _), _ = runs
    assert [row["url"] for row in ledger[stream]] == [url.strip() for url, _ in manifests[stream]]
    expected = {url.strip(): statuses for url, statuses in wanted[stream].items()}
    wrong = [row for row in ledger[stream] if row["status"] not in expected.get(row["url"], "ok").split()]
    assert not wrong
    assert all(row["seconds"] < FETCH.timeout_s + 1 for row in ledger[stream])
    assert "secret" not in "".join(row["message"] for row in ledger[stream])


def test_good_rows_are_as_they_are_without_bad_ones(runs):
    _, (_, latents), (ledger, alone) = runs
    assert len(alone) == sum(map(len, ledger.values())) > 80
    for row_id, columns in alone.items():
        for here, there in zip(columns, latents[row_id], strict=True):
            np.testing.assert_array_equal(here, there)


def test_a_cover_is_not_taken_for_the_video():
    with av.open(io.BytesIO(hostile_files.covered())) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    frames = read_clip(hostile_files.covered(), 16, 3.0, 32, key="a").frames
    np.testing.assert_array_equal(frames, read_clip(hostile_files.clip(), 16, 3.0, 32, key="a").frames)


def test_captions_are_kept_as_far_as_they_can_be_stored(runs):
    _, _, (_, alone) = runs
    captions = {caption for caption, *_ in alone.values()}
    assert captions == {caption.replace("\ud800", "?").strip() for caption in CAPTIONS}


def test_no_address_but_the_allowed_one_is_ever_tried(web):
    base, wanted, canary = web
    tried = set()
    watching = True

    def watch(event, arguments):
        if watching and event == "socket.connect" and isinstance(arguments[1], tuple):
            tried.add(arguments[1][0])

    sys.addaudithook(watch)
    urls = [url for url in wanted["images"] if "/images/" not in url]
    begun = time.monotonic()
    fetched = open_engine(FETCH)(urls)
    watching = False
    assert len(fetched) == len(urls) > 100
    assert time.monotonic() - begun < 20
    assert tried == {"127.0.0.1"}
    assert not canary


class Names(AbstractResolver):
    """A name server of the test's own: the first answer, then the next at each further question."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def resolve(self, host, port=0, family=0):
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        family = {address: 10 if ":" in address else 2 for address in addresses}
        return [
            {"hostname": host, "host": address, "port": port, "family": family[address], "proto": 6, "flags": 4}
            for address in addresses
        ]

    async def close(self):
        pass


INNER = "127.0.0.1 127.0.0.2 ::1 ::ffff:127.0.0.1 169.254.169.254 10.1.2.3 fd00:ec2::254 64:ff9b::a9fe:a9fe 0.0.0.0"


@pytest.mark.parametrize("address", INNER.split())
def test_names_that_resolve_to_inner_addresses_are_refused(address):
    with pytest.raises(ForbiddenAddress, match="which is not public"):
        asyncio.run(GuardedResolver([], Names([address])).resolve("innocent.example"))


def test_of_several_addresses_only_the_public_ones_are_kept():
    found = asyncio.run(GuardedResolver([], Names([*INNER.split(), "8.8.8.8"])).resolve("innocent.example"))
    assert [result["host"] for result in found] == ["8.8.8.8"]


def test_a_name_that_passes_once_and_then_leads_inside_gets_no_socket():
    """Past the first rule, as by a name server that changes its answer: the second, at the socket, holds alone."""

    async def get():
        connector = aiohttp.TCPConnector(resolver=Names(["127.0.0.2"]), socket_factory=guarded_socket(allowed))
        async with aiohttp.ClientSession(connector=connector) as session:
            await session.get("http://innocent.example:9/")

    allowed = [ipaddress.ip_network("127.0.0.1/32")]
    with pytest.raises(aiohttp.ClientConnectorError) as refused:
        asyncio.run(get())
    assert isinstance(refused.value.os_error, ForbiddenAddress)


def test_a_short_fuzz_finds_nothing(tmp_path):
    pytest.importorskip("hypothesis")
    from tests.benchmarks.fuzz_decoders import Fuzzer

    fuzzer = Fuzzer(tmp_path)
    fuzzer.run(20, first_seed=1)
    assert fuzzer.ended.total() > 50
    assert {"clip: ok", "picture: ok"} <= fuzzer.ended.keys()
    assert not fuzzer.findings
