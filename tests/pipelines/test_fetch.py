import asyncio
import ipaddress
import socket
import time

import psutil
import pytest

from pipelines.addresses import ForbiddenAddress, GuardedResolver, guarded_socket, is_allowed
from pipelines.config import FetchConfig
from pipelines.fetch import Fetcher, _Room, extension
from pipelines.web import serve
from tests.pipelines.fetch_server import JPEG, LARGE, OTHER, fetch

LOOPBACK = ["127.0.0.0/8"]

# Loopback, private, link-local and its metadata services, shared, multicast, reserved, documentation; the same
# inside IPv6; and what is no address in its canonical spelling.
NOT_PUBLIC = """
    127.0.0.1 127.9.9.9 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8 192.0.2.1
    198.18.0.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 2001::1 100::1 3fff::1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1::1 2002:a00:1::1
    2130706433 127.1 0x7f.1 017700000001 localhost
"""
PUBLIC = "8.8.8.8 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("pipelines.fetch._BACKOFF_S", 0.05)


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public_are_refused(address):
    assert not is_allowed(address, [])


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses_are_allowed(address):
    assert is_allowed(address, [])


def test_a_network_can_be_allowed():
    allowed = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    assert is_allowed("127.0.0.1", allowed)
    assert is_allowed("::ffff:127.0.0.1", allowed)
    assert is_allowed("fd00::1", allowed)
    assert not is_allowed("10.0.0.1", allowed)


def test_names_and_sockets_are_held_to_the_rule():
    with pytest.raises(ForbiddenAddress, match=r"localhost is 127\.0\.0\.1"):
        asyncio.run(_resolve("localhost", []))
    assert asyncio.run(_resolve("localhost", [ipaddress.ip_network("127.0.0.0/8")]))[0]["host"] == "127.0.0.1"
    with pytest.raises(ForbiddenAddress):
        guarded_socket([])((2, 1, 6, "", ("127.0.0.1", 80)))


async def _resolve(name, allowed):
    return await GuardedResolver(allowed).resolve(name)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/good.jpg",
        "http://localhost:{port}/good.jpg",
        "http://[::ffff:127.0.0.1]:{port}/good.jpg",
        "http://2130706433:{port}/good.jpg",
        "http://0x7f.1:{port}/good.jpg",
        "http://127.1:{port}/good.jpg",
        "http://0:{port}/good.jpg",
    ],
)
def test_loopback_is_not_reached_unless_allowed(url):
    (fetched,), asked = fetch([url], FetchConfig())
    assert (fetched.status, fetched.body, sum(asked.values())) == ("forbidden_address", b"", 0)


def test_redirects_are_held_to_the_same_rules():
    config = FetchConfig(allow_networks=["127.0.0.1/32"])
    urls = ["/to?http://127.0.0.2/", "/to?file:///etc/passwd", "/to?http://me:secret@127.0.0.1/", "/to?/good.jpg"]
    fetched, _ = fetch(urls, config)
    assert [one.status for one in fetched] == ["forbidden_address"] * 3 + ["ok"]
    assert "secret" not in fetched[2].message


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("", "no_url", "no URL"),
        ("videos/1.mp4", "no_url", "is no URL"),
        ("ftp://127.0.0.1/1.mp4", "forbidden_address", "no http or https"),
        ("http://me:secret@127.0.0.1/1.mp4", "forbidden_address", "credentials"),
        (f"http://{'a' * 64}.invalid/1.mp4", "dns", ""),
        ("http://[1/1.mp4", "dns", ""),
        ("/status/404", "http_404", "404"),
        ("/status/403", "http_error", "403"),
        ("/status/204", "empty", "zero bytes"),
        ("/page", "not_media", "text/html"),
        ("/announced", "too_large", "20,000 bytes announced"),
        ("/chunked", "too_large", "more than 10,000"),
        ("/loop", "too_many_redirects", "more than 5"),
        ("/noai", "opt_out", "noai"),
        ("http://127.0.0.1:9/closed.jpg", "connection", ""),
    ],
)
def test_final_failures_have_their_reason_and_are_not_retried(url, status, message):
    (fetched,), asked = fetch([url], FetchConfig(allow_networks=LOOPBACK, max_bytes=10_000, retries=1))
    assert (fetched.status, fetched.body) == (status, b"")
    assert message in fetched.message
    assert max(asked.values(), default=0) <= (6 if status == "too_many_redirects" else 1)


