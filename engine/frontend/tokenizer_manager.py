"""The frontend's half of a request: text to ids, one queue per request, aborts, control operations.

It lives on one asyncio loop. It holds no model and no torch.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from tokenizers import Tokenizer

from ..config import EngineConfig
from ..io_struct import (
    BackendMessage,
    ControlReply,
    CountersReply,
    FetchClaimReq,
    GetCountersReq,
    OutputBatch,
    OutputQuery,
    OutputReply,
    RequestOutput,
)
from ..ipc.curve import CurveGuard
from ..ipc.frontend_messages import AbortReq, FrontendMessage, GetInternalStateReq, ShutdownReq
from ..ipc.sockets import AsyncReceiver, Endpoint, Sender, open_socket
from ..routing.claims import ClaimError, processor_of
from ..routing.wire import RoutedExperts, decode
from ..validation.field_error import FieldError
from ..validation.request_model import MAX_NAME_CHARS
from .admission import Admission, OverloadedError
from .answer import Answer, GenerationError, RoutesForm
from .dp_router import DpRouter
from .engine_controls import CONTROL_TIMEOUT_S, EngineControls
from .engine_state import add_counters, merge_states
from .generate_request import GenerateReqInput, SampleRequest
from .generation_gate import GenerationGate, UnavailableError
from .leader_link import LeaderLink
from .pending_replies import PendingReplies
from .preparation import Preparation, PreparedRequest, tokenized_request
from .request_limits import EngineLimits
from .request_observer import NoObserver, RequestObserver
from .text_codec import TextCodec
from .work_threads import WorkThreads

logger = logging.getLogger(__name__)

READY_OP = "ready"
# A request whose caller leaves so many outputs unread is aborted.
MAX_UNREAD_OUTPUTS = 8192
UNREAD_CHECK = 1024
# Claims fetched at once.
MAX_FETCHES = 16
# Prompts' bytes that are sent to leaders in one go.
MAX_SENT_BYTES = 4 << 20
# A sample of a batch has a longer name than its request.
MAX_RID_CHARS = MAX_NAME_CHARS + 16


class EngineDeadError(RuntimeError):
    """The engine's processes have ended; the message says what is known of why."""


class EngineStartError(RuntimeError):
    """The engine refused to start, and says why."""


