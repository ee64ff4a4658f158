"""Downloads from strangers: many at a time, each bounded in bytes, time and redirects."""

import asyncio
import ipaddress
import re
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from yarl import URL

from pipelines.addresses import ForbiddenAddress, GuardedResolver, guarded_socket
from pipelines.config import FetchConfig
from pipelines.ledger import Status

_BACKOFF_S = 0.5
_REDIRECTS = (301, 302, 303, 307, 308)
_OPT_OUT = {"noai", "noimageai"}

# (offset, bytes) by which files of pictures and videos begin; nothing else goes on to a decoder.
_MAGIC = (
    (0, b"\xff\xd8\xff"),  # JPEG
    (0, b"\x89PNG"),
    (0, b"GIF8"),
    (0, b"BM"),
    (0, b"II*\0"),  # TIFF, either byte order
    (0, b"MM\0*"),
    (0, b"RIFF"),  # WebP, AVI
    (4, b"ftyp"),  # MP4, MOV, AVIF
    (4, b"moov"),
    (4, b"mdat"),
    (4, b"wide"),
    (4, b"free"),
    (4, b"skip"),
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (0, b"\0\0\x01\xba"),  # MPEG program stream
    (0, b"\0\0\x01\xb3"),  # MPEG video
    (0, b"\x47\x40"),  # MPEG transport stream
    (0, b"OggS"),
    (0, b"FLV"),
    (0, b"\x30\x26\xb2\x75"),  # ASF
)


@dataclass(frozen=True)
class Fetched:
    """How one download ended; `body` is empty unless status is ok, `seconds` includes the retries."""

    body: bytes
    status: Status
    message: str
    seconds: float


class FetchError(Exception):
    """A download that failed; `again` tells whether another attempt may help."""

    def __init__(self, status: Status, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.again = status, message, again


async def fetch_all(urls: Sequence[str], config: FetchConfig) -> list[Fetched]:
    """Download all of `urls`, in the order given, through one pool of connections; never raises for a URL."""
    per_host: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(config.per_host))
    slots = asyncio.Semaphore(config.concurrency)

    async with _session(config) as session:

        async def in_turn(url: str) -> Fetched:
            async with per_host[_host(url)], slots:
                return await _fetch(session, url, config)

        return await asyncio.gather(*(in_turn(url) for url in urls))


def is_media(head: bytes | bytearray) -> bool:
    """Whether a file that begins with `head` may be a picture or a video."""
    return any(head.startswith(magic, offset) for offset, magic in _MAGIC)


def _session(config: FetchConfig) -> aiohttp.ClientSession:
    allowed = [ipaddress.ip_network(network) for network in config.allow_networks]
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, ttl_dns_cache=300, resolver=GuardedResolver(allowed), socket_factory=guarded_socket(allowed)
        ),
        headers={"User-Agent": "modelscope-t2v/0.1", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # the attempt as a whole is timed
        auto_decompress=False,  # or a small body could unfold into a large one
    )


async def _fetch(session: aiohttp.ClientSession, url: str, config: FetchConfig) -> Fetched:
    begun = time.monotonic()
    for attempt in range(config.retries + 1):
        try:
            async with asyncio.timeout(config.timeout_s):
                body = await _download(session, url, config)
            return Fetched(body, "ok", "", time.monotonic() - begun)
        except (FetchError, aiohttp.ClientError, OSError, ValueError) as error:
            failure = _classed(error, config)
        if not failure.again:
            break
        if attempt < config.retries:
            await asyncio.sleep(_BACKOFF_S * 2**attempt)
    return Fetched(b"", failure.status, failure.message, time.monotonic() - begun)


async def _download(session: aiohttp.ClientSession, url: str, config: FetchConfig) -> bytes:
    """One attempt, redirects followed by hand so that each hop is held to the same rules."""
    if not url:
        raise FetchError("no_url", "the manifest has no URL in this row")
    here = _checked(URL(url))
    for _ in range(config.max_redirects + 1):
        async with session.get(here, allow_redirects=False) as response:
            if config.honour_opt_out and _opts_out(response):
                raise FetchError("opt_out", f"X-Robots-Tag: {response.headers['X-Robots-Tag']}")
            if response.status in _REDIRECTS and "Location" in response.headers:
                here = _checked(here.join(URL(response.headers["Location"])))
                continue
            _check_status(response)
            return await _read(response, config)
    raise FetchError("too_many_redirects", f"more than {config.max_redirects}, the last to {here}")


def _checked(url: URL) -> URL:
    if not url.scheme:
        raise FetchError("no_url", f"{url} is no URL")
    if url.scheme not in ("http", "https") or not url.host:
        raise FetchError("forbidden_address", f"{url} is no http or https URL")
    if url.user or url.password:
        raise FetchError("forbidden_address", f"the URL for {url.host} carries credentials")
    return url


def _opts_out(response: aiohttp.ClientResponse) -> bool:
    tags = ",".join(response.headers.getall("X-Robots-Tag", [])).lower()
    return not _OPT_OUT.isdisjoint(re.split(r"[\s,;:]+", tags))


def _check_status(response: aiohttp.ClientResponse) -> None:
    message = f"HTTP {response.status} {response.reason}"
    if response.status == 404:
        raise FetchError("http_404", message)
    if not 200 <= response.status < 300:
        raise FetchError("http_error", message, again=response.status >= 500)


async def _read(response: aiohttp.ClientResponse, config: FetchConfig) -> bytes:
    if (response.content_length or 0) > config.max_bytes:
        raise FetchError("too_large", f"{response.content_length:,} bytes announced")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > config.max_bytes:
            raise FetchError("too_large", f"more than {config.max_bytes:,} bytes")
    if not body:
        raise FetchError("empty", "zero bytes")
    if not is_media(body):
        kind = response.headers.get("Content-Type", "no content type")
        raise FetchError("not_media", f"begins with {bytes(body[:12])!r} ({kind})")
    return bytes(body)


def _classed(error: Exception, config: FetchConfig) -> FetchError:
    """The status in the ledger of whatever a download raised."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    message = f"{type(error).__name__}: {error}"
    match error:
        case FetchError():
            return error
        case TimeoutError():
            return FetchError("timeout", f"no whole answer in {config.timeout_s:g} s", again=True)
        case _ if isinstance(cause, ForbiddenAddress):
            return FetchError("forbidden_address", str(cause))
        case aiohttp.InvalidURL():
            return FetchError("forbidden_address", message)
        case aiohttp.ClientConnectorDNSError():
            unknown = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
            return FetchError("dns", message, again=not unknown)
        case aiohttp.ClientResponseError():
            return FetchError("http_error", message)
        case aiohttp.ClientError() | OSError():
            return FetchError("connection", message, again=True)
        case _:
            return FetchError("dns", message)  # a host name or URL that cannot be encoded


def _host(url: str) -> str:
    try:
        return URL(url).host or ""
    except ValueError:
        return ""