@pytest.mark.parametrize(
    ("url", "status", "attempts"),
    [
        ("/flaky", "ok", 2),
        ("/status/503", "http_error", 2),
        ("/status/429", "http_error", 2),
        ("/status/404", "http_404", 1),
        ("/cut", "connection", 2),
        ("/stalled", "timeout", 2),
    ],
)
def test_what_may_pass_is_tried_again(url, status, attempts):
    (fetched,), asked = fetch([url], FetchConfig(allow_networks=LOOPBACK, retries=1, timeout_s=0.4))
    assert (fetched.status, asked[url]) == (status, attempts)


@pytest.mark.parametrize(("after", "least_s"), [("1", 1.0), ("60", 1.5), ("Fri, 01 Jan 2100 00:00:00 GMT", 0.0)])
def test_a_busy_server_is_given_the_time_it_asks_for_up_to_that_of_an_attempt(after, least_s):
    (fetched,), asked = fetch([f"/busy?{after}"], FetchConfig(allow_networks=LOOPBACK, retries=1, timeout_s=1.5))
    assert (fetched.status, asked["/busy"]) == ("ok", 2)
    assert least_s <= fetched.seconds < 30


def test_names_that_nobody_answers_for_leave_the_others_their_time(monkeypatch):
    """System calls for names alone are stood in for: on loopback none is slow."""
    ask = socket.getaddrinfo

    def answer(host, *rest, **more):
        if host.endswith(".silent"):
            time.sleep(1.0)
            raise socket.gaierror(socket.EAI_AGAIN, "nobody answers")
        return ask("127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with serve(".") as base_url:
        port = base_url.rsplit(":")[-1]
        urls = [f"http://{n}.silent:{port}/" for n in range(30)] + [
            f"http://{n}.there:{port}/README.md" for n in range(5)
        ]
        fetcher = Fetcher(FetchConfig(allow_networks=LOOPBACK, retries=0, timeout_s=3))
        fetched = fetcher(urls)
        fetcher.close()
    assert [one.status for one in fetched] == ["dns"] * 30 + ["not_media"] * 5


def test_opting_out_can_be_overruled():
    (fetched,), _ = fetch(["/noai"], FetchConfig(allow_networks=LOOPBACK, honour_opt_out=False))
    assert (fetched.status, fetched.body) == ("ok", JPEG)


def test_many_at_once_in_order_and_within_the_bounds():
    urls = [f"/slow?{number}" for number in range(40)]
    begun = time.monotonic()
    fetched, asked = fetch(urls, FetchConfig(allow_networks=LOOPBACK, per_host=10))
    assert [one.body for one in fetched] == [JPEG + str(number).encode() for number in range(40)]
    assert asked["at once"] == 10
    assert time.monotonic() - begun < 40 * 0.05 / 2  # far from one after another


def test_waiting_for_a_turn_is_not_timed():
    fetched, _ = fetch(
        [f"/slow?{n}" for n in range(12)], FetchConfig(allow_networks=LOOPBACK, per_host=1, timeout_s=0.4)
    )
    assert {one.status for one in fetched} == {"ok"}


@pytest.mark.parametrize("kind", ["drip", "drip/unannounced"])
@pytest.mark.parametrize(("most", "at_once"), [(1 << 30, 8), (900_000, 4), (1, 1)])
def test_bodies_under_way_are_bounded_together_and_all_of_them_come(monkeypatch, kind, most, at_once):
    """Each is of 256 kB in pieces of 32 kB; waiting for room is not on a body's clock."""
    held, peak = {}, [0]
    hold, leave = _Room.reserve, _Room.leave

    async def reserve(self, part, size):
        await hold(self, part, size)
        held[id(part)] = part.reserved
        peak[0] = max(peak[0], sum(held.values()))

    async def freed(self, part):
        held.pop(id(part), None)
        await leave(self, part)

    monkeypatch.setattr(_Room, "reserve", reserve)
    monkeypatch.setattr(_Room, "leave", freed)
    config = FetchConfig(allow_networks=LOOPBACK, max_bytes_under_way=most, timeout_s=1.5, retries=0)
    fetched, _ = fetch([f"/{kind}?{number}" for number in range(8)], config)
    assert [one.body for one in fetched] == [LARGE + str(number).encode() for number in range(8)]
    assert peak[0] <= min(most + len(LARGE) + 1, 8 * (len(LARGE) + 1))
    assert peak[0] >= (at_once - 1) * len(LARGE) // 2


def test_bodies_that_a_shard_keeps_are_bounded_and_those_that_find_no_room_say_why():
    config = FetchConfig(allow_networks=LOOPBACK, max_shard_bytes=2 * len(LARGE) + 2, concurrency=1)
    fetched, _ = fetch([*(f"/drip?{number}" for number in range(4)), "/status/404"], config)
    assert [one.status for one in fetched] == ["ok", "ok", "too_large", "too_large", "http_404"]
    assert "lower shard_rows" in fetched[2].message and not fetched[2].body


def test_a_body_that_breaks_off_leaves_its_room():
    config = FetchConfig(allow_networks=LOOPBACK, max_bytes_under_way=1, timeout_s=2, retries=0)
    fetched, _ = fetch(["/cut", "/status/404", "/cut", "/good.jpg"], config)
    assert [one.status for one in fetched] == ["connection", "http_404", "connection", "ok"]


@pytest.mark.parametrize("how", ["etag", "modified"])
def test_a_body_that_breaks_off_is_continued_where_it_broke(how):
    (fetched,), asked = fetch([f"/range/{how}"], FetchConfig(allow_networks=LOOPBACK, retries=2))
    assert (fetched.status, fetched.body) == ("ok", LARGE)
    assert [wanted["Range"] for wanted in asked["wanted"]] == [None, "bytes=100000-", "bytes=200000-"]
    assert all(wanted["If-Range"] for wanted in asked["wanted"][1:])


@pytest.mark.parametrize("how", ["weak", "young", "silent"])
def test_without_a_strong_validator_or_ranges_a_body_is_fetched_from_its_start(how):
    (fetched,), asked = fetch([f"/range/{how}"], FetchConfig(allow_networks=LOOPBACK, retries=2))
    assert fetched.status == "connection"
    assert [wanted["Range"] for wanted in asked["wanted"]] == [None, None, None]


@pytest.mark.parametrize("how", ["changed", "other-start", "other-length", "other-tag", "short", "416"])
def test_an_answer_that_is_not_the_rest_is_never_joined_to_the_beginning(how):
    (fetched,), asked = fetch([f"/range/{how}"], FetchConfig(allow_networks=LOOPBACK, retries=2))
    assert (fetched.status, fetched.body) == ("ok", LARGE if how != "changed" else OTHER)
    assert [wanted["Range"] for wanted in asked["wanted"]][:2] == [None, "bytes=100000-"]


def test_a_body_in_parts_is_held_to_the_same_bound_and_a_part_that_was_not_asked_for_is_refused():
    config = FetchConfig(allow_networks=LOOPBACK, retries=2, max_bytes=len(LARGE) - 1)
    fetched, _ = fetch(["/range/unannounced", "/range/unasked"], config)
    assert [(one.status, one.body) for one in fetched] == [("too_large", b""), ("http_error", b"")]


def test_one_fetcher_keeps_its_connections_from_shard_to_shard(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with serve(tmp_path) as base_url:
        fetcher = Fetcher(FetchConfig(allow_networks=LOOPBACK, per_host=4))
        server = psutil.Process().children()[-1]
        ports = set()
        for _ in range(5):
            assert {one.status for one in fetcher([f"{base_url}/a.jpg"] * 20)} == {"ok"}
            ports |= {peer.raddr.port for peer in server.net_connections("tcp") if peer.status == "ESTABLISHED"}
        fetcher.close()
    assert 1 <= len(ports) <= 4


def test_what_files_begin_with_tells_what_they_are():
    assert extension(b"\0\0\0\x18ftypmp42") == "mp4"
    assert extension(b"\0\0\0\x18ftypavif") == "avif"
    assert extension(b"RIFF\0\0\0\0WEBPVP8 ") == "webp"
    assert extension(b"\x89PNG\r\n\x1a\n") == "png"
    assert extension(b"<!doctype html>") is None
    assert extension(b"") is None
