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
IN_FLOATING_POINT = re.compile(
    r"(^|\.)(lm_head|embed_tokens|[a-z_]*norm|gate|router|shared_expert_gate|rotary_emb|e_score_correction_bias)$"
)
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
# What else than the engine's own a configuration may say.
NOT_CONVERTED = ("modules_to_not_convert", "ignored_layers")
ONLY = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "dequantize": False,
    "scale_fmt": None,
    "modules_to_convert": None,
}


def is_quantised(module: str) -> bool:
    """Whether a checkpoint in FP8 has this module's weight in it, if it is a matrix."""
    return IN_FLOATING_POINT.search(module) is None


def check_quantisation(config: dict[str, Any], legal: frozenset[str], model_type: str, num_layers: int) -> None:
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
    for name, found in config.items():
        if name not in ("quant_method", *NOT_CONVERTED, *ONLY):
            raise ValueError(f"quantization_config.{name}={found!r}: is not known")
        if name in ONLY and found != ONLY[name]:
            raise ValueError(f"quantization_config.{name}={found!r}: must be {ONLY[name]!r}")
    for field in NOT_CONVERTED:
        for module in config.get(field) or ():
            layer = LAYER.search(module)
            is_unused = layer is not None and int(layer[1]) >= num_layers
            if is_quantised(module) and not is_unused:
                raise ValueError(
                    f"quantization_config.{field}: {module!r} must be in FP8, as all matrices of linear and expert layers"
                )
