"""What the frontend does about requests that fail behind the engine, ends that nobody knows, and what it cannot read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq
from fastapi import FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from waybill.engine.config import EngineConfig
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.native import native_router
from waybill.engine.entrypoints.request_traces import RequestTraces
from waybill.engine.frontend.answer import GenerationError
from waybill.engine.frontend.engine_connection import EngineDeadError
from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.request_observer import RequestObserver
from waybill.engine.frontend.tokenizer_manager import TokenizerManager
from waybill.engine.io_struct import FinishReason, OutputBatch, RequestOutput
from waybill.engine.ipc.frontend_messages import AbortReq, ControlReply, FrontendMessage, TokenizedGenerateReqInput
from waybill.engine.ipc.sockets import Receiver

WAIT_S = 20.0
FACTS = {"context_length": 100, "kv_cache_tokens": 100, "vocab_size": 100, "num_layers": 1}


def output(rid: str, **fields: object) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        text="",
        token_ids=[1],
        prompt_tokens=1,
        completion_tokens=1,
        cached_tokens=0,
        num_retractions=0,
        weight_version="v",
        dp_rank=0,
        **fields,
    )


class Wiring:
    """A manager that is ready, and the sockets of the engine behind it."""

    def __init__(self, folder: Path, observer: RequestObserver | None = None, **options: Any) -> None:
        self.context = zmq.Context()
        self.leader: Receiver[FrontendMessage] = Receiver(self.context, f"ipc://{folder}/leader", FrontendMessage)
        self.failures: list[str] = []
        self.manager = TokenizerManager(
            EngineConfig(model_path="m", **options),
            None,
            leaders=[f"ipc://{folder}/leader"],
            frontend=f"ipc://{folder}/frontend",
            queries=[f"ipc://{folder}/queries"],
            observer=observer,
            on_failure=self.failures.append,
        )
        self.outputs = self.context.socket(zmq.PUSH)
        self.outputs.connect(f"ipc://{folder}/frontend")
        self.queries = self.context.socket(zmq.ROUTER)
        self.queries.bind(f"ipc://{folder}/queries")

    def say(self, message: object, *frames: bytes) -> None:
        self.outputs.send_multipart([msgspec.msgpack.encode(message), *frames])

    async def hear(self) -> FrontendMessage:
        async with asyncio.timeout(WAIT_S):
            while True:
                if (message := self.leader.receive_nowait()) is not None:
                    return message
                await asyncio.sleep(0.01)

    def close(self) -> None:
        self.manager.close()
        self.leader.close()
        self.context.destroy(linger=0)


def with_wiring(
    folder: Path, check: Callable[[Wiring], Awaitable[None]], observer: RequestObserver | None = None, **options: Any
) -> None:
    async def run() -> None:
        wiring = Wiring(folder, observer, **options)
        wiring.say(ControlReply("ready", True, state=FACTS))
        await wiring.manager.start(WAIT_S)
        try:
            async with asyncio.timeout(WAIT_S):
                await check(wiring)
        finally:
            wiring.close()

    asyncio.run(run())


def ask(wiring: Wiring, rid: str) -> asyncio.Task[object]:
    request = parse_generate_request({"input_ids": [1, 2], "rid": rid})

    async def first() -> object:
        return await anext(wiring.manager.generate(request))

    return asyncio.create_task(first())


def test_a_request_that_fails_behind_the_engine_is_aborted_there_and_its_rid_is_free_later(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        answer = ask(wiring, "a")
        assert isinstance(await wiring.hear(), TokenizedGenerateReqInput)
        failed = FinishReason.failed("no text")
        wiring.say(OutputBatch([output("a", finish_reason=failed, is_at_engine=True)]))
        with pytest.raises(GenerationError, match="no text"):
            await answer
        abort = await wiring.hear()
        assert isinstance(abort, AbortReq) and (abort.rid, abort.exact) == ("a", True)
        # On another dp rank it could begin before it has ended on this one.
        with pytest.raises(ValueError, match="in use by a request that has not finished"):
            await ask(wiring, "a")
        witness = ask(wiring, "b")
        await wiring.hear()
        wiring.say(OutputBatch([output("b", finish_reason=FinishReason("length", length=1))], ["a"]))
        await witness
        again = ask(wiring, "a")
        message = await wiring.hear()
        assert isinstance(message, TokenizedGenerateReqInput) and message.seq > abort.seq
        wiring.say(OutputBatch([output("a", finish_reason=FinishReason("length", length=1))]))
        assert (await again)["meta_info"]["finish_reason"]["type"] == "length"
        assert wiring.failures == []

    with_wiring(tmp_path, check)


def test_many_samples_of_a_long_prompt_are_sent_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between them others have their turn; and a caller who leaves meanwhile leaves no load behind on the rank."""
    monkeypatch.setattr("waybill.engine.frontend.in_flight_requests.MAX_SENT_BYTES", 12)

    async def check(wiring: Wiring) -> None:
        request = parse_generate_request({"input_ids": [1, 2], "sampling_params": {"n": 5, "temperature": 1.0}})
        answers = asyncio.create_task(anext(wiring.manager.generate(request)))
        counts = []
        while len(wiring.manager._at_engine) < 4:
            await asyncio.sleep(0)
            counts.append(len(wiring.manager._at_engine))
        assert {2, 4} <= set(counts) <= {0, 2, 4}
        assert wiring.manager._at_engine._dp_router.load == [5]
        answers.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answers
        assert wiring.manager._at_engine._dp_router.load == [4], "those that were sent"
        assert wiring.manager.num_unfinished == 0

    with_wiring(tmp_path, check)


