"""The dispatcher that sends each token only to the ranks that hold one of its experts.

Whole experts must lie on ranks ("ep"). A token goes to a rank once, however many of its experts live there. The sizes of
the exchange depend on the routes, so every layer tells them to the host first.

Legend: T rows of this rank, W ranks of the axis, S rows sent, G rows received, D hidden, K experts per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..collectives import exchange
from ..mesh import Axis
from ..partial_sum import PartialSum
from .dispatch import AllGatherDispatcher, Dispatched, Dispatcher, RecordedRows, SyncClock, mask_padding, pack, unpack
from .router import RouterOutput


@dataclass(frozen=True)
class Exchanged(Dispatched):
    """What went where: `sent_rows` [S] are the rows of this rank's tokens, by receiving rank."""

    sent_rows: torch.Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    num_rows: int


class AllToAllDispatcher:
    """Ids are not gathered: each rank records its own, and they are brought together once a step."""

    gathers_ids = False

    def __init__(self, axis: Axis, num_experts: int, clock: SyncClock) -> None:
        assert num_experts % axis.size == 0
        self._axis = axis
        self._num_local = num_experts // axis.size
        self._clock = clock
        # Every row to every rank.
        self.fixed: Dispatcher = AllGatherDispatcher(axis, clock)

    def rows_of_group(self, tp: Axis, num_rows: int) -> None:
        return None

    def dispatch(
        self,
        hidden: torch.Tensor,
        routed: RouterOutput,
        is_padding: torch.Tensor | None,
        record: RecordedRows | None = None,
    ) -> Exchanged:
        assert record is None
        ids = mask_padding(routed.ids, is_padding)
        wanted = self._wanted(routed.ids, is_padding)
        sent_rows = wanted.nonzero()[:, 1]
        send = wanted.sum(dim=1)
        began = time.perf_counter()
        receive = exchange(send, [1] * self._axis.size, [1] * self._axis.size, self._axis)
        send_sizes, receive_sizes = send.tolist(), receive.tolist()
        packed = pack(hidden[sent_rows], ids[sent_rows], routed.weights[sent_rows])
        arrived = exchange(packed, send_sizes, receive_sizes, self._axis)
        self._clock.add_since(began)
        rows, all_ids, weights = unpack(arrived, hidden, routed)
        return Exchanged(rows, all_ids, weights, sent_rows, send_sizes, receive_sizes, hidden.shape[0])

    def _wanted(self, ids: torch.Tensor, is_padding: torch.Tensor | None) -> torch.Tensor:
        """Which rank needs which row: [W, T] bool."""
        wanted = torch.zeros(ids.shape[0], self._axis.size, dtype=torch.bool, device=ids.device)
        wanted.scatter_(1, ids // self._num_local, True)
        return (wanted if is_padding is None else wanted.masked_fill(is_padding[:, None], False)).t()

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> PartialSum:
        assert isinstance(dispatched, Exchanged)
        returned = exchange(partial, dispatched.receive_sizes, dispatched.send_sizes, self._axis)
        out = partial.new_zeros(dispatched.num_rows, partial.shape[1], dtype=torch.float32)
        out.index_add_(0, dispatched.sent_rows, returned.float())
        return PartialSum.of_one(out.to(partial.dtype))
