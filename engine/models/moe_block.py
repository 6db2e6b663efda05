"""The MLP of a layer that routes, and its tensors by their names in a checkpoint.

Legend: T tokens, P rows that this rank holds between the layers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...parallel.cpu_ops.activation import sigmoid
from ...parallel.dp_attention import TokenLayout
from ...parallel.moe.experts import Experts
from ...parallel.moe.layer import MoeLayer, RouteRecorder
from ...parallel.moe.router import TopKRouter
from ...parallel.partial_sum import PartialSum
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight
from .dense_mlp import DenseBlock, DenseMLP
from .model_config import SharedExpertConfig
from .model_context import ModelContext

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class MoeNames:
    """What a family's checkpoints on the hub call a layer's block and what is in it; `parts` are the projections of an
    expert: gate, up and down."""

    block: str = "mlp"
    router: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"


class SharedExpert(nn.Module):
    """A `SharedPart`: [T, D] -> partial sums [T, D]; where there is a gate its sigmoid weighs them, row by row."""

    def __init__(self, config: SharedExpertConfig, context: ModelContext) -> None:
        super().__init__()
        self.mlp = DenseMLP(context, config.intermediate_size)
        self.gate = context.weight_format.empty(1, context.config.hidden_size) if config.gated else None
        self._linear = context.weight_format.linear()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weigh(hidden, self.unweighted(hidden))

    def unweighted(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(hidden)
        return out

    def weigh(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out if self.gate is None else sigmoid(self._linear(hidden, self.gate, None)) * out

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        weights = self.mlp.sharded_weights(prefix)
        if self.gate is not None:
            weights[f"{prefix}_gate.weight"] = ShardedWeight.of(tuple(self.gate.shape), self.gate.data)
        return weights


class MoeBlock(nn.Module):
    """A `LayerMLP`: its experts over the expert-parallel axis, what all tokens share over that of the dense parts."""

    def __init__(self, layer_id: int, context: ModelContext, names: MoeNames) -> None:
        super().__init__()
        config, moe = context.config, context.config.moe
        self._names = names
        self._num_experts = moe.num_experts
        self.router = TopKRouter(config.hidden_size, moe.router, weight_format=context.weight_format)
        self.experts = Experts(
            moe.num_experts,
            config.hidden_size,
            moe.intermediate_size,
            context.mesh.ep,
            split=context.moe_split,
            backend=context.experts_backend,
            weight_format=context.weight_format,
            clamp=moe.clamp,
        )
        self.shared = None if moe.shared is None else SharedExpert(moe.shared, context)
        index = moe.layer_ids.index(layer_id)
        self.layer = MoeLayer(index, self.router, context.make_dispatcher(), self.experts, self.shared)

    def forward(self, hidden: torch.Tensor, layout: TokenLayout, recorder: RouteRecorder | None) -> PartialSum:
        summed: PartialSum = self.layer(hidden, layout, recorder)
        return summed

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        prefix = f"{layer}.{self._names.block}"
        weights = self.router.sharded_weights(f"{prefix}.{self._names.router}") | self.expert_weights(prefix)
        if self.shared is not None:
            weights.update(self.shared.sharded_weights(f"{prefix}.{self._names.shared}"))
        return weights

    def expert_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        """On the hub: one tensor per expert and projection. `prefix` is the block's name."""
        return {
            name: self.experts.sharded_weight(expert, part)
            for part, names in self._expert_names(prefix).items()
            for expert, name in enumerate(names)
        }

    def fused_weights(self, layer: str) -> dict[str, FusedWeight]:
        """As `transformers` holds them in memory, and a trainer may send them."""
        experts = self._expert_names(f"{layer}.{self._names.block}")
        fused = {
            f"{layer}.mlp.experts.gate_up_proj": FusedWeight(
                self.experts.fused_weight("gate_up"), frozenset(experts["gate"] + experts["up"])
            ),
            f"{layer}.mlp.experts.down_proj": FusedWeight(
                self.experts.fused_weight("down"), frozenset(experts["down"])
            ),
        }
        if self._names.block != "mlp":
            on_hub = self.router.sharded_weights(f"{layer}.{self._names.block}.{self._names.router}")
            in_memory = self.router.sharded_weights(f"{layer}.mlp.{self._names.router}")
            for name, known, weight in zip(in_memory, on_hub, on_hub.values(), strict=True):
                fused[name] = FusedWeight(weight, frozenset({known}))
        return fused

    def _expert_names(self, prefix: str) -> dict[str, list[str]]:
        """Tensors of all experts, by projection; `prefix` is the block's name."""
        return {
            part: [f"{prefix}.experts.{expert}.{name}.weight" for expert in range(self._num_experts)]
            for part, name in zip(PARTS, self._names.parts, strict=True)
        }


@dataclass(frozen=True)
class MixedMLP:
    """Makes each layer's MLP: experts where the configuration says so, else a dense one."""

    names: MoeNames = MoeNames()
    block: type[MoeBlock] = MoeBlock

    def __call__(self, layer_id: int, context: ModelContext) -> MoeBlock | DenseBlock:
        if layer_id in context.config.moe.layer_ids:
            return self.block(layer_id, context, self.names)
        return DenseBlock(context)
