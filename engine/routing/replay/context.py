"""`replay_routing`: the routers of a model take their choice from the forward's `routed_experts`.

The batch travels as a keyword argument of the forward, which stock models hand on to every decoder layer and its attention.
So whatever runs a layer again - activation checkpointing, a backward in another order, a second forward before the
first one's backward - runs it with the batch it first ran with. Nothing is kept between forwards, and there is no queue
that could be out of step. Within a layer, attention's pre-hook takes the argument and leaves it in the layer's seat, and
the router's hook takes it from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .batch import RoutedExpertsBatch, RowCounts
from .layers import RoutedModel, RoutingLayer, find_routed_model

logger = logging.getLogger(__name__)

ARGUMENT = "routed_experts"


class ReplayError(RuntimeError):
    """The model did not run as replay needs it: a router was bypassed, or ran without its rows."""


class _Seat:
    """One MoE layer's place in the replay: where its attention leaves the batch for its router."""

    def __init__(self, layer: RoutingLayer, column: int, fired: set[int]) -> None:
        self._layer = layer.layer
        self._kind = layer.kind
        self._column = column
        self._num_experts: int = layer.router.num_experts
        self._fired = fired
        self._waiting: list[RoutedExpertsBatch | None] = []
        self._logits: torch.Tensor | None = None

    def leave(self, batch: RoutedExpertsBatch | None) -> None:
        """Called by attention; overwrites what a recomputation that stopped early did not take."""
        self._waiting = [batch]

    def keep_logits(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Hook of the projection inside a router that does not return its logits; AutoEP calls it once more afterwards."""
        if self._waiting:
            self._logits = output

    def route(self, router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Hook of the router: its choice replaced where the batch has a row."""
        if not self._waiting:
            raise ReplayError(
                f"layer {self._layer}: its router ran without its attention before it. Activation checkpointing must cover "
                "whole decoder layers, not the MoE block alone"
            )
        batch = self._waiting.pop()
        logits, self._logits = self._logits, None
        self._fired.add(self._layer)
        if batch is None:
            return None
        if self._kind.returns_logits:
            logits, _, native = output
            ids = self._choose(batch, logits, native)
            return logits, self._weigh(batch, router, logits, ids), ids
        assert logits is not None, "a router's projection runs inside it"
        ids = self._choose(batch, logits, output[1])
        counts = torch.bincount(ids.flatten(), minlength=self._num_experts).to(output[2].dtype)
        return self._weigh(batch, router, logits, ids), ids, counts

    def _weigh(
        self, batch: RoutedExpertsBatch, router: nn.Module, logits: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Combine weights [P, K] of these experts: the recorded ones where the batch has them, else the router's."""
        return batch.with_recorded(self._column, self._kind.weights(router, logits, ids))

    def _choose(self, batch: RoutedExpertsBatch, logits: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
        """Ids [P, K]: the recorded ones, or the router's own `native` [P, K] where there are none."""
        if len(logits) != len(batch.has_row):
            raise ReplayError(
                f"layer {self._layer}: {len(logits)} tokens reached its router, {ARGUMENT} has {len(batch.has_row)}"
            )
        recorded, has_row = batch.layer(self._column, logits.device)
        return torch.where(has_row[:, None], recorded, native)


class Replay:
    """What a replay has done so far: `counts`, summed over forwards, and the model's `layer_ids`, those that route."""

    def __init__(self, layers: list[RoutingLayer]) -> None:
        self.counts = RowCounts()
        self.layer_ids = tuple(layer.layer for layer in layers)
        self._num_experts: int = layers[0].router.num_experts
        self._top_k: int = layers[0].router.top_k
        self._fired: set[int] = set()
        self._seats = {layer.layer: _Seat(layer, column, self._fired) for column, layer in enumerate(layers)}
        self._ended = False

    def install(self, routed: RoutedModel) -> Iterator[RemovableHandle]:
        """Register every hook. They go before others, which then see what replay made."""
        yield routed.backbone.register_forward_pre_hook(self._enter_forward, with_kwargs=True)
        yield routed.backbone.register_forward_hook(self._leave_forward, with_kwargs=True)
        for layer, attention in routed.attentions.items():
            hook = partial(_take_argument, layer, self._seats.get(layer))
            yield attention.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        for routing in routed.layers:
            seat = self._seats[routing.layer]
            yield routing.router.register_forward_hook(seat.route, prepend=True)
            if not routing.kind.returns_logits:
                yield routing.router.gate.register_forward_hook(seat.keep_logits)

    def end(self) -> None:
        """From here on a backward of a replayed forward is refused."""
        self._ended = True

    def _enter_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the backbone.

        Raises:
            ValueError: the argument is absent, or its shape, layers, top_k or ids do not fit the model and its input.
        """
        if ARGUMENT not in kwargs:
            raise ValueError(f"{ARGUMENT}: absent; pass a RoutedExpertsBatch, or None for the model's own routing")
        self._fired.clear()
        batch = kwargs[ARGUMENT]
        if batch is None:
            return
        if not isinstance(batch, RoutedExpertsBatch):
            raise ValueError(f"{ARGUMENT}: is a {type(batch).__name__}, must be a RoutedExpertsBatch or None")
        inputs = args[0] if args else kwargs.get("input_ids")
        shape = tuple((kwargs["inputs_embeds"] if inputs is None else inputs).shape[:2])
        if batch.shape != shape:
            raise ValueError(f"{ARGUMENT}: is for inputs of shape {batch.shape}, must be {shape} as they are")
        if batch.layer_ids != self.layer_ids or batch.top_k != self._top_k:
            raise ValueError(
                f"{ARGUMENT}: has layers {batch.layer_ids} and top_k {batch.top_k}, must be {self.layer_ids} and "
                f"{self._top_k} as the model's"
            )
        if batch.max_id >= self._num_experts:
            raise ValueError(f"{ARGUMENT}: has expert {batch.max_id}, must be below {self._num_experts}")

    def _leave_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the backbone.

        Raises:
            ReplayError: a layer's router did not run.
        """
        if bypassed := set(self.layer_ids) - self._fired:
            raise ReplayError(f"layers {sorted(bypassed)}: their routers did not run; a fused kernel bypasses them")
        batch = kwargs[ARGUMENT]
        if batch is None:
            return
        if output[0].requires_grad:
            output[0].register_hook(self._refuse_late_backward)
        if batch.counts.missing > 0 and self.counts.missing == 0:
            logger.warning(
                "routed experts: %d of %d tokens have no row; the model's own router decides for them (told once, "
                "Replay.counts has the sum)",
                batch.counts.missing,
                batch.counts.replayed + batch.counts.missing,
            )
        self.counts = self.counts + batch.counts

    def _refuse_late_backward(self, gradient: torch.Tensor) -> None:
        """Without hooks, activation checkpointing would recompute the layers with other routes, and nobody would know."""
        if self._ended:
            raise ReplayError("the backward of a replayed forward began after its replay_routing context had ended")


def _take_argument(
    layer: int, seat: _Seat | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a layer's attention, which must not see the argument itself. Dense layers have no seat."""
    if ARGUMENT not in kwargs:
        raise ReplayError(
            f"layer {layer}: {ARGUMENT} did not reach it; something between the model and it drops arguments"
        )
    batch = kwargs[ARGUMENT]
    if seat is not None:
        seat.leave(batch)
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}


@contextmanager
def replay_routing(model: nn.Module) -> Iterator[Replay]:
    """Within the context every forward of `model` needs `routed_experts`, a `RoutedExpertsBatch` or None.

    `model` is a `transformers` model or anything around one: a DeepSpeed engine, DDP, FSDP2. Nothing is added to it but
    hooks, which are gone afterwards. A replayed forward's backward belongs inside the context, too.

    Raises:
        ValueError: the model has no router that is known, or one that is not exactly where it should be, and once; or it
            is in such a context already.
    """
    routed = find_routed_model(model)
    if any(isinstance(_owner(hook), Replay) for hook in routed.backbone._forward_pre_hooks.values()):
        raise ValueError(f"{type(model).__name__}: is in a replay_routing context already")
    replay = Replay(routed.layers)
    with ExitStack() as stack:
        stack.callback(replay.end)
        for handle in replay.install(routed):
            stack.callback(handle.remove)
        yield replay


def _owner(hook: Any) -> object:
    return hook.__self__ if isinstance(hook, MethodType) else None
