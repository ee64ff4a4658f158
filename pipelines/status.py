"""How far a preparation is, running or not, from its storage alone."""

import time
from collections import Counter

from pipelines.ledger import Funnel, funnel_text, read_done
from pipelines.prepare import StreamPlan, stored_plans
from t2v import storage

RECENT_S = 600


def show_status(run_dir: str) -> None:
    """Prints shards, rows, speed and the funnel of each stream; FileNotFoundError if nothing was begun there."""
    data_dir = storage.join(storage.absolute(run_dir), "data")
    funnel: Funnel = {}
    for plan in stored_plans(data_dir):
        done = read_done(data_dir, plan.stream, plan.names)
        funnel[plan.stream] = sum((Counter(one["status"]) for one in done), Counter())
        print(_line(plan, done, time.time()))
    print(f"\n{funnel_text(funnel)}")


def _line(plan: StreamPlan, done: list[dict], now: float) -> str:
    rows = sum(one["rows"] for one in done)
    recent = sum(one["rows"] for one in done if now - one["ended"] < RECENT_S)
    text = f"{plan.stream:<7} {len(done):,}/{len(plan.names):,} shards, {rows:,}/{plan.manifest.rows:,} rows"
    if rows == plan.manifest.rows:
        return f"{text}, all done"
    if not recent:
        return f"{text}, none in the last {RECENT_S // 60} minutes"
    begun = min(one["ended"] - one["seconds"]["encode"] for one in done)
    speed = recent / min(RECENT_S, now - begun)
    return f"{text}, {speed:,.1f} rows/s lately, about {(plan.manifest.rows - rows) / speed / 3600:.1f} h left"
