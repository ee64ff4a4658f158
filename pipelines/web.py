"""A web server for the miniature's corpus: real HTTP on loopback, in its own process, with the web's ways to fail.

A folder is served as it is, but for the names below, which misbehave under /faults/. Beside each name stands the
status in which its row of a manifest must end; "ok" is the first clip or picture after a detour. Files that are
broken in themselves (truncated, empty, short, huge) are written by pipelines/corpus.py.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

VIDEO_FAULTS = {
    "missing.mp4": "http_404",
    "flaky.mp4": "ok",  # 500 when first asked for
    "moved.mp4": "ok",
    "loop.mp4": "too_many_redirects",
    "stalled.mp4": "timeout",
    "truncated.mp4": "corrupt",
    "page.mp4": "not_media",
    "empty.mp4": "empty",
    "short.mp4": "too_short",
    "noai.mp4": "opt_out",
    "local-file.mp4": "forbidden_address",
    "link-local.mp4": "forbidden_address",
}
IMAGE_FAULTS = {
    "missing.jpg": "http_404",
    "flaky.jpg": "ok",
    "moved.jpg": "ok",
    "loop.jpg": "too_many_redirects",
    "page.jpg": "not_media",
    "empty.jpg": "empty",
    "huge.jpg": "too_many_pixels",  # says its header
    "noai.jpg": "opt_out",
    "local-file.jpg": "forbidden_address",
    "link-local.jpg": "forbidden_address",
}

GOOD = {".mp4": "videos/000000.mp4", ".jpg": "images/000000.jpg"}
STALL_S = 120.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def serve(folder: str | Path, port: int = 0) -> Iterator[str]:
    """Serve the folder on 127.0.0.1 from a process of its own, and yield the base URL, such as http://127.0.0.1:4321.

    Port 0 takes a free one. The server ends with the block, and by itself when this process dies, however it dies.
    OSError where the port is taken.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipelines.web", str(folder), str(port), str(os.getpid())]
    # Its own session, so that Ctrl-C reaches it through this process alone.
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        assert server.stdout is not None
        try:
            base_url = server.stdout.readline().strip()
            if not base_url:
                raise OSError(f"the server did not start on 127.0.0.1:{port}; its own message is above")
            yield base_url
        finally:
            server.terminate()


def application(folder: Path) -> web.Application:
    """The routes: files, and the faults."""
    app = web.Application()
    asked: set[str] = set()

    async def good(request: web.Request) -> web.FileResponse:
        return web.FileResponse(folder / GOOD[Path(request.path).suffix])

    async def flaky(request: web.Request) -> web.StreamResponse:
        if request.path not in asked:
            asked.add(request.path)
            raise web.HTTPInternalServerError
        return await good(request)

    async def noai(request: web.Request) -> web.StreamResponse:
        response = await good(request)
        response.headers["X-Robots-Tag"] = "noai"
        return response

    async def moved(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/" + GOOD[Path(request.path).suffix])

    faults = {
        "flaky": flaky,
        "noai": noai,
        "moved": moved,
        "page": _page,
        "stalled": _stalled,
        "loop": _redirect(None),
        "local-file": _redirect("file:///etc/passwd"),
        "link-local": _redirect("http://169.254.169.254/latest/meta-data/"),
    }
    for name, handler in faults.items():
        app.router.add_get(rf"/faults/{name}{{suffix:\.mp4|\.jpg}}", handler)
    app.router.add_static("/", folder)
    return app


def _redirect(location: str | None) -> Handler:
    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(location or request.path)

    return redirect


async def _page(request: web.Request) -> web.StreamResponse:
    return web.Response(text="<!doctype html><title>Gone</title><p>This file has moved.", content_type="text/html")


async def _stalled(request: web.Request) -> web.StreamResponse:
    """Some bytes of what was promised, then none until the client leaves."""
    response = web.StreamResponse(headers={"Content-Type": "video/mp4", "Content-Length": "1000000"})
    await response.prepare(request)
    await response.write(bytes(1000))
    await asyncio.sleep(STALL_S)
    return response


async def _run(folder: Path, port: int, parent: int) -> None:
    """Serve until the parent dies; the first line of output is the base URL."""
    runner = web.AppRunner(application(folder), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    while os.getppid() == parent:
        await asyncio.sleep(0.25)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("parent", type=int, help="id of the process to end with")
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.folder, arguments.port, arguments.parent))
