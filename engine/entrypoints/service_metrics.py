"""Prometheus metrics of a server and one log line per request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..frontend.answer import Answer
from ..io_struct import RequestOutput
from .json_log import FIELDS

logger = logging.getLogger(__name__)

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Metric, help and key in the state of the engine, which counts these itself; a scrape reads them.
STATE_GAUGES = (
    ("waybill_running_requests", "Requests on a row of the pool.", "num_running"),
    ("waybill_queued_requests", "Requests that wait to run.", "num_waiting"),
    ("waybill_kv_pages", "Pages of the KV pool.", "num_pages"),
    ("waybill_kv_free_pages", "Pages that hold nothing.", "num_free_pages"),
    ("waybill_kv_cached_pages", "Pages of the prefix cache.", "num_cached_pages"),
    ("waybill_routing_ring_slots", "Steps of routing that may wait to be filed.", "routing_ring_slots"),
    ("waybill_routing_ring_occupied", "Steps of routing that wait to be filed.", "routing_ring_occupied"),
    ("waybill_max_step_seconds", "The longest step so far, from its launch to its result.", "max_step_s"),
    ("waybill_paused", "1 while generation is paused.", "is_paused"),
    ("waybill_route_sessions", "Sessions whose callers' rows are remembered.", "num_route_sessions"),
    ("waybill_route_session_tokens", "Tokens remembered for them.", "num_route_session_tokens"),
    ("waybill_transferring_requests", "Requests on their way between two engines.", "num_transferring"),
    ("waybill_blocked", "1 while the weights are not whole or memory is released.", "is_blocked"),
)
STATE_COUNTERS = (
    ("waybill_retractions", "Requests that gave up their pages.", "num_retractions"),
    ("waybill_generated_tokens", "Tokens made, also of requests that still run.", "num_output_tokens"),
    ("waybill_routed_experts_rows_filed", "Rows that the ledger took in.", "routed_experts_rows_filed"),
    ("waybill_routed_experts_rows_shipped", "Rows sent or kept for a claim.", "routed_experts_rows_shipped"),
    (
        "waybill_routed_experts_bytes_shipped",
        "Their bytes, compact, with those of combine weights.",
        "routed_experts_bytes_shipped",
    ),
    ("waybill_routed_experts_refused", "Answers whose rows were missing.", "routed_experts_refused"),
    (
        "waybill_route_sessions_forgotten",
        "Sessions that made room for others, whose next answer begins at 0.",
        "num_route_sessions_forgotten",
    ),
    ("waybill_routing_ring_waits", "Steps that waited for a free slot of the ring.", "routing_ring_waits"),
    ("waybill_record_waits", "Records that waited for the output processor.", "record_waits"),
    ("waybill_transfers", "Requests whose prompt has gone from one engine to another.", "num_transfers"),
    ("waybill_transfers_failed", "Requests of which that has failed.", "num_transfers_failed"),
    ("waybill_transferred_bytes", "Keys and values that the leaders have sent or received.", "transferred_bytes"),
    (
        "waybill_transferred_shared_bytes",
        "Those of them that went by memory that both sides map.",
        "transferred_shared_bytes",
    ),
    ("waybill_transferred_nixl_bytes", "Those of them that went over NIXL.", "transferred_nixl_bytes"),
    ("waybill_transfer_seconds", "Time that fetches have taken, on a decode's side.", "transfer_seconds"),
    ("waybill_transfer_copy_seconds", "Time of them in which bytes were copied.", "transfer_copy_seconds"),
    ("waybill_outputs_failed", "Requests whose text or rows could not be made.", "outputs_failed"),
    ("waybill_weight_updates", "Complete updates of the weights.", "num_weight_updates"),
    ("waybill_garbage_pause_seconds", "Pauses of Python's collector on the leaders.", "garbage_pause_s"),
)

# Of a server with an encoder.
IMAGE_GAUGES = (
    ("waybill_encoder_up", "Whether the encoder answers.", "is_encoder_up"),
    ("waybill_images_encoding", "Images that the encoder has been asked for.", "num_images_encoding"),
    (
        "waybill_image_room_waiting",
        "Requests that wait for room for their images.",
        "num_waiting_for_image_room",
    ),
    ("waybill_images_kept", "Encoded images in shared memory.", "num_images_kept"),
    ("waybill_image_memory_used_bytes", "Bytes of shared memory that they take.", "image_memory_used_bytes"),
)
IMAGE_COUNTERS = (
    ("waybill_images_encoded", "Images that the encoder has encoded.", "num_images_encoded"),
    ("waybill_images_failed", "Images that it has not, though they may be good.", "num_images_failed"),
    ("waybill_image_encode_seconds", "From asking until the answer, over all images.", "image_encode_seconds"),
)


class EngineStateCollector(Collector):
    """What the engine says of itself, as of the last scrape that reached it; nothing before the first."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.state is None:
            return
        for name, text, key in STATE_GAUGES:
            yield GaugeMetricFamily(name, text, self.state[key])
        for name, text, key in STATE_COUNTERS:
            yield CounterMetricFamily(name, text, self.state[key])
        if "num_images_kept" in self.state:
            for name, text, key in IMAGE_GAUGES:
                yield GaugeMetricFamily(name, text, self.state[key])
            for name, text, key in IMAGE_COUNTERS:
                yield CounterMetricFamily(name, text, self.state[key])
        waits = CounterMetricFamily(
            "waybill_sync_wait_seconds",
            "Time that dp rank `rank` waited for `straggler`, which came last, and why that one was late.",
            labels=["rank", "straggler", "cause"],
        )
        for wait in self.state["sync_waits"]:
            waits.add_metric([str(wait["rank"]), str(wait["straggler"]), wait["cause"]], wait["seconds"])
        yield waits


