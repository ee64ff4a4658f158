"""Files that mean harm or are merely odd, each with the statuses in which its row may end; all are made from seeds."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from tests.pipelines.test_media import encode, evenly, remuxed, unevenly, x264
from tests.pipelines.test_pictures import saved

Cases = dict[str, tuple[bytes, str]]  # name -> content, statuses separated by blanks

FLIPPED = "ok corrupt not_media too_short too_many_pixels"  # depending on which bits
ANY = f"{FLIPPED} decode_timeout decoder_crashed"
RAMP = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 96, 3))
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"mvex", b"moof", b"traf")


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of every box of an mp4 file, outer ones first (ISO/IEC 14496-12, 4.2)."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        assert 8 <= size <= end - start, (kind, size)
        yield kind, start, start + size
        if kind in _CONTAINERS:
            yield from boxes(data, start + 8, start + size)
        start += size


def patched(data: bytes, offset: int, content: bytes) -> bytes:
    """`data` with `content` in place of what stood at `offset`."""
    return data[:offset] + content + data[offset + len(content) :]


def flipped(data: bytes, seed: int, bits: int, start: int = 0, end: int | None = None) -> bytes:
    """`data` with that many bits flipped between `start` and `end`."""
    numbers, changed = random.Random(seed), bytearray(data)
    for _ in range(bits):
        changed[numbers.randrange(start, end or len(data))] ^= 1 << numbers.randrange(8)
    return bytes(changed)


def clip(seconds: float = 7, **how: object) -> bytes:
    return encode(**{"times_s": evenly(8, seconds), "rate": 8, "image": RAMP} | how)  # type: ignore[arg-type]


def header_first(data: bytes) -> bytes:
    """An mp4 with its header before its media, as the web has them; the offsets of chunks grow by the header's size."""
    at = {kind: (start, end) for kind, start, end in boxes(data)}
    header, media = (data[slice(*at[kind])] for kind in (b"moov", b"mdat"))
    start, end = (place - at[b"moov"][0] for place in at[b"stco"])
    offsets = struct.unpack(f">{(end - start - 16) // 4}I", header[start + 16 : end])
    moved = struct.pack(f">{len(offsets)}I", *(offset + len(header) for offset in offsets))
    return data[: at[b"mdat"][0]] + patched(header, start + 16, moved) + media


