"""What the router says of itself to Prometheus; the engines have metrics of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .router_sides import Side, Sides

FAMILIES: tuple[tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, Callable[[Side], float]], ...] = (
    (GaugeMetricFamily, "waybill_router_up", "Whether the server is well.", lambda side: not side.problem),
    (GaugeMetricFamily, "waybill_router_running_requests", "Requests there now.", lambda side: side.num_running),
    (CounterMetricFamily, "waybill_router_requests", "Requests sent there.", lambda side: side.num_requests),
    (CounterMetricFamily, "waybill_router_failures", "Those that had no answer.", lambda side: side.num_failures),
)


class SidesCollector(Collector):
    def __init__(self, sides: Sides) -> None:
        self._sides = sides

    def collect(self) -> Iterator[Metric]:
        for make, name, text, value in FAMILIES:
            family = make(name, text, labels=("side", "url"))
            for side in self._sides.all:
                family.add_metric((side.kind, side.url), float(value(side)))
            yield family


def render(sides: Sides) -> bytes:
    registry = CollectorRegistry()
    registry.register(SidesCollector(sides))
    return generate_latest(registry)
