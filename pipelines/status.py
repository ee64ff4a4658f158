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
        funnel[plan.stream] = _show(plan, data_dir, time.time())
    print(f"\n{funnel_text(funnel)}")


def _show(plan: StreamPlan, data_dir: str, now: float) -> Counter[str]:
    """Prints one stream's line; returns its rows by status."""
    shards, recent, begun, statuses = 0, 0, now, Counter[str]()
    for _, summary in read_done(data_dir, plan.stream, plan.names):
        shards += 1
        statuses.update(summary["status"])
        recent += summary["rows"] if now - summary["ended"] < RECENT_S else 0
        begun = min(begun, summary["ended"] - summary["seconds"]["encode"])
    rows, total = statuses.total(), plan.manifest.rows
    text = f"{plan.stream:<7} {shards:,}/{plan.manifest.shards.num_rows:,} shards, {rows:,}/{total:,} rows"
    if rows == total:
        print(f"{text}, all done")
    elif not recent:
        print(f"{text}, none in the last {RECENT_S // 60} minutes")
    else:
        speed = recent / min(RECENT_S, now - begun)
        print(f"{text}, {speed:,.1f} rows/s lately, about {(total - rows) / speed / 3600:.1f} h left")
    return statuses
