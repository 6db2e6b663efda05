"""The MoE layer: router, dispatcher, experts, and a recorder that is told every choice."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from .dispatch import Dispatcher
from .experts import Experts
from .router import TopKRouter


class RouteRecorder(Protocol):
    """Is told which experts every token chose."""

    def slot(self, moe_layer_index: int) -> torch.Tensor:
        """Where a MoE layer, by its index among them, must write the ids [T, K] that it chooses; asked once a step."""
        ...


class MoeLayer(nn.Module):
    """[T, D] -> [T, D]."""

    def __init__(self, moe_layer_index: int, router: TopKRouter, dispatcher: Dispatcher, experts: Experts) -> None:
        super().__init__()
        self.moe_layer_index = moe_layer_index
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts

    def forward(self, hidden: torch.Tensor, recorder: RouteRecorder | None = None) -> torch.Tensor:
        record = None if recorder is None else recorder.slot(self.moe_layer_index)
        routed = self.router(hidden, record=record)
        dispatched = self.dispatcher.dispatch(hidden, routed)
        partial = self.experts(dispatched.hidden, dispatched.ids, dispatched.weights)
        return self.dispatcher.combine(partial, dispatched)