def videos() -> Cases:
    data = header_first(clip(options=x264(16)))
    matroska = clip(container="matroska", options=x264(16))
    found = list(boxes(data))
    place = {kind: start for kind, start, _ in found}
    media_at, media_end = next((start, end) for kind, start, end in found if kind == b"mdat")
    cases: Cases = {}
    for kind, start, end in found:
        for where, length in (("at", start), ("in", (start + end) // 2)):
            status = "empty" if length == 0 else "not_media" if length < 8 else "corrupt"
            cases[f"cut-{where}-{kind.decode()}-{start}.mp4"] = data[:length], status
    for seed in range(12):
        cases[f"bits-{seed}.mp4"] = flipped(data, seed, 20), FLIPPED
        cases[f"bits-in-header-{seed}.mp4"] = flipped(data, seed, 4, 24, media_at), FLIPPED
        cases[f"bits-in-media-{seed}.mp4"] = flipped(data, seed, 40, media_at + 8, media_end), FLIPPED
        cases[f"bits-{seed}.mkv"] = flipped(matroska, seed, 20, 40), FLIPPED
    for size in (0, 1, 7, 8, 2**31, 2**32 - 1):
        cases[f"moov-of-{size}.mp4"] = patched(data, place[b"moov"], struct.pack(">I", size)), ANY
        cases[f"stsz-of-{size}.mp4"] = patched(data, place[b"stsz"], struct.pack(">I", size)), ANY
    endless = struct.pack(">II", 0, 2**31 - 1)  # all samples empty, two thousand million of them
    cases["samples-without-end.mp4"] = patched(data, place[b"stsz"] + 12, endless), ANY
    alike = patched(patched(data, place[b"stsz"] + 12, struct.pack(">II", 1, 2**31 - 1)), place[b"stts"] + 12, b"\x7f")
    cases["samples-of-one-byte.mp4"] = alike, ANY
    cases["media-without-end.mp4"] = patched(data, media_at, struct.pack(">I4sQ", 1, b"mdat", 2**63 - 1)), ANY
    cases |= huge_videos(data)
    return cases | odd_videos() | wrong_names()


def huge_videos(data: bytes) -> Cases:
    """Larger than the tests' bound of 4 megapixels by their headers, in truth, or from the middle on."""
    entry = data.index(b"avc1") - 4
    large = {"times_s": evenly(2, 6), "image": np.zeros((2002, 2002, 3), np.uint8), "size": (2002, 2002)}
    large |= {"options": {"preset": "ultrafast", "g": "100"}}
    broad = clip(container="matroska", size=(64, 320), image=np.zeros((64, 320, 3), np.uint8))
    return {
        "huge-by-entry.mp4": (patched(data, entry + 32, struct.pack(">HH", 65535, 65535)), ANY),
        "huge-by-header.mkv": (broad.replace(b"\xb0\x82\x01\x40", b"\xb0\x82\xff\xff"), "too_many_pixels ok"),
        "huge-by-header.avi": (huge_avi(), "too_many_pixels ok"),
        "huge.mp4": (encode(rate=2, **large), "too_many_pixels"),
        "grows.ts": (
            clip(4, container="mpegts") + encode(rate=2, container="mpegts", **large),
            "too_many_pixels corrupt",
        ),
    }


def huge_avi() -> bytes:
    data = clip(container="avi", codec="mjpeg", options={"q": "5"}, pixels="yuvj420p")
    return patched(data, data.index(b"strf") + 12, struct.pack("<ii", 100_000, 100_000))


def odd_videos() -> Cases:
    """What is odd but a video all the same, and what is none."""
    shaken = random.Random(0)
    whole = clip(9, options=x264(16, 0))

    def shuffled(pts: int, dts: int, base: object) -> tuple[int, int]:
        return dts + shaken.randrange(0, 9) * 100, dts

    def backwards(pts: int, dts: int, base: object) -> tuple[int, int]:
        return 10**6 - pts, dts

    def cut(pts: int, dts: int, base: object) -> tuple[int, int]:
        return pts - round(1 / base), dts - round(1 / base)  # type: ignore[operator]

    return {
        "times-shuffled.mkv": (remuxed(whole, shuffled, "matroska"), "ok too_short corrupt"),
        "times-far.mkv": (remuxed(whole, lambda p, d, b: (p * 10**6, d * 10**6), "matroska"), "ok corrupt"),
        "times-equal.mkv": (remuxed(whole, lambda p, d, b: (7, 7), "matroska"), "too_short"),
        "times-negative.mp4": (remuxed(whole, cut), "ok"),
        "uneven.mp4": (clip(times_s=unevenly(9)), "ok"),
        "odd-size.mkv": (encode(evenly(8, 7), "matroska", rate=8, size=(33, 41), pixels="yuv444p"), "ok"),
        "turned.mp4": (clip(rotation=90), "ok"),
        "turned-by-17.mp4": (clip(rotation=17), "ok"),
        "ten-bits.mp4": (clip(pixels="yuv420p10le"), "ok"),
        "interlaced.mp4": (clip(options=x264(16, **{"x264-params": "tff=1"})), "ok"),
        "vp9.webm": (clip(container="webm", codec="libvpx-vp9", options={"cpu-used": "8"}), "ok"),
        "gif.gif": (clip(container="gif", codec="gif", options={"loop": "0"}, pixels="rgb8"), "ok"),
        "one-frame.mp4": (clip(times_s=[0]), "too_short"),
        "sound.mp4": (sound(), "not_media"),
        "sound-with-cover.m4a": (sound(cover=True), "not_media"),
        "cover-before-video.mp4": (covered(), "ok"),
        "subtitles.mkv": (subtitles(), "not_media"),
    }


def sound(cover: bool = False) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        audio = output.add_stream("aac", rate=8000, layout="mono")
        picture = _add_cover(output) if cover else None
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for _ in range(60):
            frame.pts = None
            output.mux(audio.encode(frame))
        if picture is not None:
            output.mux(picture)
        output.mux(audio.encode())
    return file.getvalue()


def covered() -> bytes:
    """A video whose first stream is its cover: its description stands before its track."""
    file = io.BytesIO()
    with av.open(io.BytesIO(clip())) as source, av.open(file, "w", format="mp4") as output:
        picture = _add_cover(output)
        stream = output.add_stream_from_template(source.streams.video[0])
        output.mux(picture)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    data = file.getvalue()
    at = {kind: (start, end) for kind, start, end in boxes(data)}
    (track, _), (described, end) = at[b"trak"], at[b"udta"]
    return data[:track] + data[described:end] + data[track:described] + data[end:]


def _add_cover(output: av.container.OutputContainer) -> av.Packet:
    stream = output.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
    return (stream.encode(frame) + stream.encode())[0]


def subtitles() -> bytes:
    file = io.BytesIO()
    source = io.BytesIO(b"1\n00:00:00,000 --> 00:00:09,000\nhello\n")
    with av.open(source, format="srt") as read, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(read.streams.subtitles[0])
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def wrong_names() -> Cases:
    """One kind of file under the name of another: what counts is the content."""
    return {
        "picture.mp4": (saved(Image.new("RGB", (64, 64)), "PNG"), "not_media"),
        "matroska.mp4": (clip(container="matroska"), "ok"),
        "page.webm": (b"<!doctype html><p>" + bytes(5000), "not_media"),
        "playlist.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", "not_media"),
        "concat.mp4": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not_media"),
        "zeros.mp4": (bytes(100_000), "not_media"),
        "noise.mp4": (b"\0\0\0\x20ftypisom" + random.Random(0).randbytes(100_000), "corrupt"),
        "noise.mkv": (b"\x1a\x45\xdf\xa3" + random.Random(1).randbytes(100_000), "corrupt"),
        "noise.ts": (b"".join(b"\x47\x40" + random.Random(i).randbytes(186) for i in range(500)), "corrupt"),
        "noise.flv": (b"FLV\1\5\0\0\0\x09" + random.Random(2).randbytes(100_000), "corrupt"),
        "noise.ogv": (b"OggS" + random.Random(3).randbytes(100_000), "corrupt"),
        "noise.mpg": (b"\0\0\1\xba" + random.Random(4).randbytes(100_000), "corrupt"),
    }


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *before: bytes, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = zlib.compress(rows or bytes(min(height * (width * 3 + 1), 10**7)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pictures() -> Cases:
    photo = Image.fromarray(np.dstack([RAMP[..., 0], np.flipud(RAMP[..., 0]), np.full((64, 96), 99, np.uint8)]))
    zeros = zlib.compress(bytes(200_000_000), 9)
    bombs = {
        "wide.png": (png(60_000, 60_000), "too_many_pixels"),
        "line.png": (png(2**31 - 1, 1), "too_many_pixels corrupt"),
        "text.png": (png(64, 64, chunk(b"zTXt", b"Comment\0\0" + zeros)), "ok corrupt"),
        "profile.png": (png(64, 64, chunk(b"iCCP", b"icc\0\0" + zeros)), "ok corrupt"),
        "pixels.png": (png(64, 64, rows=bytes(200_000_000)), "ok corrupt"),
        "many-chunks.png": (png(64, 64, *[chunk(b"tEXt", b"k\0v")] * 100_000), "ok corrupt"),
        "wide.gif": (patched(saved(photo, "GIF"), 6, b"\xff\xff\xff\xff"), "too_many_pixels"),
        "wide.bmp": (patched(saved(photo, "BMP"), 18, struct.pack("<ii", 60_000, 60_000)), "too_many_pixels"),
        "wide.webp": (patched(saved(photo, "WEBP", lossless=True), 21, b"\xff\xff\xff\x0f"), "too_many_pixels corrupt"),
        "wide.tiff": (tiff(60_000, 60_000), "too_many_pixels"),
        "offsets.tiff": (patched(saved(photo, "TIFF"), 4, b"\xff\xff\xff\x7f"), "not_media corrupt"),
    }
    cases: Cases = {f"bomb-{name}": case for name, case in bombs.items()}
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        data = saved(photo, kind)
        cases[f"half.{kind}"] = data[: len(data) // 2], "corrupt not_media"
        for seed in range(3):
            cases[f"bits-{seed}.{kind}"] = flipped(data, seed, 6, 8), FLIPPED
    exif = {number: Image.Exif() for number in range(1, 9)}
    for number, tags in exif.items():
        tags[0x0112] = number
        cases[f"turned-{number}.jpg"] = saved(photo, "JPEG", exif=tags), "ok"
    for name, tags in (("garbage", b"Exif\0\0" + bytes(range(99))), ("empty", b"Exif\0\0"), ("cut", b"Exif\0\0II*\0")):
        cases[f"exif-{name}.jpg"] = saved(photo, "JPEG", exif=tags), "ok"
    for mode, kind in (
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "TIFF"),
    ):
        cases[f"mode-{mode}.{kind}"] = saved(photo.convert(mode), kind), "ok"
    deep = np.linspace(0, 65535, 96).astype(np.uint16)[None].repeat(64, 0)
    cases["sixteen-bits.png"] = saved(Image.fromarray(deep), "PNG"), "ok"
    cases["sixteen-bits.tiff"] = saved(Image.fromarray(deep), "TIFF"), "ok"
    cases["floats.tiff"] = saved(Image.fromarray(deep.astype(np.float32)), "TIFF"), "corrupt"
    cases["sixteen-bits-colour.png"] = png(8, 8, depth=16, rows=(b"\0" + b"\x80\0\x40\0\xff\xff" * 8) * 8), "ok"
    for kind in ("GIF", "WEBP", "PNG"):
        more = [photo.rotate(angle) for angle in range(10, 90, 10)]
        cases[f"animated.{kind}"] = saved(photo, kind, save_all=True, append_images=more, duration=100), "ok"
    for size in ((1, 1), (1, 500), (500, 1), (3, 7)):
        cases[f"{size[0]}-by-{size[1]}.png"] = saved(Image.new("RGB", size, "red"), "PNG"), "ok"
    cases["postscript.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_media"
    cases["vector.png"] = (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "not_media",
    )
    cases["video.jpg"] = clip(), "not_media"
    return cases


def tiff(width: int, height: int) -> bytes:
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, height),
        (279, 10**9),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(500)