def test_an_end_of_a_request_that_nobody_knows_harms_nobody(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        answer = ask(wiring, "a")
        await wiring.hear()
        finish = FinishReason("length", length=1)
        wiring.say(OutputBatch([output("unknown", finish_reason=finish), output("a", finish_reason=finish)]))
        assert (await answer)["meta_info"]["id"] == "a"
        assert wiring.failures == []

    with_wiring(tmp_path, check)


def malformed_output(wiring: Wiring) -> None:
    wiring.outputs.send(b"\xc1")


def frames_without_an_owner(wiring: Wiring) -> None:
    wiring.say(OutputBatch([output("a")]), b"rows")


def out_of_memory(wiring: Wiring) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    wiring.manager._at_engine.end = fail  # type: ignore[method-assign]
    wiring.say(OutputBatch([output("a", finish_reason=FinishReason("length", length=1))]))


@pytest.mark.parametrize("fault", [malformed_output, frames_without_an_owner, out_of_memory])
def test_a_task_that_fails_is_noticed_and_every_caller_told(tmp_path: Path, fault: Callable[[Wiring], None]) -> None:
    async def check(wiring: Wiring) -> None:
        answer, state = ask(wiring, "a"), asyncio.create_task(wiring.manager.get_state())
        await wiring.hear()
        fault(wiring)
        for waiting in (answer, state):
            with pytest.raises(EngineDeadError, match="'receive outputs' has failed"):
                await waiting
        assert "'receive outputs' has failed" in str(wiring.manager.not_ready()), "what /health says"
        with pytest.raises(EngineDeadError):
            await ask(wiring, "later")
        assert len(wiring.failures) == 1

    with_wiring(tmp_path, check)


def test_a_malformed_reply_of_an_output_processor_is_noticed_too(tmp_path: Path) -> None:
    async def check(wiring: Wiring) -> None:
        fetch = asyncio.create_task(wiring.manager.queries.fetch_routed_experts("c"))
        while not wiring.queries.poll(0):
            await asyncio.sleep(0.01)
        identity, _ = wiring.queries.recv_multipart()
        wiring.queries.send_multipart([identity, b"\xc1"])
        with pytest.raises(EngineDeadError, match="'receive replies' has failed"):
            await fetch
        assert len(wiring.failures) == 1

    with_wiring(tmp_path, check)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_http_has_a_span_below_its_caller_s(tmp_path: Path, stream: bool) -> None:
    """The way through body, preparation, engine and answer keeps the parent, in one span for each sample."""
    exporter = InMemorySpanExporter()
    traces = RequestTraces(exporter, "served")
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

    async def check(wiring: Wiring) -> None:
        app = FastAPI()
        app.include_router(native_router(wiring.manager, BodyReader(wiring.manager.work_threads, 1000, traces)))
        body = {"input_ids": [1, 2], "rid": "a", "stream": stream, "sampling_params": {"n": 2}}
        headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
        transport = httpx.ASGITransport(traces.around(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            answer = asyncio.create_task(client.post("/generate", json=body, headers=headers))
            for rid in ("a_0", "a_1"):
                await wiring.hear()
                wiring.say(OutputBatch([output(rid, finish_reason=FinishReason("length", length=1))]))
            assert (await answer).status_code == 200

    with_wiring(tmp_path, check, traces)
    traces.close()
    spans = exporter.get_finished_spans()
    assert {span.attributes["gen_ai.request.id"] for span in spans if span.attributes} == {"a_0", "a_1"}
    assert {(f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") for span in spans if span.parent} == {
        (trace_id, span_id)
    }


@pytest.mark.parametrize(
    ("side", "needs"),
    [
        ("none", "an engine that is started with --encoder HOST:PORT$"),
        ("prefill", "--encoder HOST:PORT on both sides, and the prefill's has none$"),
        ("decode", "--encoder HOST:PORT on both sides, and the decode's has none$"),
    ],
)
def test_images_without_an_encoder_are_refused_with_what_lacks(tmp_path: Path, side: str, needs: str) -> None:
    async def check(wiring: Wiring) -> None:
        request = parse_generate_request({"input_ids": [1, 2], "image_data": "aGk="})
        with pytest.raises(ValueError, match=f"image_data: images need {needs}"):
            await wiring.manager.prepare(request)
        assert wiring.manager.num_unfinished == 0

    with_wiring(tmp_path, check, disaggregation=side)
