"""SwiGLU in bfloat16 and the sigmoid in float32, `activation_bf16.cpp`.

Legend: T tokens, I width of an MLP.
"""

from __future__ import annotations

import torch

from .library import has_operator, load_operators

SWIGLU, SIGMOID = "waybill_swiglu_bf16", "waybill_sigmoid"


def swiglu_native(gate_up: torch.Tensor) -> torch.Tensor:
    """Gates and what they weigh, side by side [T, 2 I], in bfloat16 -> silu(gate) * up, [T, I]."""
    assert gate_up.dtype == torch.bfloat16 and gate_up.stride(1) == 1
    num_tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    load_operators()[SWIGLU](
        gate_up.data_ptr(), out.data_ptr(), num_tokens, width, gate_up.stride(0), torch.get_num_threads()
    )
    return out


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Of numbers of any shape, computed in float32; by torch where there is no operator."""
    if x.device.type != "cpu" or not has_operator(SIGMOID):
        return x.sigmoid()
    wide = x.float().contiguous()
    out = torch.empty_like(wide)
    load_operators()[SIGMOID](wide.data_ptr(), out.data_ptr(), wide.numel())
    return out.to(x.dtype)
