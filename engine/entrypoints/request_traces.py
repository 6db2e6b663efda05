"""OpenTelemetry spans of requests, one a sample, for `--otlp-traces-endpoint`. Needs the extra `tracing`."""

from __future__ import annotations

import os
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from ..frontend.answer import Answer
from ..io_struct import RequestOutput
from ..routing.wire import num_bytes

# vLLM's name for it.
SPAN_NAME = "llm_request"
TRACE_HEADERS = (b"traceparent", b"tracestate")
# Spans that wait for the collector; more are dropped, the oldest first.
MAX_QUEUED_SPANS = 8192
# For what is left at the end.
FLUSH_TIMEOUT_S = 3.0

# When the head of the request had come.
ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)


def otlp_exporter(endpoint: str) -> SpanExporter:
    """OTLP over HTTP, to a URL that is taken as it is. Headers, time-outs, certificates: as `OTEL_EXPORTER_OTLP_*` say."""
    return OTLPSpanExporter(endpoint=endpoint)


@dataclass
class Progress:
    """Of a sample that has an output."""

    last: RequestOutput
    # None while there is no token, and of a request without streaming until its end.
    first_token_at: float | None = None
    num_rows: int = 0
    num_bytes: int = 0


class RequestTraces:
    """A `RequestObserver`. Spans are made when a sample ends, and exported by a thread: a collector that is slow or gone
    costs spans."""

    def __init__(self, exporter: SpanExporter, model_name: str) -> None:
        self._model_name = model_name
        resource = Resource.create({SERVICE_NAME: os.environ.get(OTEL_SERVICE_NAME) or "waybill"})
        # At exit it would wait for its own 30 s.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))
        self._tracer = self._provider.get_tracer("waybill")
        self._progress: dict[str, Progress] = {}

    def on_output(self, answer: Answer, output: RequestOutput) -> None:
        progress = self._progress.get(answer.rid)
        if progress is None:
            progress = self._progress[answer.rid] = Progress(output)
        progress.last = output
        if progress.first_token_at is None and output.token_ids:
            progress.first_token_at = time.perf_counter() - (output.first_token_ago_s or 0.0)
        if output.routed_experts is not None:
            progress.num_rows += output.routed_experts.rows
            progress.num_bytes += num_bytes(output.routed_experts)
        if output.router_weights is not None:
            progress.num_bytes += num_bytes(output.router_weights)

    def on_end(self, answer: Answer, outcome: str) -> None:
        progress = self._progress.pop(answer.rid, None)
        now, now_ns = time.perf_counter(), time.time_ns()
        arrived = ARRIVED.get()
        began = answer.began if arrived is None else arrived
        attributes = {
            "gen_ai.latency.e2e": now - began,
            "waybill.latency.time_in_frontend": answer.began - began,
            "waybill.outcome": outcome,
            **self._of_request(answer),
            **(of_outputs(progress, began) if progress is not None else {}),
        }
        # Its parent is the caller's span, if the request has named one.
        span = self._tracer.start_span(
            SPAN_NAME,
            kind=SpanKind.SERVER,
            start_time=now_ns - int((now - began) * 1e9),
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        if outcome in ("failed", "error"):
            span.set_status(Status(StatusCode.ERROR, answer.failure or "the engine is gone"))
        span.end(now_ns)

    def _of_request(self, answer: Answer) -> dict[str, Any]:
        """Under the names of the semantic conventions, and of vLLM where those are others."""
        return {
            "gen_ai.request.id": answer.rid,
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.output_tokens": answer.completion_tokens,
            "gen_ai.usage.prompt_tokens": answer.prompt_tokens,
            "gen_ai.usage.completion_tokens": answer.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
            "waybill.routed_experts.error": answer.routed_experts_error,
        }

    def on_refusal(self, outcome: str) -> None:
        pass

    def around(self, app: ASGIApp) -> ASGIApp:
        """An application whose requests may have parents."""
        return TraceContext(app)

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Export what is left, as far as the time allows."""
        # Its own bound is longer, and a thread that waits for a collector must not keep the process.
        closing = threading.Thread(target=self._provider.shutdown, name="close traces", daemon=True)
        closing.start()
        closing.join(timeout_s)


def of_outputs(progress: Progress, began: float) -> dict[str, Any]:
    """Attributes of a sample that began at `began`."""
    last, first_at = progress.last, progress.first_token_at
    return {
        "gen_ai.response.finish_reasons": None if last.finish_reason is None else [last.finish_reason.type],
        "gen_ai.latency.time_to_first_token": None if first_at is None else first_at - began,
        "waybill.weight_version": last.weight_version,
        "waybill.dp_rank": last.dp_rank,
        "waybill.retractions": last.num_retractions,
        "waybill.routed_experts.rows": progress.num_rows,
        "waybill.routed_experts.bytes": progress.num_bytes,
    }


class TraceContext:
    """Around an application: what is done for a request knows its parent (W3C `traceparent`) and when it came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"] if name in TRACE_HEADERS
        }
        parent, arrived = attach(self._propagator.extract(headers)), ARRIVED.set(time.perf_counter())
        try:
            await self._app(scope, receive, send)
        finally:
            ARRIVED.reset(arrived)
            detach(parent)
