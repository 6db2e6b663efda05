"""What a checkpoint's `quantization_config` may say, and which of its modules are quantised.

Block FP8 as DeepSeek-V3 has it: e4m3, a scale for 128 x 128 numbers of a matrix (`weight_scale_inv`), activations quantised
as they come. Embedding, head, norms and routers stay in floating point.
"""

from __future__ import annotations

import re
from typing import Any

from ...parallel.fp8 import BLOCK

FP8 = "fp8"
# By the last part of a module's name.
IN_FLOATING_POINT = re.compile(r"(^|\.)(lm_head|embed_tokens|[a-z_]*norm|gate|router|shared_expert_gate|rotary_emb)$")


def is_quantised(module: str) -> bool:
    """Whether a checkpoint in FP8 has this module's weight in it, if it is a matrix."""
    return IN_FLOATING_POINT.search(module) is None


def check_quantisation(config: dict[str, Any], legal: frozenset[str], model_type: str) -> None:
    """
    Raises:
        ValueError: the engine does not compute with what it says, or `legal` has not its method.
    """
    method = config.get("quant_method")
    if method not in legal:
        raise ValueError(
            f"quantization_config.quant_method={method!r}: "
            + (f"must be {' or '.join(sorted(legal))}" if legal else f"{model_type} checkpoints must not be quantised")
        )
    if method != FP8:
        return
    for name, only in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("weight_block_size", [BLOCK, BLOCK])):
        found = config.get(name, only)
        if (list(found) if isinstance(found, tuple) else found) != only:
            raise ValueError(f"quantization_config.{name}={found!r}: must be {only!r}")
    for module in config.get("modules_to_not_convert") or ():
        if is_quantised(module):
            raise ValueError(
                f"quantization_config.modules_to_not_convert: {module!r} must be in FP8, as all matrices of linear and "
                "expert layers"
            )