Event = tuple[RequestOutput, RoutedExperts | None] | BaseException


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
        observer: RequestObserver | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.text = TextCodec(tokenizer)
        self._context = zmq.asyncio.Context()
        # The sender never blocks and is used on the loop alone; a plain context serves.
        self._plain_context = zmq.Context()
        senders: list[Sender[FrontendMessage]] = [Sender(self._plain_context, leader) for leader in leaders]
        self._link = LeaderLink(senders)
        self._guard = CurveGuard(self._context, [frontend])
        self._inbox: AsyncReceiver[BackendMessage] = AsyncReceiver(self._context, frontend, BackendMessage)
        # One for each output processor.
        self._queries = [open_socket(self._context, zmq.DEALER, where, bind=False) for where in queries]
        # Rows on their way from there to here: few at once, so that they never wait for each other in a socket's queue.
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        # Where claims of this node are fetched without HTTP: a ROUTER that takes `FetchClaimReq`.
        self.queries_endpoint = queries[0] if isinstance(queries[0], str) else queries[0].address
        self._events: dict[str, asyncio.Queue[Event]] = {}
        # By rid, the dp rank of what was sent and is not yet told to have finished, whoever still waits for it.
        self._at_engine: dict[str, int] = {}
        # Outputs with tokens that have come since the start.
        self.num_outputs = 0
        self._replies = PendingReplies()
        self._observer: RequestObserver = observer or NoObserver()
        self.work_threads = WorkThreads()
        self._admission = Admission(config.max_running_requests + config.max_waiting_requests)
        self._preparation = Preparation(self.text, self.work_threads, self._admission, self._observer)
        self._dp_router = DpRouter(config.dp_size)
        self._gate = GenerationGate(config.weight_sync_timeout_s, lambda: len(self._at_engine))
        self.controls = EngineControls(config, self._link, self._replies, self._gate, self._dp_router)
        self._death: EngineDeadError | None = None
        self._tasks: list[asyncio.Task[None]] = []
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
        ready = self._replies.expect(READY_OP)
        self._tasks = [
            asyncio.create_task(self._receive_outputs(), name="receive outputs"),
            *(asyncio.create_task(self._receive_replies(socket), name="receive replies") for socket in self._queries),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
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
        )

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            # By `close`.
            return
        reason = f"the frontend's task {task.get_name()!r} has failed: {task.exception()!r}"
        logger.critical(reason, exc_info=task.exception())
        self.fail_all(reason)
        if self._on_failure is not None:
            self._on_failure(reason)

    def fail_all(self, reason: str) -> None:
        """The engine is gone: every waiting caller gets an error now, later ones at once."""
        self._death = EngineDeadError(reason)
        for queue in self._events.values():
            queue.put_nowait(self._death)
        self._replies.fail_all(self._death)
        self._gate.fail_all(self._death)

    async def stop_engine(self) -> None:
        """Ask the ranks to leave after the step in flight."""
        self._link.send_to_all(ShutdownReq)

    def close(self) -> None:
        self.work_threads.close()
        for task in self._tasks:
            task.cancel()
        self._link.close(1.0)
        self._inbox.close()
        for socket in self._queries:
            socket.close(linger=0)
        self._guard.close()
        self._context.destroy(linger=0)
        self._plain_context.term()

    # --- generation -------------------------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        """Samples that run, wait or are prepared."""
        return self._admission.num_taken

    async def prepare(self, request: GenerateReqInput) -> PreparedRequest:
        """A request's samples, checked against the engine, with places for them.

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
        """Answers in the API's form; with `stream` one item per step and request, else one item in all.

        A single prompt with one sample gives a dict. A batch, or `n` samples, gives a list in order; streamed, its items
        carry `index`. Leaving the iterator early aborts what still runs. What was not prepared before is prepared.

        Raises:
            ValueError: the request does not fit the engine; nothing was sent.
            GenerationError: the engine failed a single request without streaming; any other has it as its finish reason.
            OverloadedError, UnavailableError, EngineDeadError.
        """
        prepared = asked if isinstance(asked, PreparedRequest) else await self.prepare(asked)
        try:
            await self._gate.enter()
            # Others may have come between `prepare` and here.
            self._check_rids(prepared.samples)
            async with aclosing(self._generate(prepared, form)) as results:
                async for result in results:
                    yield result
        finally:
            prepared.release()

    async def _generate(
        self, prepared: PreparedRequest, form: RoutesForm
    ) -> AsyncGenerator[dict[str, Any] | list[Any], None]:
        request, samples = prepared.request, prepared.samples
        num_layers = int(self.facts["num_layers"])
        answers = {
            sample.rid: Answer(sample, num_layers, form=form, token_text=self.text.token_text) for sample in samples
        }
        queue: asyncio.Queue[Event] = asyncio.Queue()
        outcome = "cancelled"
        try:
            for sample in samples:
                self._events[sample.rid] = queue
            for _, group in groupby(samples, key=lambda sample: sample.item):
                await self._send(request, list(group))
            single = not request.is_batch and len(samples) == 1
            async for result in self._collect(prepared, list(answers.values()), queue, single):
                yield result
        except EngineDeadError:
            outcome = "error"
            raise
        finally:
            for rid, answer in answers.items():
                # A finished request's rid may be another's by now.
                if self._events.get(rid) is queue:
                    del self._events[rid]
                if not answer.is_finished:
                    self._observer.on_end(answer, outcome)
                    if self._death is None:
                        self._abort_exactly(rid)

    async def _collect(
        self, prepared: PreparedRequest, answers: list[Answer], queue: asyncio.Queue[Event], single: bool
    ) -> AsyncIterator[dict[str, Any] | list[Any]]:
        request = prepared.request
        by_rid = {answer.rid: (index, answer) for index, answer in enumerate(answers)}
        num_running = len(answers)
        while num_running:
            event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            output, routed = event
            index, answer = by_rid[output.rid]
            answer.add(output, routed)
            self._observer.on_output(answer, output)
            if output.finish_reason is not None:
                num_running -= 1
                # Its rid is free again, for whoever gets this output.
                self._events.pop(output.rid, None)
                prepared.places.give_back(1)
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
        return max(0, min(self.limits.context_length - num_prompt, self.limits.kv_cache_tokens - num_prompt + 1))

    @property
    def refusal(self) -> str | None:
        """Why requests are refused until somebody does something: torn weights, released memory."""
        return self._gate.refusal

    def not_ready(self) -> str | None:
        """Why nothing can be generated now; None if it can."""
        if self._death is not None:
            return str(self._death)
        return "the engine is starting" if self.limits is None else None

    def _check_rids(self, samples: Sequence[SampleRequest]) -> None:
        for sample in samples:
            if sample.rid in self._events or sample.rid in self._at_engine:
                raise FieldError(f"rid: {sample.rid!r} is in use by a request that has not finished", "rid")

    async def _send(self, request: GenerateReqInput, samples: Sequence[SampleRequest]) -> None:
        """Send the samples of one prompt to one dp rank; other requests have their turn after some megabytes."""
        input_ids = samples[0].input_ids.astype("<i4", copy=False).tobytes()
        dp_rank = self._dp_router.choose(
            input_ids,
            request.extra_key or "",
            session_id=request.session_id,
            routed_dp_rank=request.routed_dp_rank,
            num_samples=len(samples),
        )
        num_sent = num_bytes = 0
        try:
            for sample in samples:
                self._link.send(dp_rank, partial(tokenized_request, request, sample, input_ids))
                self._at_engine[sample.rid] = dp_rank
                num_sent += 1
                num_bytes += len(input_ids)
                if num_bytes >= MAX_SENT_BYTES:
                    num_bytes = 0
                    await asyncio.sleep(0)
                    # What was sent may have ended, and an update of weights begun.
                    await self._gate.enter()
        finally:
            for _ in range(len(samples) - num_sent):
                self._dp_router.release(dp_rank)

    # --- control ----------------------------------------------------------------------------------------------------

    def abort_request(self, rid: str = "", *, abort_all: bool = False) -> None:
        """Abort the requests whose rid starts with `rid`, or all; their callers get what they have.

        Raises:
            ValueError: neither is given.
        """
        if not rid and not abort_all:
            raise FieldError("rid: must not be empty, unless abort_all is true", "rid", mentions=("abort_all",))
        if len(rid) > MAX_RID_CHARS:
            raise FieldError(f"rid: has {len(rid)} characters, must have at most {MAX_RID_CHARS}", "rid")
        self._link.send_to_all(lambda number: AbortReq(number, rid, abort_all))

    def _limit_unread(self, queue: asyncio.Queue[Event]) -> None:
        """Abort all samples of a request whose caller does not read."""
        rids = (
            [rid for rid, owner in self._events.items() if owner is queue] if queue.qsize() % UNREAD_CHECK == 0 else []
        )
        if rids and queue.qsize() >= MAX_UNREAD_OUTPUTS * len(rids):
            logger.warning("%s: %d outputs wait to be read: aborted", rids[0], queue.qsize())
            for rid in rids:
                self._abort_exactly(rid)

    def _abort_exactly(self, rid: str) -> None:
        self._link.send_to_all(lambda number: AbortReq(number, rid, exact=True))

    async def get_state(self) -> dict[str, Any]:
        """Facts of the engine, its leaders' states and the output processors' counters."""
        states = await self.get_leader_states()
        counters = await asyncio.gather(*(self._query(index, GetCountersReq) for index in range(len(self._queries))))
        return {**self.facts, **merge_states(states), **add_counters([reply for reply, _ in counters])}

    async def get_leader_states(self) -> list[ControlReply]:
        """What each leader says of itself, between two of its steps."""
        return await asyncio.gather(*map(self._get_leader_state, range(self.config.dp_size)))

    async def _get_leader_state(self, dp_rank: int) -> ControlReply:
        op_id = uuid.uuid4().hex
        future = self._replies.expect(op_id)
        self._link.ask(dp_rank, GetInternalStateReq(op_id))
        reply: ControlReply = await asyncio.wait_for(future, CONTROL_TIMEOUT_S)
        return reply

    async def fetch_routed_experts(self, claim: str) -> RoutedExperts:
        """The rows behind a claim, verified.

        Raises:
            ClaimError: the claim is unknown or has expired.
            OverloadedError: too many rows are on their way already.
            ValueError: what arrived is damaged.
        """
        processor = processor_of(claim, len(self._queries))
        async with self._fetches:
            reply, frames = await self._query(processor, lambda op_id: FetchClaimReq(op_id, claim))
        assert not isinstance(reply, CountersReply)
        if reply.is_busy:
            raise OverloadedError(str(reply.error))
        if reply.meta is None:
            raise ClaimError(reply.error)
        return decode(reply.meta, frames[0])

    async def _query(self, processor: int, make: Callable[[str], OutputQuery]) -> tuple[OutputReply, list[bytes]]:
        op_id = uuid.uuid4().hex
        future = self._replies.expect(op_id)
        await self._queries[processor].send(msgspec.msgpack.encode(make(op_id)))
        reply: tuple[OutputReply, list[bytes]] = await asyncio.wait_for(future, CONTROL_TIMEOUT_S)
        return reply

    # --- what comes back --------------------------------------------------------------------------------------------

    async def _receive_outputs(self) -> None:
        while True:
            message, frames = await self._inbox.receive()
            if isinstance(message, OutputBatch):
                self._deliver(message, frames)
            else:
                self._replies.resolve(message.op_id, message)

    async def _receive_replies(self, socket: Any) -> None:
        decoder: msgspec.msgpack.Decoder[OutputReply] = msgspec.msgpack.Decoder(OutputReply)
        while True:
            head, *frames = await socket.recv_multipart()
            reply = decoder.decode(head)
            self._replies.resolve(reply.op_id, (reply, frames))

    def _deliver(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        """Pass each output on, with its rows verified; a request that was given up meanwhile is dropped.

        Raises:
            ValueError: the message does not have a frame for each output with rows; whose rows they are cannot be told.
        """
        have_rows = [
            output.routed_experts is not None and output.routed_experts_claim is None for output in batch.outputs
        ]
        if sum(have_rows) != len(frames):
            raise ValueError(f"{len(frames)} frames of rows came for {sum(have_rows)} outputs with rows")
        remaining = iter(frames)
        for output, has_rows in zip(batch.outputs, have_rows, strict=True):
            self.num_outputs += bool(output.token_ids)
            event = self._verified(output, next(remaining)) if has_rows else (output, None)
            if output.is_at_engine:
                self._abort_exactly(output.rid)
            elif output.finish_reason is not None:
                self._on_end_at_engine(output.rid)
            queue = self._events.get(output.rid)
            if queue is not None:
                queue.put_nowait(event)
                self._limit_unread(queue)
        for rid in batch.left:
            self._on_end_at_engine(rid)

    @staticmethod
    def _verified(output: RequestOutput, frame: memoryview) -> Event:
        assert output.routed_experts is not None
        try:
            return output, decode(output.routed_experts, frame)
        except ValueError as error:
            logger.error("%s: %s", output.rid, error)
            return msgspec.structs.replace(output, routed_experts=None, routed_experts_error=str(error)), None

    def _on_end_at_engine(self, rid: str) -> None:
        dp_rank = self._at_engine.pop(rid, None)
        if dp_rank is None:
            # Every request is at the engine until its one finish is told.
            logger.error("%s: an end was told of a request that is not at the engine", rid)
            return
        self._dp_router.release(dp_rank)