class ServiceMetrics:
    """A `RequestObserver`; `render` is the body of a scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("waybill_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self._prompt_tokens = Counter("waybill_prompt_tokens", "Prompt tokens of requests.", registry=registry)
        self._cached_tokens = Counter("waybill_cached_tokens", "Prompt tokens found in the cache.", registry=registry)
        self._output_tokens = Counter("waybill_output_tokens", "Tokens generated.", registry=registry)
        self._ttft = Histogram(
            "waybill_time_to_first_token_seconds", "Arrival to first token.", buckets=TTFT_BUCKETS, registry=registry
        )
        self._itl = Histogram(
            "waybill_inter_token_latency_seconds",
            "Between tokens of a stream; for other requests the mean of each.",
            buckets=ITL_BUCKETS,
            registry=registry,
        )
        self._latency = Histogram(
            "waybill_request_latency_seconds", "Arrival to end.", buckets=TTFT_BUCKETS, registry=registry
        )
        self._hit_rate = Gauge(
            "waybill_cache_hit_rate", "Share of prompt tokens found in the cache, since the start.", registry=registry
        )
        self._engine = EngineStateCollector()
        registry.register(self._engine)
        self._last_seen: dict[str, float] = {}
        self._num_prompt = self._num_cached = 0

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        now = time.perf_counter()
        before = self._last_seen.get(answer.rid)
        self._last_seen[answer.rid] = now
        if before is None:
            # A request without streaming has one output, at its end, and no first token of its own.
            if output.finish_reason is None or output.completion_tokens == 1:
                self._ttft.observe(now - answer.began)
        elif output.token_ids:
            self._itl.observe((now - before) / len(output.token_ids))
        if before is None and output.finish_reason is not None and output.completion_tokens > 1:
            self._itl.observe((now - answer.began) / output.completion_tokens)

    def on_end(self, answer: Answer, outcome: str) -> None:
        self._last_seen.pop(answer.rid, None)
        self._requests.labels(outcome).inc()
        seconds = time.perf_counter() - answer.began
        self._latency.observe(seconds)
        self._prompt_tokens.inc(answer.prompt_tokens)
        self._cached_tokens.inc(answer.cached_tokens)
        self._output_tokens.inc(answer.completion_tokens)
        self._num_prompt += answer.prompt_tokens
        self._num_cached += answer.cached_tokens
        fields = {
            "rid": answer.rid,
            "outcome": outcome,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "seconds": round(seconds, 4),
            "routed_experts_error": answer.routed_experts_error,
            "failure": answer.failure,
        }
        logger.info("request ended", extra={FIELDS: fields})

    def on_refusal(self, outcome: str) -> None:
        """A request that never reached the engine."""
        self._requests.labels(outcome).inc()

    def render(self, state: dict[str, Any] | None) -> bytes:
        """The text form; `state` is the engine's, None while it is not there."""
        if state is not None:
            self._engine.state = state
        self._hit_rate.set(self._num_cached / self._num_prompt if self._num_prompt else 0.0)
        return generate_latest(self._registry)
