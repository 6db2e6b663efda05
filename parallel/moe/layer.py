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


class MoeLayer(nn.Module):
    """[P, D] -> [P, D]."""

    def __init__(
        self,
        moe_layer_index: int,
        router: TopKRouter,
        dispatcher: Dispatcher,
        experts: Experts,
        shared: nn.Module | None = None,
    ) -> None:
        """`shared` runs on every token: rows to partial sums over the axis that dense parts are sharded over."""
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
        rows = dispatcher.rows_of_group(layout.axis, len(hidden))
        if rows is None:
            return dispatcher.combine(partial, dispatched).plus(layout.run_sharded(self.shared, hidden))
        # They are here already, and their partial sums travel with those of the routed experts.
        partial[rows] += self.shared(dispatched.hidden[rows])
        return dispatcher.combine(partial, dispatched)
