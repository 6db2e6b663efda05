"""What the engine knows of a model: the protocol of every class in this folder that serves a `model_type`."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...parallel.moe.layer import RouteRecorder
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from .forward_batch import ForwardBatch
from .model_config import ModelConfig


@dataclass(frozen=True)
class FusedWeight:
    """A tensor that holds several of a checkpoint's in one: this rank's part of it, and the names of those."""

    weight: ShardedWeight
    names: frozenset[str]


@dataclass(frozen=True)
class IgnoredWeights:
    """Tensors that a checkpoint may have and the model does not need: by name, or by how a name begins or ends."""

    names: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        return name in self.names or name.startswith(self.prefixes) or name.endswith(self.suffixes)


class CausalLM(Protocol):
    """The model of one rank: token ids in, hidden states and logits out.

    Legend: T tokens of a step, N rows whose logits are wanted, D hidden, V vocabulary.
    """

    @property
    def config(self) -> ModelConfig: ...

    def __call__(
        self,
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv_store: KVStore,
        recorder: RouteRecorder | None,
    ) -> torch.Tensor:
        """A step's tokens to hidden states [T, D]; every MoE layer tells `recorder` the ids it chose."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> this rank's columns [N, V / n]."""
        ...

    def gather_logits(self, local: torch.Tensor) -> torch.Tensor | None:
        """Those of all ranks, [N, V], on tp rank 0, None elsewhere; every tp rank must call it."""
        ...

    @property
    def logit_columns(self) -> tuple[int, int]:
        """The token of this rank's first column, and how many columns are tokens."""
        ...

    @property
    def attention_shape(self) -> tuple[int, int]:
        """What attention gives for one token on this rank: heads and their width."""
        ...

    def kv_specs(self) -> list[KVTensorSpec]:
        """What a layer keeps of every token on this rank."""
        ...

    def sharded_weights(self) -> dict[str, ShardedWeight]:
        """Every tensor that a checkpoint must have, by its name there, and this rank's part of it."""
        ...

    def fused_weights(self) -> dict[str, FusedWeight]:
        """Other names under which several of these tensors may come as one."""
        ...

    @property
    def ignored_weights(self) -> Container[str]:
        """Names that a checkpoint may have and the model does not need."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
