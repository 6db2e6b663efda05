"""The frontend of leaders without a model: requests go through a real `LeaderLink`, and arrive when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from waybill.engine.control.operations import FlushCache
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.io_struct import FinishReason, OutputBatch, OutputOptions, SamplingParams
from waybill.engine.ipc.frontend_messages import (
    AbortReq,
    ControlReq,
    FrontendMessage,
    GetInternalStateReq,
    ShutdownReq,
    TokenizedGenerateReqInput,
)
from waybill.engine.routing.wire import decode
from waybill.engine.vision.placed_image import PlacedImage

from .replica_harness import FakeInbox

NUM_LAYERS = 2
# Ids of a row: dp rank, step, row of the rank.
TOP_K = 3


@dataclass
class Wire:
    """A frontend's line to one leader: what was sent and has not arrived."""

    inbox: FakeInbox
    on_the_way: deque[FrontendMessage] = field(default_factory=deque)

    def send(self, message: FrontendMessage) -> None:
        self.on_the_way.append(message)

    def flush_and_close(self, timeout_s: float) -> None: ...

    def arrive(self, count: int) -> None:
        for _ in range(min(count, len(self.on_the_way))):
            self.inbox.messages.append(self.on_the_way.popleft())


@dataclass
class Answer:
    """What the frontend got for one request."""

    dp_rank: int
    prompt: list[int]
    start: int
    token_ids: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None

    @property
    def routed(self) -> np.ndarray:
        return np.concatenate(self.rows) if self.rows else np.zeros((0, NUM_LAYERS, TOP_K), np.uint16)


class Frontend:
    """Sends through a real `LeaderLink`, and takes what the output processor ships."""

    def __init__(self, wires: list[Wire]) -> None:
        self.link = LeaderLink(wires)
        self.answers: dict[str, Answer] = {}

    def submit(
        self,
        dp_rank: int,
        rid: str,
        prompt: list[int],
        start: int = 0,
        images: Sequence[PlacedImage] = (),
        **params: object,
    ) -> None:
        ids = np.array(prompt, dtype="<i4")
        keys = ids.copy()
        for image in images:
            keys[image.start : image.end] = -image.number
        self.answers[rid] = Answer(dp_rank, prompt, start)
        stream = bool(params.pop("stream_routes", False))
        self.link.send(
            dp_rank,
            lambda number: TokenizedGenerateReqInput(
                number,
                rid,
                ids.tobytes(),
                SamplingParams(**params),
                OutputOptions(
                    stream=stream,
                    return_routed_experts=True,
                    routed_experts_start_len=start,
                    # An abort before the first token has its rows in this form.
                    routed_experts_format="compact",
                    stream_routed_experts=stream,
                ),
                images=list(images),
                cache_ids=keys.tobytes() if images else b"",
            ),
        )

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        self.link.send_to_all(lambda number: AbortReq(number, rid, abort_all))

    def flush(self, op_id: str) -> None:
        self.link.send_to_all(lambda number: ControlReq(number, op_id, FlushCache()))

    def ask(self, dp_rank: int, op_id: str) -> None:
        self.link.ask(dp_rank, GetInternalStateReq(op_id))

    def shut_down(self) -> None:
        self.link.send_to_all(ShutdownReq)

    def send(self, batch: OutputBatch, frames: list[memoryview]) -> None:
        """The output sender's socket."""
        remaining = iter(frames)
        for output in batch.outputs:
            answer = self.answers[output.rid]
            assert answer.reason is None, "nothing comes after the end"
            assert output.dp_rank == answer.dp_rank
            answer.token_ids += output.token_ids
            answer.reason = output.finish_reason
            answer.error = output.routed_experts_error
            if output.routed_experts is not None:
                rows = decode(output.routed_experts, next(remaining)).rows
                assert output.routed_experts.start == answer.start + len(answer.routed) or not len(rows)
                answer.rows.append(rows.copy())
        assert not list(remaining)
