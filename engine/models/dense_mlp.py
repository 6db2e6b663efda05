"""The MLP of layers that do not route.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...parallel.linear import MergedColumnParallelLinear, RowParallelLinear
from ...parallel.weights import ShardedWeight
from .model_context import ModelContext


class DenseMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), as partial sums over the axis."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        sizes = [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, sizes, context.axis, weight_format=context.weight_format
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            context.axis,
            weight_format=context.weight_format,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        return {
            f"{prefix}.gate_proj.weight": self.gate_up_proj.sharded_weight(part=0),
            f"{prefix}.up_proj.weight": self.gate_up_proj.sharded_weight(part=1),
            f"{prefix}.down_proj.weight": self.down_proj.sharded_weight(),
        }
