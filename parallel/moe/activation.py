"""What is between an expert's two products: SwiGLU (Shazeer 2020), plain or as gpt-oss has it, with biases.

Legend: T tokens, D hidden, F experts on this rank, I intermediate width on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SwigluClamp:
    """(up + 1) * gate * sigmoid(alpha * gate), the gate at most `limit`, up between its negative and it."""

    alpha: float
    limit: float


@dataclass(frozen=True, eq=False)
class ClampedExperts:
    """What experts with a clamped SwiGLU have beside their matrices: biases, `gate_up` [F, 2I] and `down` [F, D]. Of their
    gate_up matrices' rows the even ones are gate, the odd ones up."""

    gate_up_bias: torch.Tensor
    down_bias: torch.Tensor
    clamp: SwigluClamp


def activate(gate_up: torch.Tensor, clamped: ClampedExperts | None, expert: int) -> torch.Tensor:
    """An expert's first product [T, 2I] to what its second one takes, [T, I]."""
    if clamped is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate_up = gate_up + clamped.gate_up_bias[expert]
    limit = clamped.clamp.limit
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * clamped.clamp.alpha))


def add_down_bias(result: torch.Tensor, clamped: ClampedExperts | None, expert: int) -> torch.Tensor:
    """To an expert's second product [T, D]."""
    return result if clamped is None else result + clamped.down_bias[expert]
