"""video2dataset 1.3.0's download worker, with the mends without which it does not run beside today's packages.

The package is unmaintained since February 2024. Its dataloader, which downloading never uses, needs torchaudio, old
torchdata and decord; and it takes whatever a server answers for a video, a page that says 404 too.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from pipelines.fetch import FetchError, opts_out


def download_worker(check: Any, max_redirects: int, honour_opt_out: bool) -> Any:
    """The class DownloadWorker; `check` is asked about the target of each redirect before it is followed."""
    _stand_in_for_dataloader()
    from video2dataset import data_reader
    from video2dataset.workers.download_worker import DownloadWorker

    # It downloads by `requests.get` in that one place.
    data_reader.requests = SimpleNamespace(get=_checked_get(check, max_redirects, honour_opt_out))
    return DownloadWorker


def _stand_in_for_dataloader() -> None:
    """Only while the package is first imported, whose other workers name it."""
    if "video2dataset" in sys.modules:
        return
    stand_in = ModuleType("video2dataset.dataloader")
    stand_in.get_video_dataset = None  # type: ignore[attr-defined]
    sys.modules["video2dataset.dataloader"] = stand_in
    import video2dataset  # noqa: F401


def _checked_get(check: Any, max_redirects: int, honour_opt_out: bool) -> Any:
    import requests

    def inspect(response: requests.Response, **_: Any) -> None:
        if honour_opt_out and opts_out([response.headers.get("X-Robots-Tag", "")]):
            raise FetchError("opt_out", f"X-Robots-Tag: {response.headers['X-Robots-Tag']}")
        if response.is_redirect:
            check(requests.compat.urljoin(response.url, response.headers["Location"]))
        response.raise_for_status()

    def get(url: str, **options: Any) -> requests.Response:
        session = requests.Session()
        session.trust_env = False  # no password of a .netrc is sent along
        session.max_redirects = max_redirects
        return session.get(url, hooks={"response": inspect}, **options)

    return get
