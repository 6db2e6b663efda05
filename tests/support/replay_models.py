"""Tiny random models of every family that can replay, and a dense MoE written by hand to compare them with.

Legend: B batch rows, S length, T = B * S tokens, E experts, K experts per token, M MoE layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.transformers_reference import auto_class
from waybill.engine.routing.wire import RoutedExperts, encode

NUM_EXPERTS, TOP_K, VOCAB = 8, 3, 64
IMAGE_PAD = 63
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN: dict[str, Any] = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
# Layer 0 is dense where the family allows it.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0]),
    "qwen3_moe_unnormalised": lambda: Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8, norm_topk_prob=False),
    "qwen3_vl_moe": lambda: Qwen3VLMoeConfig(
        text_config={
            **SIZES,
            **QWEN,
            "head_dim": 8,
            "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "patch_size": 4,
            "out_hidden_size": SIZES["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE_PAD,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=NUM_EXPERTS),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=NUM_EXPERTS),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES,
        n_routed_experts=NUM_EXPERTS,
        moe_intermediate_size=16,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        **LATENT,
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **SIZES,
        head_dim=8,
        n_routed_experts=NUM_EXPERTS,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(
        **SIZES,
        **LATENT,
        n_routed_experts=NUM_EXPERTS,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.8,
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, head_dim=8, num_local_experts=NUM_EXPERTS, swiglu_limit=1.0),
}
# Those that score with a sigmoid, and share experts.
LIKE_DEEPSEEK = {"deepseek_v3", "glm4_moe", "glm4_moe_lite"}


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model in training mode."""
    torch.manual_seed(seed)
    # torch's grouped products know no float64.
    experts = "eager" if dtype == torch.float64 else "grouped_mm"
    config = CONFIGS[family]()
    model = auto_class(config).from_config(config, dtype=dtype, experts_implementation=experts)
    if family in LIKE_DEEPSEEK:
        for layer in moe_layers(model):
            # A bias that would show if it entered the weights.
            layer.mlp.gate.e_score_correction_bias.normal_()
    return model.train()


def moe_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in decoder_layers(model) if hasattr(layer.mlp, "experts")]


def decoder_layers(model: nn.Module) -> list[Any]:
    """Those behind a vision tower, if there is one."""
    return list((model.model.language_model if hasattr(model.model, "visual") else model.model).layers)


def router_of(block: Any) -> Any:
    return block.router if hasattr(block, "router") else block.gate


def layer_ids(model: nn.Module) -> tuple[int, ...]:
    return tuple(index for index, layer in enumerate(decoder_layers(model)) if hasattr(layer.mlp, "experts"))


def make_routes(model: nn.Module, rows: np.ndarray, start: int = 0) -> RoutedExperts:
    """Rows [R, M, K] in their envelope."""
    layers = layer_ids(model)
    geometry = RouteGeometry(layers, len(decoder_layers(model)), 1, rows.shape[2], NUM_EXPERTS)
    return encode(rows, start, geometry, [("0", start, start + len(rows))])


def random_rows(model: nn.Module, num_rows: int, seed: int = 0) -> np.ndarray:
    """Distinct ids [R, M, K] that no router chose."""
    scores = np.random.default_rng(seed).random((num_rows, len(layer_ids(model)), NUM_EXPERTS))
    return scores.argsort(axis=-1)[..., :TOP_K].astype(np.uint8)


def random_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def received_by_experts(model: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """Per MoE layer, the ids [T, K] that its experts were given, one item per call."""
    received: list[list[torch.Tensor]] = []
    handles = []
    for layer in moe_layers(model):
        calls: list[torch.Tensor] = []
        received.append(calls)
        handles.append(
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1].clone()))
        )
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


def native_rows(model: nn.Module, **inputs: Any) -> np.ndarray:
    """The model's own routing [T, M, K] of a forward."""
    with received_by_experts(model) as received, torch.no_grad():
        model(**inputs)
    return torch.stack([calls[-1] for calls in received], dim=1).numpy().astype(np.uint8)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients, which are then cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def make_dense(model: nn.Module, rows: torch.Tensor) -> None:
    """Replace every MoE block's forward by one that runs all experts on all tokens and masks: rows [T, M, K]."""
    for column, layer in enumerate(moe_layers(model)):
        layer.mlp.forward = partial(_dense_forward, layer.mlp, model.config.get_text_config(), rows[:, column])


def _dense_gpt_oss(block: Any, config: Any, ids: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    logits = flat @ block.router.weight.T + block.router.bias
    weights = torch.zeros_like(logits).scatter(1, ids, torch.softmax(logits.gather(1, ids), dim=-1))
    experts, limit = block.experts, config.swiglu_limit
    both = torch.einsum("td,edf->tef", flat, experts.gate_up_proj) + experts.gate_up_proj_bias
    gate, up = both[..., ::2].clamp(max=limit), both[..., 1::2].clamp(-limit, limit)
    activated = (up + 1) * gate * torch.sigmoid(gate * config.swiglu_alpha)
    out = torch.einsum("tef,efd->ted", activated, experts.down_proj) + experts.down_proj_bias
    return torch.einsum("te,ted->td", weights, out)


def _dense_forward(block: Any, config: Any, ids: torch.Tensor, hidden: torch.Tensor) -> Any:
    flat = hidden.reshape(-1, hidden.shape[-1])
    if config.model_type == "gpt_oss":
        return _dense_gpt_oss(block, config, ids, flat).reshape(hidden.shape), None
    mask = F.one_hot(ids, NUM_EXPERTS).sum(dim=1)
    logits = flat @ block.gate.weight.T
    if config.model_type in LIKE_DEEPSEEK:
        weights = mask * torch.sigmoid(logits.float())
    else:
        weights = mask * torch.softmax(logits.float(), dim=-1)
    if config.model_type in ("mixtral", "qwen3_vl_moe_text") or config.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if config.model_type in LIKE_DEEPSEEK:
        weights = weights * config.routed_scaling_factor
    gate, up = torch.einsum("td,efd->tef", flat, block.experts.gate_up_proj).chunk(2, dim=-1)
    out = torch.einsum("tef,edf->ted", F.silu(gate) * up, block.experts.down_proj)
    result = torch.einsum("te,ted->td", weights.to(out.dtype), out).reshape(hidden.shape)
    if config.model_type == "qwen2_moe":
        result = result + torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)
    if config.model_type in LIKE_DEEPSEEK:
        result = result + block.shared_experts(hidden)
    return result
