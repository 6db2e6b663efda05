"""Rotary position embedding (Su et al. 2021): a checkpoint's frequencies, and cos and sin of every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .model_config import RopeConfig
from .model_context import ModelContext


def parse_rope(hf_config: Any, width: int, *, in_part: bool = False) -> RopeConfig:
    """Frequencies as `transformers` computes them; `width` of a head's dims are turned, or, of a family that turns them
    `in_part`, as many of them as the configuration says.

    Raises:
        ValueError: a variant whose frequencies change with the length.
    """
    rope_type = hf_config.rope_parameters["rope_type"]
    if rope_type == "default":
        if in_part:
            width = int(width * hf_config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return RopeConfig(tuple((1.0 / hf_config.rope_parameters["rope_theta"] ** exponents).tolist()), 1.0)
    if rope_type not in ("linear", "yarn", "llama3"):
        raise ValueError(f"rope_parameters.rope_type={rope_type!r}: must be default, linear, yarn or llama3")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    return RopeConfig(tuple(inv_freq.tolist()), scaling)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position up to the context length, [positions, d] each, in the model's dtype."""

    def __init__(self, num_positions: int, context: ModelContext) -> None:
        super().__init__()
        rope = context.config.attention.rope
        inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        dtype = context.config.dtype
        self.cos = (angles.cos() * rope.attention_scaling).to(dtype).to(context.mesh.device)
        self.sin = (angles.sin() * rope.attention_scaling).to(dtype).to(context.mesh.device)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] -> cos, sin [T, 1, d], for all heads of a token."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
