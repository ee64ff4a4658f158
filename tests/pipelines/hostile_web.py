"""Answers and URLs that mean harm or are merely odd, each with the statuses in which its row may end.

`answers()` is what a server sends instead of a file, `redirects()` where it sends the client, `urls()` what a manifest
says. `serve` sends them on loopback.
"""

import asyncio
import contextlib
import itertools
import threading
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]  # writes for as long as it likes

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"
JPEG_HEAD = b"\xff\xd8\xff\xe0"


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(_OK + b"\r\n" + JPEG_HEAD)
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def slow(writer: asyncio.StreamWriter) -> None:
    writer.write(_OK + b"Content-Length: 100000\r\n\r\n" + JPEG_HEAD)
    while True:
        writer.write(b"\0")
        await writer.drain()
        await asyncio.sleep(0.1)


async def slow_head(writer: asyncio.StreamWriter) -> None:
    for number in itertools.count():
        writer.write(b"HTTP/1.1 200 OK\r\n" if number == 0 else b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.1)


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(600)


async def continuing(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


def answers() -> dict[str, tuple[bytes | Answer, str]]:
    packed = zlib.compress(JPEG_HEAD + bytes(10**7), 9)
    return {
        "endless": (endless, "too_large"),
        "slow": (slow, "timeout"),
        "slow-head": (slow_head, "timeout"),
        "endless-head": (endless_head, "http_error connection"),
        "silent": (silent, "timeout"),
        "continuing": (continuing, "timeout connection http_error"),
        "announces-an-exabyte": (_OK + b"Content-Length: 1152921504606846976\r\n\r\n" + JPEG_HEAD, "too_large"),
        "announces-more": (_OK + b"Content-Length: 5000\r\n\r\n" + JPEG_HEAD, "connection"),
        "announces-less-than-none": (_OK + b"Content-Length: -5\r\n\r\n" + JPEG_HEAD, "http_error"),
        "announces-twice": (_OK + b"Content-Length: 4\r\nContent-Length: 9\r\n\r\n" + JPEG_HEAD, "http_error"),
        "no-chunks": (_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "http_error connection"),
        "huge-chunk": (
            _OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + JPEG_HEAD,
            "http_error connection",
        ),
        "packed": (
            _OK + b"Content-Encoding: deflate\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed,
            "not_media",
        ),
        "no-http": (b"SSH-2.0-OpenSSH_9.9\r\n", "http_error connection"),
        "nothing": (b"", "connection"),
        "empty": (_OK + b"Content-Length: 0\r\n\r\n", "empty"),
        "status-999": (b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n", "http_error"),
        "header-with-nul": (b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n" + JPEG_HEAD, "http_error connection"),
        "moved-nowhere": (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "http_error"),
        "noai": (_OK + b"X-Robots-Tag: NoAI\r\n\r\n" + JPEG_HEAD, "opt_out"),
        "reason-no-utf8": (b"HTTP/1.1 404 Nicht gef\xfcnden\r\nContent-Length: 0\r\n\r\n", "http_404"),
        "reason-latin": (b"HTTP/1.1 400 caf\xe9\r\nContent-Length: 0\r\n\r\n", "http_error"),
        "noai-no-utf8": (_OK + b"X-Robots-Tag: noai, \xff\r\n\r\n" + JPEG_HEAD, "opt_out"),
        "type-no-utf8": (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/\xff\r\nContent-Length: 4\r\n\r\npage",
            "not_media",
        ),
    }


def inner_addresses(port: int) -> list[str]:
    """Ways to write addresses that are not public; none is 127.0.0.1 itself, which the tests allow."""
    hosts = """127.0.0.2 2130706434 0x7f000002 0177.0.0.2 127.2 0x7f.2 0 0.0.0.0 [::1] [::] [::ffff:127.0.0.2]
        [::ffff:7f00:2] [0:0:0:0:0:ffff:127.0.0.2] [64:ff9b::7f00:2] [2002:7f00:2::] [fe80::1] [fd00:ec2::254]
        169.254.169.254 2852039166 0xa9fea9fe 0251.0376.0251.0376 [::ffff:169.254.169.254] 10.0.0.1 192.168.0.1
        172.16.0.1 100.64.0.1 100.100.100.200 192.0.0.192 198.18.0.1 224.0.0.1 255.255.255.255 240.0.0.1"""
    return [f"http://{host}:{port}/canary" for host in hosts.split()]


def other_schemes() -> list[str]:
    return [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://127.0.0.1/clip.mp4",
        "gopher://127.0.0.1:11211/_stats",
        "data:image/png;base64,iVBORw0KGgo=",
        "javascript:alert(1)",
        "dict://127.0.0.1:6379/info",
        "s3://bucket/clip.mp4",
        "concat:/etc/passwd|/etc/hosts",
    ]


def urls(port: int) -> dict[str, str]:
    """URLs of a manifest and the statuses in which their rows may end."""
    refused = inner_addresses(port) + other_schemes()
    refused += [f"http://me:secret@127.0.0.1:{port}/ok.jpg", f"http://secret@127.0.0.1:{port}/ok.jpg"]
    none = ["../../etc/passwd", "/etc/passwd", "C:\\clip.mp4", "clip.mp4", "~/.ssh/id_rsa", "//127.0.0.1/clip.mp4"]
    odd = ["http://", "http:///clip.mp4", "http://[::1", "http://a b/c", "http://%00/", "http://127.0.0.1:99999/"]
    odd += [
        "http://127.0.0.1:-1/",
        "http://\x00/",
        f"http://{'a' * 300}/",
        f"http://{'a.' * 200}invalid/",
        "http://.../",
    ]
    odd += ["http://[]@", "http://[::1]x@/", "http://][@"]
    odd += ["http://xn--a/", "http://\u2488.invalid/", "http://exa\nmple.invalid/"]
    return (
        dict.fromkeys(refused, "forbidden_address")
        | dict.fromkeys(none, "no_url forbidden_address")
        | dict.fromkeys(odd, "no_url dns forbidden_address connection")
        | {"": "no_url", f"http://127.0.0.1:{port}/{'x' * 100_000}": "http_error http_404 connection"}
    )


def redirects(port: int) -> dict[str, tuple[bytes, str]]:
    """Answers that send the client to where it must not go."""
    places = inner_addresses(port) + other_schemes() + [f"http://me:secret@127.0.0.1:{port}/ok.jpg", "//127.0.0.2/"]
    cases = {f"to-{number}": (place, "forbidden_address") for number, place in enumerate(places)}
    cases |= {
        "to-itself": ("/answers/to-itself", "too_many_redirects"),
        "to-garbage": ("http://[::1", "dns forbidden_address"),
    }
    head = "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {}\r\n\r\n"
    return {name: (head.format(place).encode(), status) for name, (place, status) in cases.items()}


@contextmanager
def serve(contents: dict[str, bytes | Answer], host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[int, Counter]]:
    """Send `contents`, whole answers by path, from a thread; yields the port and a count of what was asked for."""
    asked: Counter[str] = Counter()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, EOFError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            asked[path] += 1
            what = contents.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            if callable(what):
                await what(writer)
            else:
                writer.write(what)
                await writer.drain()
        writer.close()

    async def run(started: Callable[[int, asyncio.Event], None]) -> None:
        stop = asyncio.Event()
        server = await asyncio.start_server(answer, host, port)
        started(server.sockets[0].getsockname()[1], stop)
        await stop.wait()
        server.close()

    begun: list[tuple[int, asyncio.Event, asyncio.AbstractEventLoop]] = []
    ready = threading.Event()

    def started(bound: int, stop: asyncio.Event) -> None:
        begun.append((bound, stop, asyncio.get_running_loop()))
        ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(run(started)), daemon=True)
    thread.start()
    assert ready.wait(10), f"no server on {host}:{port}"
    bound, stop, loop = begun[0]
    try:
        yield bound, asked
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def whole(body: bytes) -> bytes:
    """A file as a server's whole answer."""
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
