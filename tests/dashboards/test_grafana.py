import json
import re
from pathlib import Path

from t2v.worker import GAUGES

DASHBOARD = json.loads((Path(__file__).parents[2] / "dashboards" / "grafana-training.json").read_text())


def test_panels_ask_for_the_gauges_that_training_sets() -> None:
    asked = {target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert asked == {"ray_t2v_loss", *(f"ray_t2v_{name}" for name in GAUGES)}


def test_panels_do_not_overlap_and_take_their_source_from_the_dashboard() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${source}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["source"]
    assert not re.search("https?://", json.dumps(DASHBOARD))
