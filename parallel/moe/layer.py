"""The MoE layer: router, dispatcher, experts, and a recorder that is told every choice."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from .dispatch import Dispatcher
from .experts import Experts
from .router import TopKRouter


class RouteRecorder(Protocol):
    """Is told which experts every token chose, layer by layer; layers are counted among the MoE layers."""

    def slot(self, moe_layer_index: int) -> torch.Tensor:
        """Where the layer's router must write the ids [T, K] that it chooses; asked once a step."""
        ...

    def record(self, moe_layer_index: int, ids: torch.Tensor) -> None:
        """Instead of `slot`, for a layer that has the ids of the whole world: [G, K], in world order."""
        ...


class MoeLayer(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, moe_layer_index: int, router: TopKRouter, dispatcher: Dispatcher, experts: Experts) -> None:
        super().__init__()
        self.moe_layer_index = moe_layer_index
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts

    def forward(self, hidden: torch.Tensor, num_held: int, recorder: RouteRecorder | None = None) -> torch.Tensor:
        """Rows from `num_held` on are padding."""
        own = None
        if recorder is not None and not self.dispatcher.gathers_ids:
            own = recorder.slot(self.moe_layer_index)
        routed = self.router(hidden, record=own)
        dispatched = self.dispatcher.dispatch(hidden, routed, num_held)
        if recorder is not None and self.dispatcher.gathers_ids:
            recorder.record(self.moe_layer_index, dispatched.ids)
        partial = self.experts(dispatched.hidden, dispatched.ids, dispatched.weights)
        return self.dispatcher.combine(partial, dispatched)
