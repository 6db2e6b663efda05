"""What a model is: facts read from a checkpoint's config.json, with the names that the engine uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from ...parallel.moe.activation import SwigluClamp
from ...parallel.moe.router import RouterConfig
from ...parallel.symmetric_memory import RowLayout
from ..routing.geometry import RouteGeometry

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (Su et al. 2021): inverse frequencies and the factor on cos and sin that some variants have."""

    inv_freq: tuple[float, ...]
    attention_scaling: float


class GroupedQueryConfig(msgspec.Struct, frozen=True, tag=True):
    """Grouped-query attention: query heads, the kv heads that groups of them share, and their width.

    `norms` is what queries and keys are normed over before they are turned: each "head", or all heads together ("width").
    `clip` bounds queries, keys and values. With `sinks` heads have scores without a value. `windows` has, for every layer,
    how many of the last keys a query sees.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    norms: Literal["none", "head", "width"] = "none"
    clip: float | None = None
    sinks: bool = False

    @property
    def tile_widths(self) -> dict[str, int]:
        """What kernels on CUDA hold whole, by its name in a configuration."""
        return {"head_dim": self.head_dim}


class LatentConfig(msgspec.Struct, frozen=True, tag=True):
    """Multi-head latent attention (DeepSeek-V2, 2024), by the names that its configurations have. `q_lora_rank`: None where
    queries come of no latent. `bias`: of the projections to latents, and of the output. `scale`: of scores."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    rope_interleave: bool
    bias: bool
    scale: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def tile_widths(self) -> dict[str, int]:
        """What kernels on CUDA hold whole, by its name in a configuration."""
        return {"kv_lora_rank": self.kv_lora_rank, "qk_rope_head_dim": self.qk_rope_head_dim}


# Kinds of attention, each a tagged structure with `rope`: what a token's entry in the cache is follows from it.
AttentionConfig = GroupedQueryConfig | LatentConfig


@dataclass(frozen=True)
class SharedExpertConfig:
    """An expert of every token, of this width; `gated`: weighted by the sigmoid of a score of its own."""

    intermediate_size: int
    gated: bool = False


@dataclass(frozen=True)
class MoeConfig:
    """The layers that route, and how. `intermediate_size` is an expert's; those with a `clamp` have biases, and a SwiGLU
    that is clamped."""

    layer_ids: tuple[int, ...]
    router: RouterConfig
    intermediate_size: int
    shared: SharedExpertConfig | None = None
    clamp: SwigluClamp | None = None

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k


@dataclass(frozen=True)
class VisionConfig:
    """Images in prompts: the token that stands for each of an image's positions, how many levels of the vision tower's
    features are added behind the first layers, and how many patches a position takes in height and in width.
    `mrope_section`: how many frequencies turn by the positions in time, height and width."""

    image_token_id: int
    num_levels: int
    spatial_merge_size: int
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only MoE model. Layers that do not route have a dense MLP of `intermediate_size`. A checkpoint may have
    `num_extra_layers` behind the model's own, which draft tokens and are not used. `wide_norms`: their weights
    are in float32. `is_fp8`: the matrices of linear and expert layers are, see `parallel/fp8.py`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention: AttentionConfig
    moe: MoeConfig
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype_name: str
    num_extra_layers: int = 0
    wide_norms: bool = False
    is_fp8: bool = False
    vision: VisionConfig | None = None

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype_name]

    @property
    def row_layout(self) -> RowLayout:
        """What ranks send each other for a token."""
        return RowLayout(self.hidden_size, self.moe.top_k, self.dtype)

    @property
    def vision_facts(self) -> dict[str, str]:
        """What must be alike in whoever encodes images for this model; nothing where it takes none."""
        if self.vision is None:
            return {}
        facts = {
            "hidden_size": self.hidden_size,
            "deepstack_levels": self.vision.num_levels,
            "image_token_id": self.vision.image_token_id,
            "spatial_merge_size": self.vision.spatial_merge_size,
        }
        return {name: str(value) for name, value in facts.items()}

    def router_weights_dtype(self, asked: str) -> str:
        """What recorded combine weights are kept in: what is asked for, or the router's own type ("auto")."""
        if asked != "auto":
            return asked
        return "bfloat16" if self.moe.router.weights_dtype(self.dtype) == torch.bfloat16 else "float32"

    def route_geometry(self, max_tokens: int, weights_dtype: str = "") -> RouteGeometry:
        """Shape of one step's routing for at most `max_tokens` rows; with combine weights, if they have a type."""
        return RouteGeometry(
            layer_ids=self.moe.layer_ids,
            num_layers_total=self.num_layers,
            max_tokens=max_tokens,
            top_k=self.moe.top_k,
            num_experts=self.moe.num_experts,
            weights_dtype=weights_dtype,
        )


def refuse_others(hf_config: Any, **values: Any) -> None:
    """
    Raises:
        ValueError: one of these settings is another than what the model file computes.
    """
    for name, value in values.items():
        found = getattr(hf_config, name)
        if found != value:
            raise ValueError(f"{name}={found!r}: must be {value!r}")


def model_config(
    hf_config: Any, model_path: str, dtype: str, attention: AttentionConfig, moe: MoeConfig, **others: Any
) -> ModelConfig:
    """With what every family's configuration has."""
    fields = {
        "intermediate_size": hf_config.intermediate_size,
        "rms_norm_eps": hf_config.rms_norm_eps,
        "tie_word_embeddings": hf_config.tie_word_embeddings,
        "max_position_embeddings": hf_config.max_position_embeddings,
        "eos_token_ids": eos_ids(model_path, hf_config.eos_token_id),
        "dtype_name": resolve_dtype(dtype, hf_config.dtype),
    }
    return ModelConfig(
        hf_config.model_type,
        hf_config.vocab_size,
        hf_config.hidden_size,
        hf_config.num_hidden_layers,
        attention,
        moe,
        **(fields | others),
    )


def windows_of(hf_config: Any) -> tuple[int | None, ...]:
    """By layer, where the configuration names each layer's kind.

    Raises:
        ValueError: a kind that is not known, or a layer with a window of no width.
    """
    windows: list[int | None] = []
    for kind in hf_config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types: {kind!r} must be 'full_attention' or 'sliding_attention'")
        if kind == "sliding_attention" and not hf_config.sliding_window:
            raise ValueError(f"sliding_window={hf_config.sliding_window!r}: layer_types has layers with one")
        windows.append(hf_config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows)


def head_width(hf_config: Any) -> int:
    """Where the configuration may leave it out."""
    stated = hf_config.to_dict().get("head_dim")
    return stated or hf_config.hidden_size // hf_config.num_attention_heads


def resolve_dtype(name: str, checkpoint_dtype: torch.dtype | None) -> str:
    """The name of the dtype to run in: the given one, or the checkpoint's.

    Raises:
        ValueError: the checkpoint's is none that the engine runs in.
    """
    if name == "auto":
        name = str(checkpoint_dtype or torch.float32).removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ValueError(f"dtype: the checkpoint's is {name}, must be one of {', '.join(TORCH_DTYPES)}")
    return name


def eos_ids(model_path: str, configured: int | list[int] | None) -> tuple[int, ...]:
    """Ids that end a sequence: those of generation_config.json where it stands, else those of config.json."""
    if (Path(model_path) / "generation_config.json").is_file():
        from transformers import GenerationConfig  # noqa: PLC0415

        generation = GenerationConfig.from_pretrained(model_path)
        if generation.eos_token_id is not None:
            configured = generation.eos_token_id
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list) else (configured,)
