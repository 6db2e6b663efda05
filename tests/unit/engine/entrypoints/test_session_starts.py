"""`routed_experts_start_len: "auto"` over HTTP, in every API: an answer begins where what was sent to its session ended."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import zmq
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from waybill.engine.config import EngineConfig
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.native import native_router
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest
from waybill.engine.entrypoints.openai.serving_chat import ChatServing
from waybill.engine.entrypoints.responses import EventStream, PiecewiseResponse
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.tokenizer_manager import TokenizerManager
from waybill.engine.io_struct import FinishReason, OutputBatch, RequestOutput
from waybill.engine.ipc.frontend_messages import ControlReply, FrontendMessage, TokenizedGenerateReqInput
from waybill.engine.ipc.sockets import Receiver
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import encode

WAIT_S = 20.0
GEOMETRY = RouteGeometry(layer_ids=(1,), num_layers_total=2, max_tokens=8, top_k=2, num_experts=256)
FACTS = {"context_length": 100, "kv_cache_tokens": 100, "vocab_size": 100, "num_layers": 2}
ASKED = {"session_id": "s", "return_routed_experts": True, "routed_experts_start_len": "auto"}
NEW = 3


def rows_of(tokens: list[int]) -> np.ndarray:
    """[len(tokens), 1, 2]: row i is a function of the tokens up to i."""
    sums = np.cumsum(np.array(tokens) + 1)
    return np.stack([sums % 251, (3 * sums + 1) % 251], axis=-1).astype(np.uint8)[:, None]


class FakeEngine:
    """Answers every request with three tokens and the rows from where it says, in one output."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._leader: Receiver[FrontendMessage] = Receiver(self._context, f"ipc://{folder}/leader", FrontendMessage)
        self._outputs = self._context.socket(zmq.PUSH)
        self._outputs.connect(f"ipc://{folder}/frontend")

    def say(self, message: object, *frames: Any) -> None:
        self._outputs.send_multipart([msgspec.msgpack.encode(message), *frames])

    async def run(self) -> None:
        while True:
            message = self._leader.receive_nowait()
            if isinstance(message, TokenizedGenerateReqInput):
                self._answer(message)
            await asyncio.sleep(0 if message is not None else 0.002)

    def _answer(self, asked: TokenizedGenerateReqInput) -> None:
        prompt = np.frombuffer(asked.input_ids, "<i4").tolist()
        output = [7, 8, asked.sampling_params.sampling_seed % 50]
        start = asked.output_options.routed_experts_start_len
        routed = encode(rows_of(prompt + output)[start:-1], start, GEOMETRY, [("v", start, len(prompt) + NEW - 1)])
        message = RequestOutput(
            rid=asked.rid,
            text="",
            token_ids=output,
            prompt_tokens=len(prompt),
            completion_tokens=NEW,
            cached_tokens=0,
            num_retractions=0,
            weight_version="v",
            dp_rank=0,
            finish_reason=FinishReason("length", length=NEW),
            routed_experts=routed.meta,
        )
        self.say(OutputBatch([message]), routed.frame)

    def close(self) -> None:
        self._leader.close()
        self._context.destroy(linger=0)


def make_service(manager: TokenizerManager) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    bodies = BodyReader(manager.work_threads, 1 << 18, NoObserver())
    app.include_router(native_router(manager, bodies))
    chat, router = ChatServing(manager, None, "m"), APIRouter(route_class=bodies.route_class())

    @router.post("/v1/chat/completions")
    async def create_chat(body: ChatCompletionRequest, http: Request) -> Response:
        return await chat.create(body, http)

    app.include_router(router)
    return app


