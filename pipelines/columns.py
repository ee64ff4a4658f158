"""What the columns of manifests are called; light, so that a wrong name is told when the configuration is read."""

from collections.abc import Collection

# Scores and labels that several data sets carry, in the spellings that are about.
_SCORES: dict[str, tuple[str, ...]] = {
    "punsafe": ("punsafe",),
    "nsfw": ("NSFW", "nsfw"),
    "similarity": ("similarity",),
    "watermark": ("pwatermark", "watermark"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score"),
    "language": ("LANGUAGE", "language"),
}
# Our column <- theirs; the first name that a manifest has is taken. Only `required` ones must be there.
COLUMN_MAPS: dict[str, dict[str, tuple[str, ...]]] = {
    "webvid": {"url": ("contentUrl",), "caption": ("name",), "duration_s": ("duration",)} | _SCORES,
    "laion2b-en": {"url": ("URL",), "caption": ("TEXT",), "width": ("WIDTH",), "height": ("HEIGHT",)} | _SCORES,
    # What img2dataset left behind of LAION2B-en: width and height are those of its own copies.
    "re-laion": {
        "url": ("url", "URL"),
        "caption": ("caption", "TEXT"),
        "width": ("original_width", "width", "WIDTH"),
        "height": ("original_height", "height", "HEIGHT"),
    }
    | _SCORES,
    "msrvtt": {"url": ("path", "video_id"), "caption": ("sentence",)},
    "generic": {
        "url": ("url",),
        "caption": ("caption",),
        "duration_s": ("duration_s",),
        "width": ("width",),
        "height": ("height",),
    }
    | _SCORES,
    # Parquet files that hold the media themselves, as img2dataset and video2dataset write them, and Hugging Face's.
    "encoded": {
        "bytes": ("jpg", "png", "webp", "mp4", "image", "video", "bytes"),
        "caption": ("caption", "txt", "text"),
        "url": ("url", "URL"),
        "duration_s": ("duration_s", "duration"),
        "width": ("original_width", "width"),
        "height": ("original_height", "height"),
    }
    | _SCORES,
}


def required(columns: Collection[str]) -> tuple[str, str]:
    """Of the columns of a map, those without which it is none; media that are there need no URL."""
    return ("bytes" if "bytes" in columns else "url", "caption")


def column_map(columns: str) -> dict[str, tuple[str, ...]]:
    """A built-in map by name, or an explicit one such as `url=link,caption=title,duration_s=length`.

    One with `bytes` tells the column of a Parquet file in which the media themselves lie.
    """
    if columns in COLUMN_MAPS:
        return COLUMN_MAPS[columns]
    pairs = [pair.partition("=") for pair in columns.split(",")]
    explicit: dict[str, tuple[str, ...]] = {ours.strip(): (theirs.strip(),) for ours, _, theirs in pairs if theirs}
    known = set(COLUMN_MAPS["encoded"])
    if len(explicit) < len(pairs) or not set(required(explicit)) <= set(explicit) <= known:
        raise ValueError(
            f"columns: {columns!r} is neither one of {', '.join(COLUMN_MAPS)} nor a list like 'url=link,caption=title' "
            f"of {', '.join(sorted(known))}"
        )
    return explicit
