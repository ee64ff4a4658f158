"""Writes a run's report: one HTML file that holds its clips, curves, scores and yields, and fetches nothing.

By hand: `python -m dashboards.report runs/quickstart`.
"""

import hashlib
import json
import os
import platform
import sys
from base64 import b64encode
from datetime import datetime
from statistics import median
from typing import Any

import yaml

from dashboards.curves import Chart, chart
from dashboards.gallery import gallery
from dashboards.verdicts import distances, heats
from t2v import storage
from t2v.digest import digest_of

JOBS = ("train", "evaluate", "generate", "prepare_data")  # whose configuration is shown: the first that has run
STREAMS = ("videos", "images")
GAUGES = {
    "samples_per_s": ("samples a second", 1),
    "data_wait_share": ("waiting for data, %", 100),
    "memory_gib": ("memory, GiB", 1),
    "gradient_norm": ("norm of the gradient", 1),
}
REASONS = {
    "no_url": "no address in the row",
    "dns": "host not found",
    "connection": "no connection",
    "timeout": "took too long",
    "http_404": "not there (404)",
    "http_error": "server error",
    "too_many_redirects": "redirected in circles",
    "forbidden_address": "private address, refused",
    "opt_out": "the owner opted out",
    "empty": "empty file",
    "too_large": "too large",
    "not_media": "not a video or picture",
    "corrupt": "broken file",
    "too_short": "too short",
    "too_many_pixels": "too many pixels",
}


def write_report(run_dir: str) -> str:
    """Write `run_dir`/report.html from whatever the jobs have left there so far, and return its path.

    What a job has not made yet is said in words on the page.
    """
    path = storage.join(run_dir, "report.html")
    page = render(run_dir)
    with storage.open_atomic(path) as file:
        file.write(page.encode())
    return path


def render(run_dir: str) -> str:
    """The page's HTML; every text from the run is escaped, because captions come from strangers."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": percent,
        "share": share,
        "thousands": "{:,}".format,
        "short": short,
        "duration": duration,
        "reason": lambda status: REASONS.get(status, status.replace("_", " ")),
        "csp_hash": csp_hash,
    }
    return environment.get_template("report.html.jinja").render(contents(run_dir))


def contents(run_dir: str) -> dict[str, Any]:
    """All that the template shows, by the names that it uses; what is not there yet is empty."""
    log = _read_lines(storage.join(run_dir, "train", "log.jsonl"))
    scores = _read(storage.join(run_dir, "scores", "scores.json"))
    samples = newest(_read_lines(storage.join(run_dir, "samples", "manifest.jsonl")), scores)
    confusion = _read(storage.join(run_dir, "scores", "confusion.json"))
    config = resolved_config(run_dir)
    loss = loss_chart(log)
    funnel = _read(storage.join(run_dir, "data", "funnel.json"))
    return {
        "name": os.path.basename(run_dir.rstrip("/")),
        "facts": facts(config),
        "config": config,
        "trained": {"samples": log[-1]["samples"], "seconds": sum(row["seconds"] for row in log)} if log else None,
        "funnel": {name: funnel[name] for name in STREAMS if name in funnel},
        "figures": figures(funnel, loss, scores),
        "cards": gallery(run_dir, samples, scores, judged=bool(confusion)),
        "samples": samples,
        "scores": scores,
        "distances": distances(scores),
        "heats": heats(confusion),
        "loss": loss,
        "gauges": gauges(log),
    }


def newest(samples: list[dict[str, Any]], scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of the model that was scored, where older models left theirs beside them; otherwise all."""
    scored = [row for row in samples if row["model"] == scores.get("inputs", {}).get("model")]
    return scored or samples


def resolved_config(run_dir: str) -> str:
    """The configuration, as YAML, that the run's training was given, or else another of its jobs."""
    paths = (storage.join(run_dir, "config", f"{job}.yaml") for job in JOBS)
    return next((storage.read_bytes(path).decode() for path in paths if storage.exists(path)), "")


def config_hash(config: str) -> str:
    """The 16 hex digits that the jobs print for this configuration."""
    return digest_of(yaml.safe_load(config))


def facts(config: str) -> list[tuple[str, str]]:
    """What was run, and when and where the page was written."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    now = datetime.now().astimezone()
    return [
        *([("configuration", config_hash(config))] if config else []),
        ("written", f"{now.day} {now:%B %Y, %H:%M %Z}"),
        ("on", f"{os.cpu_count()} CPU cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()}"),
    ]


def figures(funnel: dict[str, Any], loss: Chart | None, scores: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that say the most, each with what it counts."""
    found = []
    for row in scores.get("shapes", []):
        if (row["of"], row["against"]) == ("generated", "captions"):
            found.append((share(row["all"]), f"of {row['clips']} generated clips show all that their captions say"))
    for curve in loss.curves if loss else []:
        found.append((short(curve.last), f"loss of {curve.name}, from {short(curve.first)}"))
    if total := sum(stream["rows"] for stream in funnel.values()):
        ok = sum(stream["status"].get("ok", 0) for stream in funnel.values())
        found.append((share(ok / total), f"of {total:,} input rows became latents"))
    return found


def loss_chart(log: list[dict[str, Any]]) -> Chart | None:
    """Loss of each stream over the samples seen."""
    return chart({name: [(row["samples"], row.get(f"loss_{name}")) for row in log] for name in STREAMS}, log=True)


def gauges(log: list[dict[str, Any]]) -> list[tuple[str, float, Chart]]:
    """Title, median and curve of what else each interval measured."""
    found = []
    for key, (title, unit) in GAUGES.items():
        points = [(row["samples"], row[key] * unit) for row in log if key in row]
        if drawn := chart({"value": points}):
            found.append((title, median(y for _, y in points), drawn))
    return found


def percent(value: float) -> str:
    """A share of 1 in per cent, without the sign."""
    return f"{100 * value:.1f}".removesuffix(".0")


def share(value: float) -> str:
    """A share of 1 in per cent, with the sign."""
    return f"{percent(value)} %"


def short(value: float) -> str:
    """A number in two or three digits that count."""
    return f"{value:.2g}" if abs(value) < 1 else f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something: 48 s, 2 min 41 s, 3 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def csp_hash(script: str) -> str:
    """The source by which a Content-Security-Policy allows this one inline script and no other."""
    return "sha256-" + b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _read(path: str) -> dict[str, Any]:
    return storage.read_json(path) if storage.exists(path) else {}


def _read_lines(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut short by a kill is left out."""
    text = storage.read_bytes(path).decode() if storage.exists(path) else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


if __name__ == "__main__":
    print(write_report(sys.argv[1]))
