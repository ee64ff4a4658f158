"""Three engines that download, behind one function: this project's own, img2dataset's and video2dataset's.

The two packages run their own code, here in the process. They retry, wait and open connections in their way: `per_host`
and `max_bytes_under_way` are not known to them, `timeout_s` bounds each wait for bytes and not an attempt, and
`max_bytes` is applied to what has come, so that a server which never ends its answer occupies a thread and memory; for
lists from strangers take builtin.
They know no rule for addresses either: a URL and the targets of its redirects are held to ours before they are asked
for. What this does not cover is a name that changes its address between our look and theirs, and what yt-dlp does for
URLs that do not end in a file name.
"""

import asyncio
import ipaddress
import re
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.addresses import ForbiddenAddress, is_allowed
from pipelines.config import FetchConfig
from pipelines.fetch import Fetched, Fetcher, FetchError, checked_media, checked_url, classed, parsed
from pipelines.ledger import Status

Download = Callable[[Sequence[str]], list[Fetched]]
Check = Callable[[str], None]  # raises FetchError for a URL that must not be asked for

# What the messages of urllib, requests and yt-dlp tell; the first that is found counts.
_REASONS: tuple[tuple[str, Status], ...] = (
    (r"X-Robots-Tag", "opt_out"),
    (
        r"not a public|not public|no http or https|credentials|is not allowed|No connection adapters",
        "forbidden_address",
    ),
    (r"infinite loop|Exceeded \d+ redirects|redirect loop", "too_many_redirects"),
    (r"\b404\b", "http_404"),
    (r"HTTP Error \d+|\d+ (Client|Server) Error", "http_error"),
    (r"timed out|[Tt]imeout", "timeout"),
    (r"[Nn]ame resolution|not known|getaddrinfo|NameResolution|No address associated", "dns"),
    (r"[Uu]nsupported URL|has no attribute|referenced before assignment|not associated with a value", "not_media"),
)


def open_engine(config: FetchConfig) -> Download:
    """The engine that `config` names: URLs -> how each download ended, in the same order; never raises for a URL.

    `seconds` of the packages' engines are an equal share of the whole call, because they do not tell.
    """
    if config.engine == "builtin":
        return Fetcher(config)
    engine = by_img2dataset if config.engine == "img2dataset" else by_video2dataset
    return lambda urls: engine(urls, config)


def by_img2dataset(urls: Sequence[str], config: FetchConfig) -> list[Fetched]:
    """Download with img2dataset's own worker: its threads, retries and reading of X-Robots-Tag; nothing is resized."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    def work(folder: str, shard: str, kept: _Kept, rows: int) -> None:
        urllib.request.install_opener(_checked_redirects(address_check(config), config.max_redirects))
        Downloader(
            sample_writer_class=kept.opened,
            resizer=Resizer(0, "no", False, disable_all_reencoding=True),
            thread_count=config.concurrency,
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=config.timeout_s,
            number_sample_per_shard=rows,
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=config.retries,
            user_agent_token=None,
            disallowed_header_directives=["noai", "noimageai"] if config.honour_opt_out else None,
        ).download_shard((0, shard))

    return _by_package(urls, config, work)


def by_video2dataset(urls: Sequence[str], config: FetchConfig) -> list[Fetched]:
    """Download with video2dataset's own worker: files by requests, pages by yt-dlp; it does not retry."""
    from pipelines.mended import download_worker

    def work(folder: str, shard: str, kept: _Kept, rows: int) -> None:
        worker = download_worker(address_check(config), config.max_redirects, config.honour_opt_out)
        settings = {
            "reading": {"timeout": config.timeout_s, "yt_args": {}},
            "subsampling": {},
            "storage": {"number_sample_per_shard": rows, "oom_shard_count": 5, "captions_are_subtitles": False},
            "distribution": {"thread_count": config.concurrency},
        }
        worker(kept.opened, False, folder, ["url"], folder, {"video": "mp4"}, settings).download_shard((shard, 0))

    return _by_package(urls, config, work)


def address_check(config: FetchConfig) -> Check:
    """What a URL is held to before a package may ask for it: its form, and all the addresses that its host has."""
    allowed = [ipaddress.ip_network(network) for network in config.allow_networks]

    def check(url: str) -> None:
        target = checked_url(parsed(url))
        found = {info[4][0] for info in socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)}
        for address in found:
            if not is_allowed(str(address), allowed):
                raise ForbiddenAddress(f"{target.host} is {address}, which is not public")

    return check


class _Kept:
    """The writer that both packages are given instead of theirs: keeps bodies and errors by the row's number."""

    def __init__(self) -> None:
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, str] = {}

    def opened(self, *_: Any) -> "_Kept":
        return self

    def write(self, media: Any, key: str, caption: str | None, meta: dict) -> None:
        body = media.get("video") if isinstance(media, dict) else media
        if body is None:
            self.errors[int(key)] = str(meta["error_message"])
        else:
            self.bodies[int(key)] = body

    def close(self) -> None:
        pass


def _checked_redirects(check: Check, most: int) -> urllib.request.OpenerDirector:
    """urllib with each target of a redirect held to our rule; where one is refused, that is the download's error."""

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_redirections = max_repeats = most

        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            check(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    return urllib.request.build_opener(Redirects)


def _by_package(
    urls: Sequence[str], config: FetchConfig, work: Callable[[str, str, _Kept, int], None]
) -> list[Fetched]:
    """Give a package those of the `urls` that pass our rule, as the Arrow file that it wants, and class what it did."""
    begun, kept = time.monotonic(), _Kept()
    refused = asyncio.run(_refusals(urls, config))
    passed = [index for index, error in enumerate(refused) if error is None]
    if passed:
        with tempfile.TemporaryDirectory() as folder:
            table = pa.table({"url": pa.array([urls[index] for index in passed], pa.string())})
            shard = str(Path(folder) / "shard.arrow")
            with pa.ipc.new_file(shard, table.schema) as writer:
                writer.write_table(table)
            work(folder, shard, kept, len(passed))
    numbers = {index: number for number, index in enumerate(passed)}
    seconds = (time.monotonic() - begun) / max(1, len(urls))
    return [_ended(error, kept, numbers.get(index, -1), config, seconds) for index, error in enumerate(refused)]


async def _refusals(urls: Sequence[str], config: FetchConfig) -> list[FetchError | None]:
    check = address_check(config)

    def refusal(url: str) -> FetchError | None:
        try:
            check(url)
        except (FetchError, OSError, ValueError) as error:
            return classed(error, config)
        return None

    return await asyncio.gather(*(asyncio.to_thread(refusal, url) for url in urls))


def _ended(error: FetchError | None, kept: _Kept, number: int, config: FetchConfig, seconds: float) -> Fetched:
    try:
        if error is not None:
            raise error
        if number not in kept.bodies:
            message = kept.errors.get(number, "the engine says nothing of this row")
            raise FetchError(_reason(message), message)
        body = checked_media(kept.bodies[number], "", config.max_bytes)
    except FetchError as failure:
        return Fetched(b"", failure.status, failure.message, seconds)
    return Fetched(body, "ok", "", seconds)


def _reason(message: str) -> Status:
    return next((status for pattern, status in _REASONS if re.search(pattern, message)), "connection")
