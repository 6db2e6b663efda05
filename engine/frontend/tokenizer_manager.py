"""The frontend's half of a request: text to ids, one queue per request, aborts, control operations.

It lives on one asyncio loop. It holds no model and no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

from ..config import EngineConfig
from ..control.blocked import Blocked
from ..ipc.frontend_messages import ABORTED, AbortReq, ShutdownReq
from ..ipc.sockets import Endpoint
from ..text.tokenizer_file import why_no_tokenizer
from ..validation.field_error import FieldError
from ..validation.request_model import MAX_NAME_CHARS
from .admission import Admission
from .answer import Answer, GenerationError, RoutesForm
from .dp_router import DpRouter
from .engine_connection import EngineConnection, EngineDeadError, EngineStartError
from .engine_controls import EngineControls
from .engine_queries import EngineQueries
from .generate_request import GenerateReqInput
from .generation_gate import GenerationGate, UnavailableError
from .grammar_checks import GrammarChecks
from .in_flight_requests import InFlightRequests
from .pending_outputs import Event, PendingOutputs
from .prompt_images import PromptImages
from .request_limits import EngineLimits
from .request_observer import NoObserver, RequestObserver
from .request_preparation import PreparedRequest, RequestPreparation
from .sample_request import SampleRequest
from .session_routes import SessionRoutes
from .text_codec import TextCodec
from .waiting_requests import WaitingRequests, aborted_output
from .work_threads import WorkThreads

READY_OP = "ready"
# Callers of an abort wait for an answer, and ask again after some seconds.
ABORT_TIMEOUT_S = 5.0
# A sample of a batch has a longer name than its request.
MAX_RID_CHARS = MAX_NAME_CHARS + 16


class TokenizerManager:
    """Sends requests to the engine and gives every caller its own answer back.

    `on_failure` is told when a task that receives has failed: all callers have an error by then, `not_ready` says why, and
    nothing comes back any more, so that whoever owns the process is to end the engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        *,
        leaders: Sequence[Endpoint | str],
        frontend: Endpoint | str,
        queries: Sequence[Endpoint | str],
        encoder: Endpoint | None = None,
        observer: RequestObserver | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.text = TextCodec(tokenizer, why_no_tokenizer(config.tokenizer_path or config.model_path))
        self._connection = EngineConnection(leaders=leaders, frontend=frontend, queries=queries)
        link, replies, dp_router = self._connection.link, self._connection.replies, DpRouter(config.dp_size)
        self._gate = GenerationGate(config.weight_sync_timeout_s, lambda: len(self._at_engine))
        self._at_engine = InFlightRequests(link, dp_router, self._gate)
        self._waiting = WaitingRequests(self._gate)
        self.outputs = PendingOutputs(self._at_engine)
        self._observer: RequestObserver = observer or NoObserver()
        self.work_threads = WorkThreads()
        admission = Admission(config.max_running_requests + config.max_waiting_requests)
        self._grammars = GrammarChecks(config.tokenizer_path or config.model_path)
        self._sessions = SessionRoutes(config.route_sessions, config.route_session_tokens)
        self._preparation = RequestPreparation(
            self.text, self.work_threads, admission, self._observer, self._grammars, self._sessions, self._waiting
        )
        self.controls = EngineControls(config, link, replies, self._gate, dp_router, self._waiting)
        self.queries = EngineQueries(self._connection, queries, config.dp_size)
        self._encoder = encoder
        self._death: EngineDeadError | None = None
        self._on_failure = on_failure
        self.facts: dict[str, int | float | str] = {}
        self.limits: EngineLimits | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, timeout_s: float) -> None:
        """Wait until the engine is ready.

        Raises:
            EngineStartError: it refused to start.
            EngineDeadError: its processes ended.
            TimeoutError: it was not ready within `timeout_s`.
        """
        ready = self._connection.replies.expect(READY_OP)
        self._connection.start(on_outputs=self.outputs.deliver, on_failure=self._fail)
        reply = await asyncio.wait_for(ready, timeout_s)
        if not reply.success:
            raise EngineStartError(reply.message)
        self.facts = reply.state
        self.limits = EngineLimits(
            context_length=int(reply.state["context_length"]),
            kv_cache_tokens=int(reply.state["kv_cache_tokens"]),
            vocab_size=int(reply.state["vocab_size"]),
            dp_size=self.config.dp_size,
            has_tokenizer=self.text.is_there,
            routed_experts=self.config.enable_return_routed_experts,
            router_weights=self.config.enable_return_router_weights,
            special_tokens=self.text.special_tokens,
            disaggregation=self.config.disaggregation,
            bootstrap_port=self.config.disaggregation_bootstrap_port,
            bootstrap_hosts=self.config.disaggregation_allowed_hosts or (),
            image_token_id=None if self._encoder is None else int(self.facts["image_token_id"]),
        )
        if self._encoder is not None:
            self._preparation.images = PromptImages.start(self.config, self._encoder, self.facts, self.work_threads)

    def _fail(self, reason: str) -> None:
        self.fail_all(reason)
        if self._on_failure is not None:
            self._on_failure(reason)

    def fail_all(self, reason: str) -> None:
        """The engine is gone: every waiting caller gets an error now, later ones at once."""
        self._death = EngineDeadError(reason)
        self.outputs.fail_all(self._death)
        self._connection.replies.fail_all(self._death)
        self._gate.fail_all(self._death)

    async def stop_engine(self) -> None:
        """Ask the ranks to leave after the step in flight."""
        self._connection.link.send_to_all(ShutdownReq)

    @property
    def images(self) -> PromptImages | None:
        """None where there is no encoder, or not yet."""
        return self._preparation.images

    def close(self) -> None:
        if self.images is not None:
            self.images.close()
        self.work_threads.close()
        self._grammars.close()
        self._connection.close()

    # --- generation -------------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Samples that run, wait or are prepared."""
        return self._preparation.num_held

    async def prepare(self, request: GenerateReqInput) -> PreparedRequest:
        """A request's samples, checked against the engine, with permits for them.

        Raises:
            ValueError: it does not fit; the message names the field and its range.
            OverloadedError, UnavailableError, EngineDeadError.
        """
        assert self.limits is not None, "start was not awaited"
        if self._death is not None:
            raise self._death
        if self._gate.refusal is not None:
            raise UnavailableError(self._gate.refusal)
        prepared = await self._preparation.prepare(request, self.limits)
        try:
            self._check_rids(prepared.samples)
        except ValueError:
            prepared.release()
            self._observer.on_refusal("refused")
            raise
        return prepared

    async def generate(
        self,
        asked: GenerateReqInput | PreparedRequest,
        *,
        form: RoutesForm = "base64",
    ) -> AsyncIterator[dict[str, Any] | list[Any]]:
        """Answers in the API's form: with `stream` one item per step and sample, which has what is new (`cumulative` joins
        them), else one item in all.

        A single prompt with one sample gives a dict. A batch, or `n` samples, gives a list in order; streamed, its items
        carry `index`. Leaving the iterator early aborts what still runs. What was not prepared before is prepared.

        Raises:
            ValueError: the request does not fit the engine; nothing was sent.
            GenerationError: the engine failed a single request without streaming; any other has it as its finish reason.
            OverloadedError, UnavailableError, EngineDeadError.
        """
        prepared = asked if isinstance(asked, PreparedRequest) else await self.prepare(asked)
        try:
            aborted = await self._waiting.enter(prepared.waiting)
            # Others may have come between `prepare` and here.
            self._check_rids(prepared.samples)
            async with aclosing(self._generate(prepared, form, aborted)) as results:
                async for result in results:
                    yield result
        finally:
            prepared.release()

    async def _generate(
        self, prepared: PreparedRequest, form: RoutesForm, aborted: dict[str, str]
    ) -> AsyncGenerator[dict[str, Any] | list[Any], None]:
        request, samples = prepared.request, prepared.samples
        num_layers = int(self.facts["num_layers"])
        answers = {
            sample.rid: Answer(sample, num_layers, form=form, token_text=self.text.token_text) for sample in samples
        }
        queue = self.outputs.expect(answers)
        outcome = "cancelled"
        try:
            for sample in samples:
                if sample.rid in aborted:
                    end = aborted_output(sample, aborted[sample.rid], self.controls.weight_version)
                    queue.put_nowait((end, None))
            to_send = [sample for sample in samples if sample.rid not in aborted]
            for _, group in groupby(to_send, key=lambda sample: sample.item):
                await self._at_engine.send(request, list(group))
            single = not request.is_batch and len(samples) == 1
            async for result in self._collect(prepared, list(answers.values()), queue, single):
                yield result
        except EngineDeadError:
            outcome = "error"
            raise
        finally:
            for rid, answer in answers.items():
                self.outputs.forget(rid, queue)
                if not answer.is_finished:
                    self._observer.on_end(answer, outcome)
                    if self._death is None:
                        self._at_engine.abort(rid)

    async def _collect(
        self, prepared: PreparedRequest, answers: list[Answer], queue: asyncio.Queue[Event], single: bool
    ) -> AsyncIterator[dict[str, Any] | list[Any]]:
        request = prepared.request
        by_rid = {answer.rid: (index, answer) for index, answer in enumerate(answers)}
        num_running = len(answers)
        while num_running:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            output, routed = event
            index, answer = by_rid[output.rid]
            assert request.stream or output.finish_reason is not None, "whole answers come at once"
            answer.add(output, routed)
            if prepared.delivery is not None:
                prepared.delivery.add(output)
            self._observer.on_output(answer, output)
            if output.finish_reason is not None:
                num_running -= 1
                # Its rid is free again, for whoever gets this output.
                self.outputs.forget(output.rid, queue)
                prepared.permits.give_back(1)
                self._observer.on_end(answer, answer.outcome)
            if request.stream:
                chunk = await answer.render()
                yield chunk if single else {"index": index, **chunk}
        if not request.stream:
            if single and answers[0].failure is not None:
                raise GenerationError(answers[0].failure)
            rendered = [await answer.render() for answer in answers]
            yield rendered[0] if single else rendered

    def room_for(self, num_prompt: int) -> int:
        """Output tokens that fit behind a prompt."""
        assert self.limits is not None
        return self.limits.room_for(num_prompt)

    @property
    def refusal(self) -> str | None:
        """Why requests are refused until somebody does something: torn weights, released memory."""
        return self._gate.refusal

    @property
    def blocked(self) -> Blocked | None:
        """Why the engine holds every request, as it said last."""
        return self._gate.blocked

    @property
    def is_paused(self) -> bool:
        return self._gate.is_paused

    def why_requests_wait(self) -> str | None:
        """Why a request that comes now would wait or be refused; None if it would run."""
        return self._gate.obstacle

    def not_ready(self) -> str | None:
        """Why nothing can be generated now; None if it can."""
        if self._death is not None:
            return str(self._death)
        return "the engine is starting" if self.limits is None else None

    def _check_rids(self, samples: Sequence[SampleRequest]) -> None:
        for sample in samples:
            if sample.rid in self.outputs or sample.rid in self._at_engine:
                raise FieldError(f"rid: {sample.rid!r} is in use by a request that has not finished", "rid")

    # --- control ----------------------------------------------------------------------------------------------------

    def abort_request(self, rid: str = "", *, abort_all: bool = False, message: str = "") -> None:
        """Abort the requests whose rid starts with `rid`, or all; their callers get what they have.

        Raises:
            ValueError: neither is given.
        """
        if not rid and not abort_all:
            raise FieldError("rid: must not be empty, unless abort_all is true", "rid", mentions=("abort_all",))
        if len(rid) > MAX_RID_CHARS:
            raise FieldError(f"rid: has {len(rid)} characters, must have at most {MAX_RID_CHARS}", "rid")
        prefix, message = "" if abort_all else rid, message or ABORTED
        self._waiting.abort(lambda one, _: one.startswith(prefix), message)
        self._connection.link.send_to_all(lambda number: AbortReq(number, rid, abort_all, message=message))

    async def abort_and_wait(self, rid: str = "", *, abort_all: bool = False, message: str = "") -> None:
        """The same; returns when the engine has let go of them, so that nobody counts them any more, or after
        `ABORT_TIMEOUT_S`: a step that is under way ends first.

        Raises:
            ValueError: as `abort_request`.
        """
        aborted = self._at_engine.matching("" if abort_all else rid)
        self.abort_request(rid, abort_all=abort_all, message=message)
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._at_engine.wait_for_ends(aborted)

    async def abort_exactly(self, rids: Sequence[str] | None) -> int:
        """Abort the requests that have these names, all their samples, or (None) everybody; how many there were. Returns
        when the engine has let go of them, as `abort_and_wait`."""
        if rids is None:
            num_aborted = len(self._at_engine) + self._waiting.abort(lambda *_: True, ABORTED)
            await self.abort_and_wait(abort_all=True)
            return num_aborted
        num_waiting = self._waiting.abort(lambda rid, name: rid in rids or name in rids, ABORTED)
        asked = self._at_engine.named(rids)
        for rid in asked:
            self._at_engine.abort(rid)
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._at_engine.wait_for_ends(asked)
        return num_waiting + len(asked)

    async def get_state(self, *, check_pages: bool = True) -> dict[str, Any]:
        """Facts of the engine, its leaders' states, the counters of output processors and sessions."""
        images = {} if self.images is None else self.images.counters()
        state = await self.queries.get_state(check_pages=check_pages)
        return {**self.facts, **self._sessions.counters(), **images, **state}
