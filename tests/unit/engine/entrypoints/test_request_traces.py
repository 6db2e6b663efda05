"""What a span says of a request, whose child it is, how it reaches a collector, and what a collector that is gone does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.responses import StreamingResponse

from waybill.engine.entrypoints.request_traces import RequestTraces, otlp_exporter
from waybill.engine.frontend.answer import Answer
from waybill.engine.frontend.sample_request import SampleRequest
from waybill.engine.io_struct import FinishReason, OutputOptions, RequestOutput, RoutedExpertsMeta, SamplingParams

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


def routes(rows: int, dtype: str = "uint16") -> RoutedExpertsMeta:
    return RoutedExpertsMeta(0, rows, 3, [0, 1, 2], 4, dtype, "little", [], "")


def answer_of(rid: str = "r") -> Answer:
    sample = SampleRequest(rid, 0, np.array([1, 2]), SamplingParams(), OutputOptions(return_routed_experts=True))
    return Answer(sample, 3, form="json", token_text=None)


def output(num_new: int, num_all: int, reason: FinishReason | None = None, **fields: Any) -> RequestOutput:
    return RequestOutput("r", "", [7] * num_new, 2, num_all, 1, 5, "v2", 1, reason, **fields)


def observe(traces: RequestTraces, outputs: list[RequestOutput], outcome: str | None = None, rid: str = "r") -> None:
    """As the frontend does."""
    answer = answer_of(rid)
    for one in outputs:
        answer.add(one, None)
        traces.on_output(answer, one)
    traces.on_end(answer, answer.outcome if outcome is None else outcome)


def spans_of(outputs: list[RequestOutput], outcome: str | None = None) -> ReadableSpan:
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter, "served")
    observe(traces, outputs, outcome)
    traces.close()
    (span,) = exporter.get_finished_spans()
    assert traces._progress == {}
    return span


def test_what_a_stream_s_span_says() -> None:
    length = FinishReason("length", length=3)
    span = spans_of(
        [output(1, 1, routed_experts=routes(2)), output(1, 2), output(1, 3, length, routed_experts=routes(5))]
    )
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert span.resource.attributes["service.name"] == "waybill"
    assert span.status.status_code is StatusCode.UNSET
    attributes = dict(span.attributes or {})
    e2e = attributes.pop("gen_ai.latency.e2e")
    assert 0 < attributes.pop("gen_ai.latency.time_to_first_token") < e2e
    assert span.start_time is not None and span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(e2e, abs=1e-6)
    assert attributes == {
        "gen_ai.request.id": "r",
        "gen_ai.request.model": "served",
        "gen_ai.response.model": "served",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.prompt_tokens": 2,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "waybill.outcome": "length",
        "waybill.weight_version": "v2",
        "waybill.dp_rank": 1,
        "waybill.retractions": 5,
        "waybill.routed_experts.rows": 7,
        "waybill.routed_experts.bytes": 7 * 3 * 4 * 2,
        "waybill.latency.time_in_frontend": 0.0,
    }


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_combine_weights_are_bytes_of_the_rows(dtype: str, size: int) -> None:
    end = FinishReason("length", length=1)
    span = spans_of([output(1, 1, end, routed_experts=routes(5), router_weights=routes(5, dtype))])
    attributes = span.attributes or {}
    assert attributes["waybill.routed_experts.rows"] == 5
    assert attributes["waybill.routed_experts.bytes"] == 5 * 3 * 4 * (2 + size)


def test_one_output_in_all_tells_when_the_first_token_came() -> None:
    span = spans_of([output(3, 3, FinishReason("length", length=3), first_token_ago_s=5.0)])
    attributes: Any = span.attributes
    assert attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(
        attributes["gen_ai.latency.e2e"] - 5, abs=1
    )


def test_only_what_is_known_is_said() -> None:
    cancelled = spans_of([], "cancelled").attributes or {}
    assert cancelled["waybill.outcome"] == "cancelled"
    assert not {"gen_ai.response.finish_reasons", "waybill.weight_version"} & cancelled.keys()


def test_a_failure_is_an_error() -> None:
    failed = spans_of([output(1, 1, FinishReason.failed("no text"), routed_experts_error="2 rows are missing")])
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "no text")
    assert (failed.attributes or {})["waybill.routed_experts.error"] == "2 rows are missing"
    assert spans_of([], "error").status.description == "the engine is gone"
    assert spans_of([output(0, 0, FinishReason("abort", message="by its caller"))]).status.is_unset


def app_of(traces: RequestTraces) -> Any:
    """It ends a request in its own task, in that of a stream, or in one that it starts."""
    app = FastAPI()

    @app.get("/whole")
    async def whole() -> str:
        await asyncio.create_task(asyncio.sleep(0.02))
        await asyncio.create_task(asyncio.to_thread(observe, traces, [], "cancelled"))
        return ""

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            await asyncio.sleep(0.02)
            observe(traces, [], "cancelled")
            yield "b"

        return StreamingResponse(pieces())

    return traces.around(app)


@pytest.mark.parametrize("path", ["/whole", "/stream"])
@pytest.mark.parametrize(
    ("headers", "is_child"),
    [
        ({"traceparent": PARENT, "tracestate": "a=b"}, True),
        ({"traceparent": PARENT.replace("01", "00")}, None),
        ({}, False),
        ({"traceparent": "00-nonsense"}, False),
        ({"traceparent": PARENT, "tracestate": "é" * 900 + "=,,=" * 900}, True),
        ({"traceparent": "\xff" * 9000}, False),
        ({"tracestate": "a=b"}, False),
    ],
)
def test_the_caller_s_span_is_the_parent(path: str, headers: dict[str, str], is_child: bool | None) -> None:
    """None: a caller who records nothing has nothing recorded."""
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter, "served")

    async def ask() -> None:
        transport = httpx.ASGITransport(app_of(traces))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
            (await client.get(path, headers=raw)).raise_for_status()

    asyncio.run(ask())
    traces.close()
    spans = exporter.get_finished_spans()
    assert len(spans) == (0 if is_child is None else 1)
    for span in spans:
        assert (span.attributes or {})["waybill.latency.time_in_frontend"] >= 0.02
        if not is_child:
            assert span.parent is None
            continue
        assert span.parent is not None and span.context is not None
        assert (f"{span.parent.span_id:016x}", f"{span.context.trace_id:032x}") == (SPAN_ID, TRACE_ID)


class Collector(ThreadingHTTPServer):
    """Of OTLP over HTTP; it answers when `may_answer`."""

    def __init__(self) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        self.may_answer = threading.Event()
        self.asked = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.server.asked.set()
        self.server.may_answer.wait(20)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collecting(*, answers: bool = True) -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        if answers:
            collector.may_answer.set()
        try:
            yield collector
        finally:
            collector.may_answer.set()
            collector.shutdown()


def test_a_collector_gets_all_spans() -> None:
    with collecting() as collector:
        traces = RequestTraces(otlp_exporter(collector.url), "served")
        for number in range(600):
            observe(traces, [output(1, 1, FinishReason("length", length=1))], rid=f"r{number}")
        traces.close()
        assert {path for path, _ in collector.received} == {"/v1/traces"}
        spans = [
            span
            for _, request in collector.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        rids = {
            item.value.string_value for span in spans for item in span.attributes if item.key == "gen_ai.request.id"
        }
        assert len(spans) == 600 and rids == {f"r{number}" for number in range(600)}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_collector_that_does_not_answer_holds_up_nobody(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded, requests do not wait, and the end has a bound."""
    monkeypatch.setattr("waybill.engine.entrypoints.request_traces.MAX_QUEUED_SPANS", 600)
    with collecting(answers=False) as collector:
        traces = RequestTraces(otlp_exporter(collector.url if is_there else "http://127.0.0.1:9/v1/traces"), "served")
        slowest = 0.0
        for _ in range(2_000):
            began = time.thread_time()
            observe(traces, [], "cancelled")
            slowest = max(slowest, time.thread_time() - began)
        if is_there:
            assert collector.asked.wait(20)
        processor = traces._provider._active_span_processor._span_processors[0]
        assert len(processor._batch_processor._queue) <= 600
        began = time.monotonic()
        traces.close(timeout_s=0.2)
        assert time.monotonic() - began < 5 and slowest < 0.5
