"""The Grafana dashboard asks for nothing that the server does not export."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from waybill.engine.entrypoints.service_metrics import ServiceMetrics

DASHBOARD = json.loads((Path(__file__).parents[4] / "examples" / "grafana" / "waybill.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """Labels by the name of a sample, of a server whose every family has one."""
    metrics = ServiceMetrics()
    metrics.on_refusal("refused")
    state: dict[str, Any] = defaultdict(int)
    state["sync_waits"] = [{"rank": 0, "straggler": 1, "cause": "prefill", "seconds": 1.0}]
    families = text_string_to_metric_families(metrics.render(state).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_metric_is_exported() -> None:
    names = set(re.findall(r"waybill_\w+", " ".join(EXPRESSIONS)))
    assert len(names) > 20 and names <= exported().keys(), names - exported().keys()
    assert re.findall(r"waybill_\w+", DASHBOARD["templating"]["list"][1]["query"])[0] in exported()


def test_counters_are_asked_for_their_rate_by_labels_that_they_have() -> None:
    labels = exported()
    for expression in EXPRESSIONS:
        grouped = re.search(r"sum by \(([^)]*)\)", expression)
        (name, *_) = re.findall(r"waybill_\w+", expression)
        wanted = set() if grouped is None else set(grouped[1].split(", ")) - {"instance"}
        assert wanted <= labels[name], expression
        if "rate(" in expression:
            assert name.endswith(("_total", "_bucket")), expression


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
