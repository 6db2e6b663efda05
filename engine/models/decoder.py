"""A decoder-only language model of any family: embedding, layers of attention and MLP, head.

What a family's layers are made of is an argument (`LayerParts`); the residual stream, the norms between, and how rows are
spread over ranks are the same for all. The arithmetic is that of `transformers`, operation by operation, so that greedy
tokens and routes agree with it; what differs is where weights live (sharded over `tp`), and that keys and values go to
pages.

Legend: T tokens of a step, P rows that this rank holds between the layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...parallel.dp_attention import TokenLayout
from ...parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from ...parallel.fp8 import with_scales
from ...parallel.moe.layer import RouteRecorder
from ...parallel.partial_sum import PartialSum
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend, CachedTensors
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from .causal_lm import FusedWeight, IgnoredWeights
from .forward_batch import ForwardBatch
from .model_context import ModelContext
from .rms_norm import RMSNorm
from .rotary import make_rotary

# Older versions of `transformers` have saved it; it follows from the configuration.
FREQUENCIES = ".rotary_emb.inv_freq"


class LayerAttention(Protocol):
    """The attention of a layer, this rank's heads."""

    def __call__(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: CachedTensors,
    ) -> torch.Tensor:
        """[T, D] -> partial sums [T, D]; writes what is cached of this step's tokens first."""
        ...

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        """Its tensors; `layer` is what the layer is called in a checkpoint."""
        ...

    @property
    def output_shape(self) -> tuple[int, int]:
        """What attention gives for one token: heads of this rank and their width."""
        ...

    def kv_specs(self, dtype: torch.dtype) -> list[KVTensorSpec]: ...


class LayerMLP(Protocol):
    """What follows attention in a layer: a dense MLP, or routed experts."""

    def __call__(self, hidden: torch.Tensor, layout: TokenLayout, recorder: RouteRecorder | None) -> PartialSum:
        """[P, D] -> [P, D]; one that routes tells `recorder` the ids it chose."""
        ...

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]: ...

    def fused_weights(self, layer: str) -> dict[str, FusedWeight]: ...


@dataclass(frozen=True)
class LayerParts:
    """How a family's layers are made, by their number."""

    attention: Callable[[int, ModelContext], LayerAttention]
    mlp: Callable[[int, ModelContext], LayerMLP]


class DecoderLayer(nn.Module):
    def __init__(self, attention: LayerAttention, mlp: LayerMLP, context: ModelContext) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(context.config.hidden_size, context)
        self.post_attention_layernorm = RMSNorm(context.config.hidden_size, context)

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: CachedTensors,
        recorder: RouteRecorder | None,
    ) -> tuple[PartialSum, torch.Tensor]:
        """The input, normed and as it is, to what the MLP adds and the residual stream to add it to, all [P, D]: this
        rank's rows, as `batch.layout` spreads them."""
        layout = batch.layout
        attended = layout.run_sharded(lambda rows: self.self_attn(rows, rope, batch, backend, kv), normed)
        normed, residual = self.post_attention_layernorm.add(attended, residual)
        return self.mlp(normed, layout, recorder), residual

    def sharded_weights(self, layer: str) -> dict[str, ShardedWeight]:
        return {
            f"{layer}.input_layernorm.weight": self.input_layernorm.sharded_weight(),
            f"{layer}.post_attention_layernorm.weight": self.post_attention_layernorm.sharded_weight(),
            **self.self_attn.sharded_weights(layer),
            **self.mlp.sharded_weights(layer),
        }


class DecoderLM(nn.Module):
    """A `CausalLM`."""

    # What a checkpoint calls the part of the model that has the layers.
    backbone = "model"

    def __init__(self, context: ModelContext, num_positions: int, parts: LayerParts) -> None:
        super().__init__()
        config = context.config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, context.axis, weight_format=context.weight_format
        )
        self.rotary = make_rotary(num_positions, context)
        self.layers = nn.ModuleList(
            DecoderLayer(parts.attention(layer_id, context), parts.mlp(layer_id, context), context)
            for layer_id in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, context)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, context.axis, weight_format=context.weight_format
        )
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed_tokens)

    def forward(
        self,
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv_store: KVStore,
        recorder: RouteRecorder | None,
    ) -> torch.Tensor:
        residual = batch.layout.scatter(self.embed_tokens(batch.input_ids))
        visual = batch.visual
        if visual is not None:
            residual = visual.replace(residual)
        rope = self.rotary(batch.positions if batch.rope_positions is None else batch.rope_positions)
        layers = self.decoder_layers()
        normed = layers[0].input_layernorm(residual)
        for layer_id, layer in enumerate(layers):
            added, residual = layer(normed, residual, rope, batch, backend, kv_store.layer(layer_id), recorder)
            # The norm that comes next takes the sum along.
            following = layers[layer_id + 1].input_layernorm if layer_id + 1 < len(layers) else self.norm
            normed, residual = following.add(added, residual)
            if visual is not None and layer_id < visual.num_levels:
                residual = visual.add(residual, layer_id)
                normed = following(residual)
        return batch.layout.gather(normed)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def gather_logits(self, local: torch.Tensor) -> torch.Tensor | None:
        return self.lm_head.gather(local)

    @property
    def logit_columns(self) -> tuple[int, int]:
        return self.lm_head.columns

    def decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def attention_shape(self) -> tuple[int, int]:
        return self.decoder_layers()[0].self_attn.output_shape

    def kv_specs(self) -> list[KVTensorSpec]:
        return self.decoder_layers()[0].self_attn.kv_specs(self.config.dtype)

    def sharded_weights(self) -> dict[str, ShardedWeight]:
        weights = {
            f"{self.backbone}.embed_tokens.weight": self.embed_tokens.sharded_weight(),
            f"{self.backbone}.norm.weight": self.norm.sharded_weight(),
        }
        if not self.config.tie_word_embeddings:
            weights["lm_head.weight"] = self.lm_head.sharded_weight()
        for layer_id, layer in enumerate(self.decoder_layers()):
            weights.update(layer.sharded_weights(self.layer_name(layer_id)))
        return with_scales(weights)

    def fused_weights(self) -> dict[str, FusedWeight]:
        fused: dict[str, FusedWeight] = {}
        for layer_id, layer in enumerate(self.decoder_layers()):
            fused.update(layer.mlp.fused_weights(self.layer_name(layer_id)))
        return fused

    @property
    def ignored_weights(self) -> IgnoredWeights:
        first = self.config.num_layers
        return IgnoredWeights(
            frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ()),
            tuple(f"{self.layer_name(first + extra)}." for extra in range(self.config.num_extra_layers)),
            (FREQUENCIES,),
        )

    def layer_name(self, layer_id: int) -> str:
        """What a checkpoint calls it."""
        return f"{self.backbone}.layers.{layer_id}"
