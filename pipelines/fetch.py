"""Downloads from strangers: many at a time, each bounded in bytes, time and redirects."""

import asyncio
import ipaddress
import math
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

from pipelines.addresses import ForbiddenAddress, GuardedResolver, guarded_socket
from pipelines.config import FetchConfig
from pipelines.ledger import Status

_BACKOFF_S = 0.5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)  # besides 5xx: too slow, too early, too many requests
_OPT_OUT = {"noai", "noimageai"}

# (offset, bytes) by which files of pictures and videos begin, and what their names end in; nothing else goes on to a
# decoder.
_MAGIC = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG", "png"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"),  # either byte order
    (0, b"MM\0*", "tif"),
    (8, b"WEBP", "webp"),  # before any other RIFF
    (0, b"RIFF", "avi"),
    (4, b"ftypavi", "avif"),  # before any other ftyp; avis is an animated one
    (4, b"ftyp", "mp4"),  # MP4, MOV
    (4, b"moov", "mp4"),
    (4, b"mdat", "mp4"),
    (4, b"wide", "mp4"),
    (4, b"free", "mp4"),
    (4, b"skip", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "mkv"),  # Matroska, WebM
    (0, b"\0\0\x01\xba", "mpg"),  # program stream
    (0, b"\0\0\x01\xb3", "mpg"),  # MPEG video
    (0, b"\x47\x40", "ts"),
    (0, b"OggS", "ogv"),
    (0, b"FLV", "flv"),
    (0, b"\x30\x26\xb2\x75", "wmv"),  # ASF
)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class Fetched:
    """How one download ended; `body` is empty unless status is ok, `seconds` includes the retries."""

    body: bytes
    status: Status
    message: str
    seconds: float


