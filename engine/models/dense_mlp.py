"""The MLP of layers that do not route, and of experts that all tokens share.

Legend: T tokens, P rows that this rank holds between the layers, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn

from ...parallel.dp_attention import TokenLayout
from ...parallel.linear import MergedColumnParallelLinear, RowParallelLinear
from ...parallel.moe.layer import RouteRecorder
from ...parallel.partial_sum import PartialSum
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight
from .model_context import ModelContext
from .norm_rope import select_layer_ops


class DenseMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), as partial sums over the axis."""

    def __init__(self, context: ModelContext, width: int) -> None:
        super().__init__()
        config = context.config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], context.axis, weight_format=context.weight_format
        )
        self.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            context.axis,
            weight_format=context.weight_format,
        )
        self._ops = select_layer_ops(context.mesh.device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self._ops.swiglu(self.gate_up_proj(hidden)))
        return out

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        return {
            f"{prefix}.gate_proj.weight": self.gate_up_proj.sharded_weight(part=0),
            f"{prefix}.up_proj.weight": self.gate_up_proj.sharded_weight(part=1),
            f"{prefix}.down_proj.weight": self.down_proj.sharded_weight(),
        }


class DenseBlock(nn.Module):
    """The MLP of a layer that does not route, as a `LayerMLP`."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.mlp = DenseMLP(context, context.config.intermediate_size)

    def forward(self, hidden: torch.Tensor, layout: TokenLayout, recorder: RouteRecorder | None) -> PartialSum:
        return layout.run_sharded(self.mlp, hidden)

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        return self.mlp.sharded_weights(f"{layer}.mlp")

    def fused_weights(self, layer: str) -> dict[str, FusedWeight]:
        return {}