def with_service(
    folder: Path, check: Callable[[httpx.AsyncClient, TokenizerManager], Awaitable[None]], **options: Any
) -> None:
    async def run() -> None:
        manager = TokenizerManager(
            EngineConfig(model_path="m", enable_return_routed_experts=True, **options),
            None,
            leaders=[f"ipc://{folder}/leader"],
            frontend=f"ipc://{folder}/frontend",
            queries=[f"ipc://{folder}/queries"],
        )
        engine = FakeEngine(folder)
        engine.say(ControlReply("ready", True, state=FACTS))
        await manager.start(WAIT_S)
        running = asyncio.create_task(engine.run())
        transport = httpx.ASGITransport(app=make_service(manager))
        try:
            async with asyncio.timeout(WAIT_S), httpx.AsyncClient(transport=transport, base_url="http://edge") as http:
                await check(http, manager)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            manager.close()
            engine.close()

    asyncio.run(run())


def rows_in(routes: dict[str, Any]) -> tuple[int, np.ndarray]:
    """Where the rows of an answer in the compact form begin, and they."""
    rows = np.frombuffer(base64.b64decode(routes["routed_experts"]), np.uint8).reshape(-1, 1, 2)
    assert routes["routed_experts_start_len"] == routes["routed_experts_meta"]["start"]
    return routes["routed_experts_start_len"], rows


async def native(http: httpx.AsyncClient, prompt: list[int], **fields: Any) -> Any:
    params = {"max_new_tokens": NEW, **fields.pop("sampling_params", {})}
    asked = {**ASKED, "input_ids": prompt, "routed_experts_format": "compact", "sampling_params": params, **fields}
    reply = await http.post("/generate", json=asked)
    assert reply.status_code == 200, reply.text
    if not asked.get("stream"):
        return reply.json()
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    return json.loads(events[-2])


