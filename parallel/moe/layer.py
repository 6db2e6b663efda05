"""The MoE layer: router, dispatcher, experts, and a recorder that is told every choice."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ..dp_attention import TokenLayout
from ..partial_sum import PartialSum
from .dispatch import Dispatcher, RecordedRows
from .experts import Experts
from .router import TopKRouter


class RouteRecorder(Protocol):
    """Is told which experts every token chose, layer by layer; layers are counted among the MoE layers."""

    def slot(self, moe_layer_index: int) -> RecordedRows:
        """Where the routes of all rows [T, K] of the layer's router go; asked once a step."""
        ...

    def rows_of_world(self, moe_layer_index: int) -> RecordedRows:
        """Instead of `slot`, for a layer that has the ids of the whole world."""
        ...


class SharedPart(Protocol):
    """Experts that all tokens share."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> partial sums [T, D] over the axis that dense parts are sharded over."""
        ...

    def unweighted(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same before a gate, if there is one, weighs them."""
        ...

    def weigh(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Rows of `out`, sums of `unweighted`, by the gate's weights."""
        ...


class MoeLayer(nn.Module):
    """[P, D] -> [P, D]."""

    def __init__(
        self,
        moe_layer_index: int,
        router: TopKRouter,
        dispatcher: Dispatcher,
        experts: Experts,
        shared: SharedPart | None = None,
    ) -> None:
        """`shared` runs on every token."""
        super().__init__()
        self.moe_layer_index = moe_layer_index
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared = shared

    def forward(self, hidden: torch.Tensor, layout: TokenLayout, recorder: RouteRecorder | None = None) -> PartialSum:
        """`layout` says which rows are padding."""
        dispatcher = self.dispatcher.fixed if layout.is_fixed else self.dispatcher
        own, of_world = None, None
        if recorder is not None and dispatcher.gathers_ids:
            of_world = recorder.rows_of_world(self.moe_layer_index)
        elif recorder is not None:
            own = recorder.slot(self.moe_layer_index)
        routed = self.router(hidden, record=None if own is None else own.ids)
        if own is not None:
            own.keep_weights(routed.weights)
        dispatched = dispatcher.dispatch(hidden, routed, layout.is_padding, of_world)
        partial = self.experts(dispatched.hidden, dispatched.ids, dispatched.weights)
        if self.shared is None:
            return dispatcher.combine(partial, dispatched)
        if partial.dtype != hidden.dtype:
            # Each sum is rounded by itself, as that of one rank is.
            sums = dispatcher.combine(partial, dispatched).complete_beside(
                layout.run_sharded(self.shared.unweighted, hidden)
            )
            routed_sum, shared_sum = (each.to(hidden.dtype) for each in sums)
            return PartialSum.of_one(routed_sum + self.shared.weigh(hidden, shared_sum))
        rows = dispatcher.rows_of_group(layout.axis, len(hidden))
        if rows is None:
            return dispatcher.combine(partial, dispatched).plus(layout.run_sharded(self.shared, hidden))
        # They are here already, and their partial sums travel with those of the routed experts.
        partial[rows] += self.shared(dispatched.hidden[rows])
        return dispatcher.combine(partial, dispatched)
