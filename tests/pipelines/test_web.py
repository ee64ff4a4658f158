import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import av
import pytest
from PIL import Image

from pipelines.web import IMAGE_FAULTS, VIDEO_FAULTS, serve


@pytest.fixture(scope="module")
def server(corpus):
    """A server of its own, since what fails once must not have failed before."""
    with serve(corpus.folder) as base_url:
        yield base_url


def get(base_url, path, timeout_s=10):
    """Status, headers and body of one request; redirects are not followed."""
    address = urlsplit(base_url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def answers(base_url):
    try:
        get(base_url, "/")
    except OSError:
        return False
    return True


def good(corpus, suffix):
    return (corpus.folder / {"mp4": "videos/000000.mp4", "jpg": "images/000000.jpg"}[suffix]).read_bytes()


def test_files_are_served_as_they_are(server, corpus):
    for path in ("videos/000003.mp4", "images/000005.jpg", "corpus.json"):
        assert get(server, f"/{path}")[::2] == (200, (corpus.folder / path).read_bytes())
    assert get(server, "/../" + corpus.folder.name)[0] in (403, 404)


def test_missing(server):
    assert {get(server, f"/faults/missing.{suffix}")[0] for suffix in ("mp4", "jpg")} == {404}


@pytest.mark.parametrize("suffix", ["mp4", "jpg"])
def test_flaky_fails_once(server, corpus, suffix):
    assert get(server, f"/faults/flaky.{suffix}")[0] == 500
    for _ in range(2):
        assert get(server, f"/faults/flaky.{suffix}")[::2] == (200, good(corpus, suffix))


@pytest.mark.parametrize("suffix", ["mp4", "jpg"])
def test_redirects(server, corpus, suffix):
    def location(name):
        status, headers, _ = get(server, f"/faults/{name}.{suffix}")
        assert status == 302
        return headers["Location"]

    assert get(server, location("moved"))[::2] == (200, good(corpus, suffix))
    assert location("loop") == f"/faults/loop.{suffix}"
    assert location("local-file") == "file:///etc/passwd"
    assert location("link-local").startswith("http://169.254.169.254/")


def test_stalled_sends_something_and_then_nothing(server):
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port), timeout=1) as connection:
        connection.sendall(b"GET /faults/stalled.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        with pytest.raises(TimeoutError):
            while block := connection.recv(65536):
                received += block
    head, body = received.split(b"\r\n\r\n", 1)
    assert b"200 OK" in head and b"Content-Length: 1000000" in head and len(body) == 1000


def test_truncated_arrives_whole_and_cannot_be_decoded(server, corpus):
    status, headers, body = get(server, "/faults/truncated.mp4")
    assert status == 200 and int(headers["Content-Length"]) == len(body) == len(good(corpus, "mp4")) // 2
    with pytest.raises(av.FFmpegError):
        av.open(str(corpus.folder / "faults/truncated.mp4"))


@pytest.mark.parametrize("suffix", ["mp4", "jpg"])
def test_page_and_empty_and_noai(server, corpus, suffix):
    status, headers, body = get(server, f"/faults/page.{suffix}")
    assert status == 200 and headers.get_content_type() == "text/html" and b"<title>" in body
    assert get(server, f"/faults/empty.{suffix}")[::2] == (200, b"")
    status, headers, body = get(server, f"/faults/noai.{suffix}")
    assert status == 200 and headers["X-Robots-Tag"] == "noai" and body == good(corpus, suffix)


def test_short_lasts_a_second(server, tmp_path):
    (tmp_path / "short.mp4").write_bytes(get(server, "/faults/short.mp4")[2])
    with av.open(str(tmp_path / "short.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == pytest.approx(1, abs=0.05)


def test_huge_claims_more_pixels_than_anyone_wants(server, tmp_path):
    (tmp_path / "huge.jpg").write_bytes(get(server, "/faults/huge.jpg")[2])
    with pytest.raises(Image.DecompressionBombError, match=str(60_000 * 60_000)):
        Image.open(tmp_path / "huge.jpg")


def test_every_fault_is_reachable(server):
    for name, status in (VIDEO_FAULTS | IMAGE_FAULTS).items():
        if not name.startswith("stalled"):
            assert get(server, f"/faults/{name}")[0] == 404 or status != "http_404", name


def test_the_server_ends_with_its_block_and_its_port_can_be_had_again(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with serve(tmp_path) as first:
        assert get(first, "/a.txt")[2] == b"a"
    assert not answers(first)
    with serve(tmp_path, urlsplit(first).port) as second:
        assert second == first and answers(second)


def test_a_taken_port_is_an_error(server, tmp_path):
    with pytest.raises(OSError, match="did not start"), serve(tmp_path, urlsplit(server).port):
        pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_when_its_parent_is_killed(tmp_path, end):
    script = "\n".join(
        [
            "import sys, time",
            "from pipelines.web import serve",
            "with serve(sys.argv[1]) as url:",
            "    print(url, flush=True)",
            "    time.sleep(60)",
        ]
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    base_url = parent.stdout.readline().strip()
    assert answers(base_url)
    os.kill(parent.pid, end)
    parent.wait()
    deadline = time.monotonic() + 10
    while answers(base_url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(base_url)
