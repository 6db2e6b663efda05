"""How tokens reach the ranks that hold their experts, and how the results come back.

A dispatcher's `dispatch` returns a frozen record, and `combine` takes it back: nothing is kept in between.

Legend: T rows of this rank, W ranks of the axis, G tokens that this rank's experts see, D hidden, K experts per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from ..collectives import all_gather
from ..mesh import Axis
from ..partial_sum import PartialSum
from .router import RouterOutput

# The id of no expert: rows of padding are nobody's work.
NO_EXPERT = -1


@dataclass(frozen=True)
class Dispatched:
    """What the local experts work on: hidden [G, D], ids [G, K] and weights [G, K]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class RecordedRows:
    """Where the routes of some rows are recorded: `ids` [R, K], of any integer dtype, and their `weights` [R, K], of any
    floating one, where those are wanted. The rows are those from `first` on."""

    ids: torch.Tensor
    first: int = 0
    weights: torch.Tensor | None = None

    def keep(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Take them out of all rows, [G, K]."""
        self.ids.copy_(ids[self.first : self.first + len(self.ids)])
        self.keep_weights(weights)

    def keep_weights(self, weights: torch.Tensor) -> None:
        """The same, where the ids are written by who chooses them. Rounds to the nearest, ties to even."""
        if self.weights is not None:
            self.weights.copy_(weights[self.first : self.first + len(self.weights)])


class Dispatcher(Protocol):
    @property
    def gathers_ids(self) -> bool:
        """Whether `dispatch` brings every rank the ids of the whole world, [G, K] in world order, to be recorded there.
        Where it does not, each rank records what its own router chose."""
        ...

    @property
    def fixed(self) -> Dispatcher:
        """The form in which sizes depend on shapes alone, as a CUDA graph needs it."""
        ...

    def rows_of_group(self, tp: Axis, num_rows: int) -> slice | None:
        """Those of a dp rank's tokens among the rows that `dispatch` gives to each of its tp ranks, which bring `num_rows`
        each. None: they do not all come."""
        ...

    def dispatch(
        self,
        hidden: torch.Tensor,
        routed: RouterOutput,
        is_padding: torch.Tensor | None,
        record: RecordedRows | None = None,
    ) -> Dispatched:
        """hidden [T, D] and where it is routed to; rows where `is_padding` [T] are nobody's work. `record` is for one that
        gathers ids."""
        ...

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> PartialSum:
        """Partial results [G, D] of the local experts -> complete results [T, D] of this rank's tokens."""
        ...


@dataclass
class SyncClock:
    """Host time spent in the collectives in which ranks meet; for who wants to know who waits for whom.

    On a GPU a collective returns before it is done, so the time says nothing there.
    """

    seconds: float = 0.0

    def add_since(self, began: float) -> None:
        self.seconds += time.perf_counter() - began


class ReplicatedDispatcher:
    """Every rank of the axis holds all tokens already (G = T); the partial results are summed."""

    gathers_ids = False

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    @property
    def fixed(self) -> Dispatcher:
        return self

    def rows_of_group(self, tp: Axis, num_rows: int) -> slice:
        return slice(0, num_rows)

    def dispatch(
        self,
        hidden: torch.Tensor,
        routed: RouterOutput,
        is_padding: torch.Tensor | None,
        record: RecordedRows | None = None,
    ) -> Dispatched:
        assert is_padding is None and record is None
        return Dispatched(hidden, routed.ids, routed.weights)

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> PartialSum:
        return PartialSum(partial, self._axis)


class AllGatherDispatcher:
    """Every rank gets all tokens of the world (G = W * T) with their ids and weights, in one packed all-gather; the partial
    results are reduce-scattered. All ranks bring the same number of rows."""

    gathers_ids = True

    def __init__(self, axis: Axis, clock: SyncClock) -> None:
        self._axis = axis
        self._clock = clock

    @property
    def fixed(self) -> Dispatcher:
        return self

    def rows_of_group(self, tp: Axis, num_rows: int) -> slice:
        return world_rows_of_group(self._axis, tp, num_rows)

    def dispatch(
        self,
        hidden: torch.Tensor,
        routed: RouterOutput,
        is_padding: torch.Tensor | None,
        record: RecordedRows | None = None,
    ) -> Dispatched:
        symmetric = self._axis.symmetric
        if symmetric is not None and symmetric.gathers(hidden):
            target, first = (None, 0) if record is None else (record.ids, record.first)
            dispatched = Dispatched(
                *symmetric.gather_routed(hidden, routed.ids, routed.weights, is_padding, target, first)
            )
            if record is not None:
                record.keep_weights(dispatched.weights)
            return dispatched
        packed = pack(hidden, mask_padding(routed.ids, is_padding), routed.weights)
        began = time.perf_counter()
        gathered = all_gather(packed, self._axis)
        self._clock.add_since(began)
        dispatched = Dispatched(*unpack(gathered, hidden, routed))
        if record is not None:
            record.keep(dispatched.ids, dispatched.weights)
        return dispatched

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> PartialSum:
        return PartialSum(partial, self._axis, scatter=True)


class PlainDispatcher:
    """The slow twin of the two above and of all-to-all: three gathers, one all-reduce, and this rank's rows of the sum."""

    gathers_ids = True

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    @property
    def fixed(self) -> Dispatcher:
        return self

    def rows_of_group(self, tp: Axis, num_rows: int) -> slice:
        return world_rows_of_group(self._axis, tp, num_rows)

    def dispatch(
        self,
        hidden: torch.Tensor,
        routed: RouterOutput,
        is_padding: torch.Tensor | None,
        record: RecordedRows | None = None,
    ) -> Dispatched:
        ids = mask_padding(routed.ids, is_padding)
        dispatched = Dispatched(*(all_gather(x, self._axis) for x in (hidden, ids, routed.weights)))
        if record is not None:
            record.keep(dispatched.ids, dispatched.weights)
        return dispatched

    def combine(self, partial: torch.Tensor, dispatched: Dispatched) -> PartialSum:
        own = PartialSum(partial, self._axis).complete().chunk(self._axis.size)[self._axis.rank]
        return PartialSum.of_one(own)


def world_rows_of_group(world: Axis, tp: Axis, num_rows: int) -> slice:
    """Where rows of the world stand in rank order: those of the tp ranks, of `num_rows` each, are neighbours."""
    first = (world.rank - tp.rank) * num_rows
    return slice(first, first + tp.size * num_rows)


def mask_padding(ids: torch.Tensor, is_padding: torch.Tensor | None) -> torch.Tensor:
    """Ids [T, K] as they travel, int32, those of padding `NO_EXPERT`."""
    ids = ids.to(torch.int32)
    return ids if is_padding is None else ids.masked_fill(is_padding[:, None], NO_EXPERT)


def pack(*parts: torch.Tensor) -> torch.Tensor:
    """Parts [T, *] of any dtypes side by side, as bytes [T, sum of widths]."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack(packed: torch.Tensor, hidden: torch.Tensor, routed: RouterOutput) -> tuple[torch.Tensor, ...]:
    """Bytes [G, *] back to hidden, ids (as int64) and weights, of the widths and dtypes of the given ones."""
    widths = [
        hidden.shape[1] * hidden.itemsize,
        routed.ids.shape[1] * torch.int32.itemsize,
        routed.weights.shape[1] * routed.weights.itemsize,
    ]
    # Memory of their own: a slice of a single row counts as contiguous, at an offset that the dtype may not allow.
    rows, ids, weights = (part.clone(memory_format=torch.contiguous_format) for part in packed.split(widths, dim=1))
    return rows.view(hidden.dtype), ids.view(torch.int32).to(routed.ids.dtype), weights.view(routed.weights.dtype)
