import json
import re
from pathlib import Path

import pytest

from pipelines.meters import Meters
from t2v.gauges import MEANINGS

FOLDER = Path(__file__).parents[2] / "dashboards"
DASHBOARDS = {name: json.loads((FOLDER / f"grafana-{name}.json").read_text()) for name in ("train", "data")}


def metrics_of(name: str) -> set[str]:
    asked = [target["expr"] for panel in DASHBOARDS[name]["panels"] for target in panel["targets"]]
    return {metric for expression in asked for metric in re.findall(r"ray_\w+", expression)}


def test_panels_ask_for_the_gauges_that_training_sets() -> None:
    assert metrics_of("train") == {f"ray_t2v_{name}" for name in MEANINGS}


def test_panels_ask_for_the_counters_that_the_preparation_sets() -> None:
    counters = [meter for meter in vars(Meters()).values()]
    assert metrics_of("data") == {f"ray_{meter.info['name']}_total" for meter in counters}


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_panels_do_not_overlap_and_take_their_source_from_the_dashboard(dashboard: dict) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${source}"}
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["source"]
    assert not re.search("https?://", json.dumps(dashboard))
