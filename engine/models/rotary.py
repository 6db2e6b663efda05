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


class InterleavedRotary(RotaryEmbedding):
    """Of tokens that have positions in time, height and width (Qwen3-VL): every third frequency is turned by the height,
    and every third by the width, as far as their sections go; all others by the time."""

    def __init__(self, num_positions: int, context: ModelContext) -> None:
        super().__init__(num_positions, context)
        vision = context.config.vision
        assert vision is not None
        num_frequencies = self.cos.shape[1] // 2
        axes = torch.zeros(num_frequencies, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : 3 * vision.mrope_section[axis] : 3] = axis
        axes = torch.cat((axes, axes)).to(self.cos.device)
        self._by_height, self._by_width = axes == 1, axes == 2

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T], which are the same in all three, as of text, or [3, T]."""
        if positions.dim() == 1:
            return super().forward(positions)
        time, height, width = positions
        cos, sin = (
            torch.where(self._by_height, table[height], torch.where(self._by_width, table[width], table[time]))
            for table in (self.cos, self.sin)
        )
        return cos.unsqueeze(1), sin.unsqueeze(1)


def make_rotary(num_positions: int, context: ModelContext) -> RotaryEmbedding:
    has_images = context.config.vision is not None
    return InterleavedRotary(num_positions, context) if has_images else RotaryEmbedding(num_positions, context)