class FetchError(Exception):
    """A download that failed; `again` tells whether another attempt may help, in `after_s` seconds or later."""

    def __init__(self, status: Status, message: str, again: bool = False, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.message = status, message.encode(errors="replace").decode()  # servers' words may be no UTF-8
        self.again, self.after_s = again, after_s


class Fetcher:
    """Downloads lists of URLs, one after another, through one pool of connections and one DNS cache."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._runner = asyncio.Runner()
        self._session = self._runner.run(_opened(config))

    def __call__(self, urls: Sequence[str]) -> list[Fetched]:
        """As fetch_all; one call at a time."""
        return self._runner.run(fetch_all(self._session, urls, self._config))

    def close(self) -> None:
        """Close the connections; also done when an actor lets go of it."""
        if not self._session.closed:
            self._runner.run(self._session.close())
            self._runner.close()

    __del__ = close


async def fetch_all(session: aiohttp.ClientSession, urls: Sequence[str], config: FetchConfig) -> list[Fetched]:
    """Download all of `urls`, in the order given, within the bounds of `config`; never raises for a URL."""
    per_host: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(config.per_host))
    slots, room = asyncio.Semaphore(config.concurrency), _Room(config.max_bytes_under_way)
    kept = 0

    async def in_turn(url: str) -> Fetched:
        nonlocal kept
        async with per_host[_host(url)], slots:
            fetched = await _fetch(session, url, config, room)
        kept += len(fetched.body)
        if kept <= config.max_shard_bytes:
            return fetched
        kept -= len(fetched.body)
        message = f"its shard would hold more than {config.max_shard_bytes:,} bytes: lower shard_rows of the stream"
        return Fetched(b"", "too_large", message, fetched.seconds)

    return await asyncio.gather(*(in_turn(url) for url in urls))


def extension(head: bytes | bytearray) -> str | None:
    """What the name of a file that begins with `head` should end in, "jpg" or "mp4"; None if it is no media."""
    return next((name for offset, magic, name in _MAGIC if head.startswith(magic, offset)), None)


def checked_media(body: bytes, content_type: str, max_bytes: int) -> bytes:
    """`body`, if it may be a picture or a video; FetchError: empty, too_large, not_media."""
    if not body:
        raise FetchError("empty", "zero bytes")
    if len(body) > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes:,} bytes")
    if extension(body) is None:
        raise FetchError("not_media", f"begins with {body[:12]!r} ({content_type or 'no content type'})")
    return body


def parsed(url: str) -> URL:
    """ValueError where it is no URL, whatever yarl raises for it."""
    try:
        return URL(url)
    except IndexError as error:  # http://[]@
        raise ValueError(f"{url!r} is no URL") from error


def checked_url(url: URL) -> URL:
    """`url`, if it is one that may be asked for at all; FetchError: no_url, forbidden_address."""
    if not url.scheme:
        raise FetchError("no_url", f"{url} is no URL" if str(url) else "the manifest has no URL in this row")
    if url.scheme not in ("http", "https") or not url.host:
        raise FetchError("forbidden_address", f"{url} is no http or https URL")
    if url.user or url.password:
        raise FetchError("forbidden_address", f"the URL for {url.host} carries credentials")
    return url


def open_session(config: FetchConfig) -> aiohttp.ClientSession:
    """A pool of connections to allowed addresses alone; to be made where an event loop runs."""
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


async def _opened(config: FetchConfig) -> aiohttp.ClientSession:
    # Names are looked up in threads: names that nobody answers for must not keep others waiting on their own clocks.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(config.concurrency, "names"))
    return open_session(config)


@dataclass
class _Part:
    """What has come of a body; `validator` is the version that it is of, empty where the rest cannot be asked for."""

    url: URL = field(default_factory=URL)
    validator: str = ""
    bytes_in_all: int | None = None
    body: bytearray = field(default_factory=bytearray)
    reserved: int = 0  # bytes of the room that downloads share
    attempt: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    def begin(self, response: aiohttp.ClientResponse) -> None:
        self.url, self.validator = response.url, _validator(response)
        self.bytes_in_all, self.body = response.content_length, bytearray()

    def forget(self) -> None:
        self.validator, self.body = "", bytearray()

    def wanted(self, url: URL) -> dict[str, str]:
        """The headers that ask for the rest alone (RFC 9110, 13.1.5 and 14.2)."""
        if not (self.body and self.validator and url == self.url):
            return {}
        return {"Range": f"bytes={len(self.body)}-", "If-Range": self.validator}

    def is_continued_by(self, response: aiohttp.ClientResponse) -> bool:
        """Whether a partial answer is the rest of this very version, all of it."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not (match and self.body and self.validator and _validator(response) in ("", self.validator)):
            return False
        first, last, in_all = map(int, match.groups())
        return first == len(self.body) and last + 1 == in_all and self.bytes_in_all in (None, in_all)


class _Room:
    """Bytes that downloads under way may hold together.

    A body waits for what is announced of it, or for each further piece, which is not on its own clock. Where all is
    taken one body may still grow, so that some download always ends.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._beyond: _Part | None = None
        self._changed = asyncio.Condition()

    async def reserve(self, part: _Part, size: int) -> None:
        """Returns once `part` may hold `size` bytes."""
        if size <= part.reserved:
            return
        async with self._changed:
            if not self._is_free(part, size):
                left_s = (part.attempt.when() or math.inf) - asyncio.get_running_loop().time()
                part.attempt.reschedule(None)
                await self._changed.wait_for(lambda: self._is_free(part, size))
                part.attempt.reschedule(asyncio.get_running_loop().time() + left_s)
            self._taken += size - part.reserved
            part.reserved = size
            if self._taken > self._most:
                self._beyond = part

    async def leave(self, part: _Part) -> None:
        async with self._changed:
            self._taken -= part.reserved
            if self._beyond is part:
                self._beyond = None
            self._changed.notify_all()

    def _is_free(self, part: _Part, size: int) -> bool:
        return self._taken + size - part.reserved <= self._most or self._beyond in (None, part)


async def _fetch(session: aiohttp.ClientSession, url: str, config: FetchConfig, room: _Room) -> Fetched:
    part = _Part()
    try:
        return await _tried(session, url, part, config, room)
    finally:
        await room.leave(part)


async def _tried(session: aiohttp.ClientSession, url: str, part: _Part, config: FetchConfig, room: _Room) -> Fetched:
    begun = time.monotonic()
    for attempt in range(config.retries + 1):
        try:
            async with asyncio.timeout(config.timeout_s) as part.attempt:
                body = await _download(session, url, part, config, room)
            return Fetched(body, "ok", "", time.monotonic() - begun)
        except (FetchError, aiohttp.ClientError, OSError, ValueError) as error:
            failure = classed(error, config)
        if not failure.again:
            break
        if attempt < config.retries:
            await asyncio.sleep(max(_BACKOFF_S * 2**attempt, min(failure.after_s, config.timeout_s)))
    return Fetched(b"", failure.status, failure.message, time.monotonic() - begun)


async def _download(session: aiohttp.ClientSession, url: str, part: _Part, config: FetchConfig, room: _Room) -> bytes:
    """One attempt, redirects followed by hand so that each hop is held to the same rules."""
    here = checked_url(parsed(url))
    for _ in range(config.max_redirects + 1):
        async with session.get(here, headers=part.wanted(here), allow_redirects=False) as response:
            if config.honour_opt_out and opts_out(response.headers.getall("X-Robots-Tag", [])):
                raise FetchError("opt_out", f"X-Robots-Tag: {response.headers['X-Robots-Tag']}")
            if response.status in _REDIRECTS and "Location" in response.headers:
                here = checked_url(here.join(parsed(response.headers["Location"])))
                continue
            _check_status(response, part)
            return await _read(response, part, config, room)
    raise FetchError("too_many_redirects", f"more than {config.max_redirects}, the last to {here}")


def opts_out(robots_tags: Iterable[str]) -> bool:
    """Whether headers X-Robots-Tag ask not to be trained on."""
    return not _OPT_OUT.isdisjoint(re.split(r"[\s,;:]+", ",".join(robots_tags).lower()))


def _check_status(response: aiohttp.ClientResponse, part: _Part) -> None:
    message = f"HTTP {response.status} {response.reason}"
    if response.status == 404:
        raise FetchError("http_404", message)
    if response.status == 416 or (response.status == 206 and not part.is_continued_by(response)):
        again = bool(part.body)
        part.forget()
        raise FetchError("http_error", f"{message}, not the range that was asked for", again=again)
    if not 200 <= response.status < 300:
        after = response.headers.get("Retry-After", "")  # a date is taken for none (RFC 9110, 10.2.3)
        again = response.status >= 500 or response.status in _PASSING
        raise FetchError("http_error", message, again, float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0)


def _validator(response: aiohttp.ClientResponse) -> str:
    """By what the rest of this version may be asked for: a strong ETag, or a time long enough ago (8.8.2.2)."""
    if response.headers.get("Accept-Ranges") != "bytes" and response.status != 206:
        return ""
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if etag:
        return etag if etag.startswith('"') else ""
    try:
        age = parsedate_to_datetime(response.headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return ""
    return modified if age.total_seconds() >= 1 else ""


async def _read(response: aiohttp.ClientResponse, part: _Part, config: FetchConfig, room: _Room) -> bytes:
    """The whole body, continued where the attempt before broke off and the server plays along."""
    if response.status != 206:
        part.begin(response)
    announced = len(part.body) + (response.content_length or 0)
    if announced > config.max_bytes:
        raise FetchError("too_large", f"{announced:,} bytes announced")
    await room.reserve(part, announced)
    async for chunk in response.content.iter_any():
        await room.reserve(part, len(part.body) + len(chunk))
        part.body += chunk
        if len(part.body) > config.max_bytes:
            break
    return checked_media(bytes(part.body), response.headers.get("Content-Type", ""), config.max_bytes)


def classed(error: Exception, config: FetchConfig) -> FetchError:
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
        return parsed(url).host or ""
    except ValueError:
        return ""
