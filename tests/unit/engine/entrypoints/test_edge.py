"""The whole edge over a frontend without an engine: which thread works, who is admitted, how a refusal is worded."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from waybill.engine.config import EngineConfig
from waybill.engine.entrypoints.bodies import BodyReader
from waybill.engine.entrypoints.errors import install_error_handlers
from waybill.engine.entrypoints.native import native_router
from waybill.engine.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from waybill.engine.entrypoints.openai.serving_chat import ChatServing
from waybill.engine.entrypoints.openai.serving_completions import CompletionServing
from waybill.engine.entrypoints.responses import unless_disconnected
from waybill.engine.frontend.chat_template import ChatTemplate
from waybill.engine.frontend.engine_connection import EngineDeadError
from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.request_limits import EngineLimits
from waybill.engine.frontend.request_observer import NoObserver
from waybill.engine.frontend.request_preparation import PreparedRequest
from waybill.engine.frontend.tokenizer_manager import TokenizerManager
from waybill.engine.text.tokenizer_file import load_tokenizer
from waybill.launch.args import EMBEDDED_MODEL

CONTEXT = 200_000
LIMITS = EngineLimits(
    context_length=CONTEXT, kv_cache_tokens=CONTEXT, vocab_size=264, dp_size=1, has_tokenizer=True, routed_experts=False
)
TEMPLATE = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, {})


class Watched:
    """A tokenizer that notes which threads use it."""

    def __init__(self) -> None:
        inner = load_tokenizer(str(EMBEDDED_MODEL))
        assert inner is not None
        self._inner = inner
        self.normalizer, self.decoder, self.to_str = inner.normalizer, inner.decoder, inner.to_str
        self.threads: list[str] = []
        self.hold = threading.Event()
        self.hold.set()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            assert self.hold.wait(30)
            return call(*arguments, **options)

        return watched


class Edge:
    """A manager whose engine never answers, and its routes."""

    def __init__(self, folder: Path, most: int) -> None:
        self.tokenizer = Watched()
        config = EngineConfig(model_path="m", max_running_requests=most - 1, max_waiting_requests=1)
        self.manager = TokenizerManager(
            config,
            self.tokenizer,  # type: ignore[arg-type]
            leaders=[f"ipc://{folder}/leader"],
            frontend=f"ipc://{folder}/frontend",
            queries=[f"ipc://{folder}/queries"],
        )
        self.tokenizer.threads.clear()
        self.manager.limits = LIMITS
        self.manager.facts = {"num_layers": 1, "context_length": CONTEXT}
        self.app = FastAPI()
        install_error_handlers(self.app)
        bodies = BodyReader(self.manager.work_threads, 1 << 18, NoObserver())
        self.app.include_router(native_router(self.manager, bodies))
        chat, completions = ChatServing(self.manager, TEMPLATE, "m"), CompletionServing(self.manager, "m")
        router = APIRouter(route_class=bodies.route_class())

        @router.post("/v1/chat/completions")
        async def create_chat(body: ChatCompletionRequest, http: Request) -> Response:
            return await chat.create(body, http)

        @router.post("/v1/completions")
        async def create_completion(body: CompletionRequest, http: Request) -> Response:
            return await completions.create(body, http)

        self.app.include_router(router)

    @property
    def num_taken(self) -> int:
        return self.manager.num_unfinished


@asynccontextmanager
async def edge(folder: Path, most: int = 4) -> AsyncIterator[tuple[Edge, httpx.AsyncClient]]:
    service = Edge(folder, most)
    transport = httpx.ASGITransport(app=service.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge", timeout=60) as client:
        try:
            yield service, client
        finally:
            service.tokenizer.hold.set()
            service.manager.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


LONG = "ab " * 20_000
LONG_REQUESTS = [
    ("/generate", {"text": LONG, "sampling_params": {"max_new_tokens": CONTEXT}}),
    ("/v1/completions", {"prompt": LONG, "max_tokens": CONTEXT}),
    ("/v1/completions", {"prompt": ["a", LONG], "max_tokens": CONTEXT}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": CONTEXT}),
    ("/tokenize", {"prompt": LONG}),
    ("/detokenize", {"tokens": list(LONG.encode())}),
]


@pytest.mark.parametrize(("path", "body"), LONG_REQUESTS)
def test_long_texts_are_tokenised_and_ids_made_text_on_threads(path: str, body: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            reply = await client.post(path, json=body)
            # Those that generate ask for more than there is room for, which is known after tokenising.
            assert reply.status_code == (200 if path.endswith("tokenize") else 400), reply.text
            pools = [name for name in service.tokenizer.threads if name.startswith(("short work", "long work"))]
            assert pools and len(pools) == len(service.tokenizer.threads), service.tokenizer.threads
            assert service.num_taken == 0

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_what_cannot_fit_is_refused_untokenised_by_the_name_it_has(path: str, tmp_path: Path) -> None:
    text = "x" * 4_000_000
    field, body = {
        "/generate": ("text", {"text": text}),
        "/v1/completions": ("prompt", {"prompt": text}),
        "/v1/chat/completions": ("messages", {"messages": [{"role": "user", "content": text}]}),
        "/tokenize": ("prompt", {"prompt": text}),
    }[path]

    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            reply = await client.post(path, json=body)
            error = reply.json()["error"]
            assert reply.status_code == 400 and "the prompt has 4000000 characters, so at least" in error["message"]
            assert error["param"] == field
            assert not service.tokenizer.threads and service.num_taken == 0

    asyncio.run(run())


def test_requests_in_preparation_and_at_the_gate_count(tmp_path: Path) -> None:
    """A bound of 4: two wait for the tokenizer, two for an update, and the fifth is told to come back."""

    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            gate = service.manager._gate
            async with gate.closed(drain=False):
                at_gate = [asyncio.ensure_future(client.post("/generate", json={"input_ids": [5]})) for _ in range(2)]
                await until(lambda: service.num_taken == 2)
                service.tokenizer.hold.clear()
                preparing = [asyncio.ensure_future(client.post("/generate", json={"text": LONG})) for _ in range(2)]
                await until(lambda: service.num_taken == 4)
                for stream in (False, True):
                    reply = await client.post("/generate", json={"input_ids": [5], "stream": stream})
                    assert reply.status_code == 503 and "at most 4" in reply.json()["error"]["message"]
                # Whoever leaves gives its place back.
                preparing[0].cancel()
                at_gate[0].cancel()
                await until(lambda: service.num_taken == 2)
                service.tokenizer.hold.set()
                # What became of the engine meanwhile is told to those that still wait.
                service.manager.fail_all("the engine is gone")
            replies = await asyncio.gather(at_gate[1], preparing[1])
            assert [reply.status_code for reply in replies] == [503, 503]
            assert service.num_taken == 0

    asyncio.run(run())


def test_a_stream_that_never_begins_gives_its_places_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with edge(tmp_path) as (service, _):
            scope = {
                **{"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "http_version": "1.1"},
                "headers": [(b"content-type", b"application/json")],
            }
            body = json.dumps({"input_ids": [5], "stream": True}).encode()
            messages = [{"type": "http.request", "body": body}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await asyncio.Event().wait()

            async def send(_: Any) -> None:
                raise OSError("the client is gone")

            with pytest.raises(OSError, match="gone"):
                await service.app(scope, receive, send)  # type: ignore[arg-type]
            assert service.num_taken == 0

    asyncio.run(run())


def test_the_death_of_the_engine_while_a_text_is_tokenised(tmp_path: Path) -> None:
    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            service.tokenizer.hold.clear()
            asking = asyncio.ensure_future(client.post("/generate", json={"text": LONG}))
            await until(lambda: bool(service.tokenizer.threads))
            service.manager.fail_all("the engine is gone")
            service.tokenizer.hold.set()
            reply = await asking
            assert reply.status_code == 503 and reply.json()["error"]["message"] == "the engine is gone"
            with pytest.raises(EngineDeadError):
                await service.manager.prepare(None)  # type: ignore[arg-type]

    asyncio.run(run())


CHAT = {"messages": [{"role": "user", "content": "a"}]}
RENAMED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "a", "seed": -2}, "seed"),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, "seed"),
    ("/v1/completions", {"prompt": "a", "max_tokens": CONTEXT}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "min_tokens": -1}, "min_tokens"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
    ("/v1/completions", {"prompt": "a", "top_k": -2}, "top_k"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, "stop"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 65}, "stop"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "n": 5}, "n"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [999]}, "prompt"),
    ("/v1/completions", {"prompt": [[1], [999]]}, "prompt"),
    ("/v1/completions", {"prompt": "a", "routed_dp_rank": 7}, "routed_dp_rank"),
    ("/v1/completions", {"prompt": "a", "return_routed_experts": True}, "return_routed_experts"),
    ("/v1/chat/completions", {**CHAT, "seed": -2}, "seed"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": CONTEXT}, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_completion_tokens": CONTEXT, "max_tokens": 1}, "max_completion_tokens"),
    ("/v1/chat/completions", {**CHAT, "min_tokens": 5, "max_completion_tokens": 4}, "min_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages"),
    ("/v1/chat/completions", {"input_ids": [999]}, "input_ids"),
    ("/v1/chat/completions", {"input_ids": []}, "input_ids"),
]
NATIVE = ("sampling", "max_new_tokens", "min_new_tokens", "text:", "top_logprobs_num")


@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors_name_openai_fields(stream: bool, tmp_path: Path) -> None:
    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            for path, body, field in RENAMED:
                reply = await client.post(path, json={**body, "stream": stream})
                in_band = stream and reply.status_code == 200
                assert in_band or reply.status_code == 400, (body, reply.text)
                error = json.loads(reply.text.split("\n")[0].removeprefix("data: "))["error"]
                assert error["param"] == field, (body, error)
                assert not any(name in error["message"] for name in NATIVE), error
                if field != "n":
                    assert field in error["message"] or "the prompt" in error["message"], error
            assert service.num_taken == 0

    asyncio.run(run())


def test_names_of_aborts_are_bounded_and_fields_known(tmp_path: Path) -> None:
    async def run() -> None:
        async with edge(tmp_path) as (service, client):
            sent: list[Any] = []
            service.manager._connection.link.send_to_all = sent.append  # type: ignore[method-assign]
            for body, words in (
                ({"rid": "x" * 2_000}, "rid: String should have at most 528 characters"),
                ({"rid": "a", "colour": 1}, "colour: is no field"),
                ({"rid": ""}, "rid: must not be empty"),
                ({"rid": ["a"]}, "rid: Input should be a valid string"),
            ):
                reply = await client.post("/abort_request", json=body)
                assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
            assert not sent
            assert (await client.post("/abort_request", json={"rid": "x" * 528})).status_code == 200
            assert len(sent) == 1
            with pytest.raises(ValueError, match="rid: has 1000 characters, must have at most 528"):
                service.manager.abort_request("x" * 1000)

    asyncio.run(run())


def test_places_that_nobody_takes_any_more_are_given_back(tmp_path: Path) -> None:
    """A handler is cancelled in the moment in which its request is prepared."""

    async def run() -> None:
        async with edge(tmp_path) as (service, _):
            prepared = asyncio.Event()

            async def prepare() -> PreparedRequest:
                request = parse_generate_request({"input_ids": [5]})
                try:
                    return await service.manager.prepare(request)
                finally:
                    prepared.set()
                    handler.cancel()

            async def receive() -> Any:
                await asyncio.Event().wait()

            http = Request({"type": "http", "headers": []}, receive)
            handler = asyncio.ensure_future(unless_disconnected(http, prepare(), PreparedRequest.release))
            await asyncio.gather(handler, return_exceptions=True)
            assert handler.cancelled() and prepared.is_set() and service.num_taken == 0

    asyncio.run(run())
