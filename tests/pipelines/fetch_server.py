"""A server on loopback whose answers are good, late, broken off, in parts or refused, and downloads from it."""

import asyncio
from collections import Counter

from aiohttp import web

from pipelines.fetch import fetch_all, open_session

JPEG = b"\xff\xd8\xff\xe0" + bytes(2000)
LARGE = JPEG + bytes(range(256)) * 1000
OTHER = JPEG + b"of another version"
STEP = 100_000  # after which a server of ranges breaks off


def fetch(urls, config):
    """Fetch from a real server on loopback; also what it was asked for, and how often."""
    return asyncio.run(_fetch(urls, config))


async def _fetch(urls, config):
    asked = Counter()
    runner = web.AppRunner(_application(asked), access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        absolute = [f"http://127.0.0.1:{port}{url}" if url.startswith("/") else url.format(port=port) for url in urls]
        async with open_session(config) as session:
            return await fetch_all(session, absolute, config), asked
    finally:
        await runner.cleanup()


def _application(asked):
    running = Counter()

    @web.middleware
    async def count(request, handler):
        asked[request.path] += 1
        return await handler(request)

    async def good(request):
        return web.Response(body=JPEG, content_type="image/jpeg")

    async def flaky(request):
        return web.Response(status=500) if asked["/flaky"] == 1 else await good(request)

    async def busy(request):
        headers = {"Retry-After": request.query_string}
        return web.Response(status=429, headers=headers) if asked["/busy"] == 1 else await good(request)

    async def slow(request):
        running["now"] += 1
        asked["at once"] = max(asked["at once"], running["now"])
        await asyncio.sleep(0.05)
        running["now"] -= 1
        return web.Response(body=JPEG + request.query_string.encode())

    async def cut(request):
        response = web.StreamResponse(headers={"Content-Length": "5000"})
        await response.prepare(request)
        await response.write(JPEG)
        request.transport.close()
        return response

    async def stalled(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(JPEG)
        await asyncio.sleep(60)
        return response

    async def chunked(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10):
            await response.write(JPEG)
        return response

    async def drip(request):
        body = LARGE + request.query_string.encode()
        announced = {} if request.path.endswith("unannounced") else {"Content-Length": str(len(body))}
        response = web.StreamResponse(headers=announced)
        await response.prepare(request)
        for start in range(0, len(body), 1 << 15):
            await response.write(body[start : start + (1 << 15)])
            await asyncio.sleep(0.02)
        return response

    async def status(request):
        return web.Response(status=int(request.match_info["code"]))

    async def redirect(request):
        return web.Response(status=302, headers={"Location": request.query_string or "/loop"})

    async def ranged(request):
        """Breaks off after STEP bytes, and continues as the last word of the path says."""
        how = request.match_info["how"]
        wanted = {name: request.headers.get(name) for name in ("Range", "If-Range")}
        asked["wanted"] = asked["wanted"] + [wanted] if asked["wanted"] else [wanted]
        start = int(wanted["Range"][6:-1]) if wanted["Range"] else 0
        again = len(asked["wanted"]) > 2
        tag = f'"{how}"' if how != "weak" else 'W/"weak"'
        headers = {"Accept-Ranges": "bytes", "ETag": tag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if how in ("modified", "young"):
            del headers["ETag"]
        if how == "young":
            headers["Last-Modified"] = headers["Date"] = "Thu, 01 Jan 2026 00:00:00 GMT"
        if how == "silent":
            headers["Accept-Ranges"] = "none"
        if how == "416" and start:
            return web.Response(status=416)
        if how == "changed" and start:
            return web.Response(body=OTHER, headers={**headers, "ETag": '"another"'})
        body, last = LARGE[start:], len(LARGE) - 1
        if start or how == "unasked":
            first, in_all = start + (how == "other-start"), len(LARGE) + (how == "other-length")
            headers["Content-Range"] = f"bytes {first}-{last - (how == 'short')}/{in_all}"
            if how == "other-tag":
                headers["ETag"] = '"yet another"'
        if how != "unannounced":
            headers["Content-Length"] = str(len(body))
        response = web.StreamResponse(status=206 if "Content-Range" in headers else 200, headers=headers)
        await response.prepare(request)
        whole = again and how in ("other-start", "other-length", "other-tag", "short", "416")
        await response.write(body if whole else body[:STEP])
        if len(body) > STEP and not whole:
            await asyncio.sleep(0.1)  # or what was sent would be thrown away with the connection
            request.transport.close()
        return response

    async def page(request):
        return web.Response(text="<!doctype html>", content_type="text/html")

    async def announced(request):
        return web.Response(body=bytes(20_000))

    async def noai(request):
        return web.Response(body=JPEG, headers={"X-Robots-Tag": "noindex, noai"})

    app = web.Application(middlewares=[count])
    for name, handler in {
        "good.jpg": good,
        "flaky": flaky,
        "busy": busy,
        "slow": slow,
        "cut": cut,
        "stalled": stalled,
        "chunked": chunked,
        "drip": drip,
        "drip/unannounced": drip,
        "status/{code}": status,
        "to": redirect,
        "loop": redirect,
        "page": page,
        "range/{how}": ranged,
        "announced": announced,
        "noai": noai,
    }.items():
        app.router.add_get(f"/{name}", handler)
    return app