def check_rows(routes: dict[str, Any], tokens: list[int], start: int) -> None:
    assert rows_in(routes)[0] == start
    assert np.array_equal(rows_in(routes)[1], rows_of(tokens)[start:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_turns_edits_and_branches_begin_where_the_session_has_rows(tmp_path: Path, stream: bool) -> None:
    async def check(http: httpx.AsyncClient, manager: TokenizerManager) -> None:
        first = await native(http, [1, 2, 3, 4], stream=stream)
        one = [1, 2, 3, 4, *first["output_ids"]]
        check_rows(first["meta_info"], one, 0)
        second = await native(http, [*one, 5, 6], stream=stream)
        check_rows(second["meta_info"], [*one, 5, 6, *second["output_ids"]], len(one) - 1)
        edited = await native(http, [1, 2, 9, 9], stream=stream)
        check_rows(edited["meta_info"], [1, 2, 9, 9, *edited["output_ids"]], 2)
        again = await native(http, [1, 2, 3, 4], stream=stream)
        check_rows(again["meta_info"], [1, 2, 3, 4, *again["output_ids"]], 3)
        other = await native(http, [1, 2, 3, 4], stream=stream, session_id="other")
        assert rows_in(other["meta_info"])[0] == 0
        stated = await native(http, [*one, 5], stream=stream, routed_experts_start_len=1)
        assert rows_in(stated["meta_info"])[0] == 1
        assert manager._sessions.counters()["num_route_sessions"] == 2

    with_service(tmp_path, check)


def test_choices_refer_to_the_rows_of_the_first(tmp_path: Path) -> None:
    async def check(http: httpx.AsyncClient, manager: TokenizerManager) -> None:
        await native(http, [1, 2, 3])
        answers = await native(http, [1, 2, 3, 4, 5, 6], sampling_params={"n": 3})
        for index, answer in enumerate(answers):
            tokens = [1, 2, 3, 4, 5, 6, *answer["output_ids"]]
            check_rows(answer["meta_info"], tokens, 5 if index else 3)
            prefix = answer["meta_info"].get("routed_experts_prefix")
            assert prefix == ({"choice": 0, "start": 3, "end": 5} if index else None)
        # Every choice is a branch that may be continued.
        for answer in answers:
            tokens = [1, 2, 3, 4, 5, 6, *answer["output_ids"]]
            assert rows_in((await native(http, [*tokens, 1]))["meta_info"])[0] == len(tokens) - 1

    with_service(tmp_path, check)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_has_it_too(tmp_path: Path, stream: bool) -> None:
    async def check(http: httpx.AsyncClient, manager: TokenizerManager) -> None:
        async def ask(prompt: list[int], n: int = 1) -> dict[str, Any]:
            body = {**ASKED, "input_ids": prompt, "max_tokens": NEW, "stream": stream, "n": n}
            reply = await http.post("/v1/chat/completions", json={**body, "routed_experts_format": "compact"})
            assert reply.status_code == 200, reply.text
            if not stream:
                return reply.json()
            return json.loads([line for line in reply.text.splitlines() if line][-2].removeprefix("data: "))

        assert rows_in((await ask([1, 2, 3, 4]))["sglext"])[0] == 0
        assert rows_in((await ask([1, 2, 3, 4]))["sglext"])[0] == 3
        both = await ask([1, 2, 3, 4, 5, 6], n=2)
        choices = both["sglext"]["choices"] if stream else [choice["sglext"] for choice in both["choices"]]
        assert choices[1]["routed_experts_prefix"] == {"choice": 0, "start": 4, "end": 5}
        assert [rows_in(choice)[0] for choice in choices] == [4, 5]

    with_service(tmp_path, check)


def test_without_a_session_or_by_reference_it_is_refused(tmp_path: Path) -> None:
    async def check(http: httpx.AsyncClient, manager: TokenizerManager) -> None:
        for fields, words in (
            ({"session_id": None}, "needs session_id"),
            ({"routed_experts_delivery": "reference"}, "needs routed_experts_delivery='inline'"),
            ({"routed_experts_start_len": "self"}, "routed_experts_start_len"),
        ):
            reply = await http.post("/generate", json={**ASKED, "input_ids": [1], **fields})
            assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
            assert reply.json()["error"]["param"] == "routed_experts_start_len"
        named = {"X-SMG-Routing-Key": "s"}
        body = {**ASKED, "session_id": None, "input_ids": [1, 2], "sampling_params": {"max_new_tokens": NEW}}
        starts = [
            (await http.post("/generate", json=body, headers=named)).json()["meta_info"]["routed_experts_start_len"]
            for _ in range(2)
        ]
        assert starts == [0, 1]

    with_service(tmp_path, check)


def test_a_forgotten_session_has_a_larger_answer(tmp_path: Path) -> None:
    async def check(http: httpx.AsyncClient, manager: TokenizerManager) -> None:
        await native(http, [1, 2, 3, 4])
        await native(http, [1, 2, 3, 4], session_id="other")
        answer = await native(http, [1, 2, 3, 4])
        check_rows(answer["meta_info"], [1, 2, 3, 4, *answer["output_ids"]], 0)
        assert manager._sessions.counters()["num_route_sessions_forgotten"] == 2

    with_service(tmp_path, check, route_sessions=1)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_an_answer_counts_when_it_was_sent_to_a_client_that_is_there(kind: str, leaves: bool) -> None:
    sent: list[bytes] = []
    told: list[int] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if leaves and message.get("body"):
            gone.set()
        # The transport waits for its client.
        await asyncio.sleep(0)

    async def events() -> Any:
        for number in range(3):
            yield number
            await asyncio.sleep(0.01)

    def on_sent() -> None:
        told.append(len(b"".join(sent)))

    response = (
        PiecewiseResponse(b"body", on_sent=on_sent)
        if kind == "whole"
        else EventStream(events(), lambda error: {}, on_sent=on_sent)
    )
    asyncio.run(response({"type": "http", "headers": []}, receive, send))  # type: ignore[arg-type]
    if leaves:
        assert told == []
    else:
        # Before the end, so that whatever the client asks next comes later.
        assert told == [len(b"".join(sent)) - len(b"" if kind == "whole" else b"data: [DONE]\n\n")]


def test_a_stream_that_ends_with_an_error_does_not_count() -> None:
    async def events() -> Any:
        yield {}
        raise ValueError("enough")

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        pass

    told: list[int] = []
    stream = EventStream(events(), lambda error: {}, on_sent=lambda: told.append(1))
    asyncio.run(stream({"type": "http", "headers": []}, receive, send))  # type: ignore[arg-type]
    assert told == []
