"""Replay of recorded routes in stock `transformers` models: the trainer's half of Rollout Routing Replay (R3).

    with replay_routing(model) as replay:
        batch = RoutedExpertsBatch.from_padded(routes, attention_mask)
        logits = model(input_ids, attention_mask=attention_mask, routed_experts=batch).logits

With `replay_weights=True` a batch brings the recorded combine weights as well, in place of those of the model's routers.

`batch` aligns recorded rows with a trainer's tensors, `context` makes a model's routers follow them, `layers` finds
these, `routers` knows how each family turns scores into weights. They import torch and transformers only; the engine is
not needed where a trainer runs.
"""

from __future__ import annotations

from .batch import RoutedExpertsBatch, RowCounts, routes_from_answer
from .context import Replay, ReplayError, replay_routing
from .layers import leaf_module_classes

__all__ = [
    "Replay",
    "ReplayError",
    "RoutedExpertsBatch",
    "RowCounts",
    "leaf_module_classes",
    "replay_routing",
    "routes_from_answer",
]
