"""Qwen3-MoE (Qwen Team 2025): GQA with per-head query/key norms, rotary positions, top-k softmax routing.

The arithmetic is that of `transformers`' Qwen3MoeForCausalLM, operation by operation, so that greedy tokens and routes
agree with it; what differs is where weights live (sharded over `tp`) and that keys and values go to pages.

Legend: T tokens of a step, D hidden, H query heads of this rank, G kv heads of this rank, d head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from ...parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from ...parallel.mesh import Axis, ParallelMesh
from ...parallel.moe.all_to_all import AllToAllDispatcher
from ...parallel.moe.dispatch import AllGatherDispatcher, Dispatcher, ReplicatedDispatcher, SyncClock
from ...parallel.moe.experts import Experts
from ...parallel.moe.layer import MoeLayer, RouteRecorder
from ...parallel.moe.router import TopKRouter
from ...parallel.weights import ShardedWeight
from ..attention.backend import AttentionBackend
from ..forward_batch import ForwardBatch
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from .fused_weights import FusedWeight
from .model_config import ModelConfig, RopeConfig, eos_ids, resolve_dtype
from .norm_rope import HeadNorms, select_layer_ops


def parse_config(hf_config: Qwen3MoeConfig, model_path: str, dtype: str) -> ModelConfig:
    """The engine's view of a checkpoint's configuration.

    Raises:
        ValueError: the checkpoint asks for something that this model file does not compute.
    """
    if hf_config.sliding_window is not None:
        raise ValueError("sliding_window: must be null; sliding-window attention is not supported")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"hidden_act={hf_config.hidden_act!r}: must be 'silu'")
    num_layers = hf_config.num_hidden_layers
    moe_layer_ids = tuple(
        layer
        for layer in range(num_layers)
        if layer not in hf_config.mlp_only_layers and (layer + 1) % hf_config.decoder_sparse_step == 0
    )
    if not moe_layer_ids or hf_config.num_experts == 0:
        raise ValueError(
            "the checkpoint has no MoE layer: decoder_sparse_step, mlp_only_layers or num_experts exclude all"
        )
    return ModelConfig(
        model_type=hf_config.model_type,
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        num_layers=num_layers,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=hf_config.head_dim,
        attention_bias=hf_config.attention_bias,
        intermediate_size=hf_config.intermediate_size,
        moe_intermediate_size=hf_config.moe_intermediate_size,
        moe_layer_ids=moe_layer_ids,
        num_experts=hf_config.num_experts,
        top_k=hf_config.num_experts_per_tok,
        norm_topk_prob=hf_config.norm_topk_prob,
        rms_norm_eps=hf_config.rms_norm_eps,
        rope=_parse_rope(hf_config),
        tie_word_embeddings=hf_config.tie_word_embeddings,
        max_position_embeddings=hf_config.max_position_embeddings,
        eos_token_ids=eos_ids(model_path, hf_config.eos_token_id),
        dtype=resolve_dtype(dtype, hf_config.dtype),
    )


def _parse_rope(hf_config: Qwen3MoeConfig) -> RopeConfig:
    """Frequencies as the library computes them; variants whose frequencies change with the length are refused."""
    rope_type = hf_config.rope_parameters["rope_type"]
    if rope_type == "default":
        width = hf_config.head_dim
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return RopeConfig(tuple((1.0 / hf_config.rope_parameters["rope_theta"] ** exponents).tolist()), 1.0)
    if rope_type not in ("linear", "yarn", "llama3"):
        raise ValueError(f"rope_parameters.rope_type={rope_type!r}: must be default, linear, yarn or llama3")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    return RopeConfig(tuple(inv_freq.tolist()), scaling)


@dataclass(frozen=True)
class ModelContext:
    """What every layer is built with."""

    config: ModelConfig
    mesh: ParallelMesh
    moe_split: str = "ep"
    experts_backend: str = "auto"
    dispatcher: str = "all_gather"
    clock: SyncClock = field(default_factory=SyncClock)

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def axis(self) -> Axis:
        """What attention, dense MLPs and the vocabulary are sharded over."""
        return self.mesh.tp

    def make_dispatcher(self) -> Dispatcher:
        if self.mesh.dp.size == 1:
            return ReplicatedDispatcher(self.mesh.world)
        if self.dispatcher == "all_to_all":
            return AllToAllDispatcher(self.mesh.world, self.config.num_experts, self.clock)
        return AllGatherDispatcher(self.mesh.world, self.clock)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last dim, alone or of a sum."""

    def __init__(self, width: int, context: ModelContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=context.config.dtype, device=context.device), False)
        self._eps = context.config.rms_norm_eps
        self._ops = select_layer_ops(context.device)

    def sharded_weight(self) -> ShardedWeight:
        return ShardedWeight.of(tuple(self.weight.shape), self.weight.data)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(hidden, self.weight, self._eps)

    def add(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden + residual`, and that sum, which may overwrite `residual`."""
        return self._ops.add_rms_norm(hidden, residual, self.weight, self._eps)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position up to the context length, [positions, d] each, in the model's dtype."""

    def __init__(self, num_positions: int, context: ModelContext) -> None:
        super().__init__()
        rope = context.config.rope
        inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        dtype = context.config.dtype
        self.cos = (angles.cos() * rope.attention_scaling).to(dtype).to(context.device)
        self.sin = (angles.sin() * rope.attention_scaling).to(dtype).to(context.device)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] -> cos, sin [T, 1, d], for all heads of a token."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_heads,
            config.num_kv_heads,
            context.axis,
            bias=config.attention_bias,
            dtype=config.dtype,
            device=context.device,
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            context.axis,
            bias=config.attention_bias,
            reduce=False,
            dtype=config.dtype,
            device=context.device,
        )
        self.q_norm = RMSNorm(config.head_dim, context)
        self.k_norm = RMSNorm(config.head_dim, context)
        self._norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, config.rms_norm_eps)
        self._ops = select_layer_ops(context.device)
        self._scale = config.head_dim**-0.5

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """[T, D] -> partial sums [T, D]; writes this step's keys and values to their slots first."""
        qkv = self.qkv_proj(hidden)
        query = self._ops.norm_rope_store(qkv, self._norms, rope, batch.kv_slots, kv["k"], kv["v"])
        out = backend.forward(query, kv["k"], kv["v"], batch.attention_plan, self._scale)
        return self.o_proj(out.flatten(1))

    def sharded_weights(self, prefix: str) -> dict[str, ShardedWeight]:
        weights = {
            f"{prefix}.o_proj.weight": self.o_proj.sharded_weight(),
            f"{prefix}.q_norm.weight": self.q_norm.sharded_weight(),
            f"{prefix}.k_norm.weight": self.k_norm.sharded_weight(),
        }
        for part in ("q", "k", "v"):
            weights[f"{prefix}.{part}_proj.weight"] = self.qkv_proj.sharded_weight(part)
            if self.qkv_proj.bias is not None:
                weights[f"{prefix}.{part}_proj.bias"] = self.qkv_proj.sharded_bias(part)
        if self.o_proj.bias is not None:
            weights[f"{prefix}.o_proj.bias"] = self.o_proj.sharded_bias()
        return weights


class DenseMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), as partial sums over the axis."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        sizes = [config.intermediate_size] * 2
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, sizes, context.axis, dtype=config.dtype, device=context.device
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            context.axis,
            reduce=False,
            dtype=config.dtype,
            device=context.device,
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


def make_moe_layer(moe_index: int, context: ModelContext) -> MoeLayer:
    """The MoE layer, its experts over the whole world."""
    config = context.config
    router = TopKRouter(
        config.hidden_size,
        config.num_experts,
        config.top_k,
        norm_topk_prob=config.norm_topk_prob,
        dtype=config.dtype,
        device=context.device,
    )
    experts = Experts(
        config.num_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        context.mesh.world,
        split=context.moe_split,
        backend=context.experts_backend,
        dtype=config.dtype,
        device=context.device,
    )
    return MoeLayer(moe_index, router, context.make_dispatcher(), experts)


def expert_name(prefix: str, expert: int, part: str) -> str:
    """On the hub: one tensor per expert and projection."""
    return f"{prefix}.experts.{expert}.{part}_proj.weight"


def moe_weights(layer: MoeLayer, num_experts: int, prefix: str) -> dict[str, ShardedWeight]:
    weights = {f"{prefix}.gate.weight": layer.router.sharded_weight()}
    for expert in range(num_experts):
        for part in ("gate", "up", "down"):
            weights[expert_name(prefix, expert, part)] = layer.experts.sharded_weight(expert, part)
    return weights


def fused_moe_weights(layer: MoeLayer, num_experts: int, prefix: str) -> dict[str, FusedWeight]:
    """As `transformers` holds them in memory, and a trainer may send them."""
    names = {part: [expert_name(prefix, e, part) for e in range(num_experts)] for part in ("gate", "up", "down")}
    return {
        f"{prefix}.experts.gate_up_proj": FusedWeight(
            layer.experts.fused_weight("gate_up"), frozenset(names["gate"] + names["up"])
        ),
        f"{prefix}.experts.down_proj": FusedWeight(layer.experts.fused_weight("down"), frozenset(names["down"])),
    }


class DecoderLayer(nn.Module):
    def __init__(self, layer_id: int, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.self_attn = Attention(context)
        self.mlp: MoeLayer | DenseMLP = (
            make_moe_layer(config.moe_layer_ids.index(layer_id), context)
            if layer_id in config.moe_layer_ids
            else DenseMLP(context)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, context)

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch[Any],
        backend: AttentionBackend[Any],
        kv: dict[str, torch.Tensor],
        recorder: RouteRecorder | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The input, normed and as it is, to what the MLP adds and the residual stream to add it to, all [P, D]: this
        rank's rows, as `batch.layout` spreads them."""
        layout = batch.layout
        attended = layout.run_sharded(lambda rows: self.self_attn(rows, rope, batch, backend, kv), normed)
        normed, residual = self.post_attention_layernorm.add(attended, residual)
        if isinstance(self.mlp, MoeLayer):
            return self.mlp(normed, layout.num_held, recorder), residual
        return layout.run_sharded(self.mlp, normed), residual

    def sharded_weights(self, prefix: str, config: ModelConfig) -> dict[str, ShardedWeight]:
        mlp_weights = (
            moe_weights(self.mlp, config.num_experts, f"{prefix}.mlp")
            if isinstance(self.mlp, MoeLayer)
            else self.mlp.sharded_weights(f"{prefix}.mlp")
        )
        return {
            f"{prefix}.input_layernorm.weight": self.input_layernorm.sharded_weight(),
            f"{prefix}.post_attention_layernorm.weight": self.post_attention_layernorm.sharded_weight(),
            **self.self_attn.sharded_weights(f"{prefix}.self_attn"),
            **mlp_weights,
        }


class Qwen3MoeForCausalLM(nn.Module):
    """The model of one rank: token ids in, hidden states and logits out."""

    def __init__(self, context: ModelContext, num_positions: int) -> None:
        super().__init__()
        config = context.config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, context.axis, dtype=config.dtype, device=context.device
        )
        self.rotary = RotaryEmbedding(num_positions, context)
        self.layers = nn.ModuleList(DecoderLayer(layer_id, context) for layer_id in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, context)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, context.axis, dtype=config.dtype, device=context.device
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
        """A step's tokens to hidden states [T, D]; every MoE layer tells `recorder` the ids it chose."""
        residual = batch.layout.scatter(self.embed_tokens(batch.input_ids))
        rope = self.rotary(batch.positions)
        layers = self.decoder_layers()
        normed = layers[0].input_layernorm(residual)
        for layer_id, layer in enumerate(layers):
            added, residual = layer(normed, residual, rope, batch, backend, kv_store.layer(layer_id), recorder)
            # The norm that comes next takes the sum along.
            following = layers[layer_id + 1].input_layernorm if layer_id + 1 < len(layers) else self.norm
            normed, residual = following.add(added, residual)
        return batch.layout.gather(normed)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[N, D] -> [N, V] on tp rank 0, None elsewhere; every tp rank must call it."""
        return self.lm_head(hidden)

    def decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def query_shape(self) -> tuple[int, int]:
        """Query heads of this rank and their width."""
        return self.decoder_layers()[0].self_attn.qkv_proj.num_local_heads, self.config.head_dim

    def kv_specs(self) -> list[KVTensorSpec]:
        """Keys and values of this rank's heads."""
        width = (self.decoder_layers()[0].self_attn.qkv_proj.num_local_kv_heads, self.config.head_dim)
        return [KVTensorSpec(name, width, self.config.dtype) for name in ("k", "v")]

    def sharded_weights(self) -> dict[str, ShardedWeight]:
        """Every tensor that a checkpoint must have, by its name there, and this rank's part of it."""
        weights = {
            "model.embed_tokens.weight": self.embed_tokens.sharded_weight(),
            "model.norm.weight": self.norm.sharded_weight(),
        }
        if not self.config.tie_word_embeddings:
            weights["lm_head.weight"] = self.lm_head.sharded_weight()
        for layer_id, layer in enumerate(self.decoder_layers()):
            weights.update(layer.sharded_weights(f"model.layers.{layer_id}", self.config))
        return weights

    def fused_weights(self) -> dict[str, FusedWeight]:
        """Other names under which several of these tensors may come as one."""
        fused: dict[str, FusedWeight] = {}
        for layer_id, layer in enumerate(self.decoder_layers()):
            if isinstance(layer.mlp, MoeLayer):
                fused.update(fused_moe_weights(layer.mlp, self.config.num_experts, f"model.layers.{layer_id}.mlp"))
        return fused

    @property
    def ignored_weights(self) -> frozenset[str]:
        """Names that a checkpoint may have and the model does not need."""
        return frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ())
