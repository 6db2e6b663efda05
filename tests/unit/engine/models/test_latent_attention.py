"""Latent attention against `transformers`' DeepseekV3Attention: prefilled at once, in chunks, and token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from waybill.engine.attention import make_attention_backend
from waybill.engine.attention.backend import AttentionBatch
from waybill.engine.models.deepseek_v3 import parse_latent
from waybill.engine.models.forward_batch import ForwardBatch
from waybill.engine.models.latent_attention import LatentAttention
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.rotary import RotaryEmbedding
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis, ParallelMesh

LENGTH, NUM_SLOTS = 23, 40
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    # Not that of the norms of latents.
    "rms_norm_eps": 1e-2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "queries_of_a_latent": {},
    "queries_of_the_input": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
    "yarn_without_mscale": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    "wide_values": {"v_head_dim": 32},
}


class Twins:
    """The same random weights here and there."""

    def __init__(self, hf_config: DeepseekV3Config, config: Any, rank: int = 0, size: int = 1) -> None:
        torch.manual_seed(0)
        hf_config._attn_implementation = "eager"
        self.theirs = DeepseekV3Attention(hf_config, 0).eval()
        self._hf_rotary = DeepseekV3RotaryEmbedding(hf_config)
        for parameter in self.theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        mesh = ParallelMesh.single(torch.device("cpu"))
        tp = Axis("tp", rank, size, None, tuple(range(size)))
        context = ModelContext(config, replace(mesh, tp=tp))
        self.ours = LatentAttention(0, context)
        weights = self.ours.sharded_weights("layer")
        stored = {f"layer.self_attn.{name}": tensor for name, tensor in self.theirs.state_dict().items()}
        assert weights.keys() == stored.keys()
        for name, weight in weights.items():
            weight.load(stored[name])
        self._rotary = RotaryEmbedding(64, context)

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(hidden))[None]
        mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)[None, None]
        return self.theirs(hidden[None], self._hf_rotary(hidden[None], positions), mask)[0][0]

    def found(self, hidden: torch.Tensor, chunks: list[int], backend_name: str) -> torch.Tensor:
        backend = make_attention_backend(backend_name, torch.device("cpu"))
        (spec,) = self.ours.kv_specs(torch.float32)
        cache = {spec.name: torch.full((NUM_SLOTS, *spec.width), float("nan"))}
        slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(1))[: len(hidden)]
        results, first = [], 0
        for chunk in chunks:
            positions = torch.arange(first, first + chunk)
            first += chunk
            batch = AttentionBatch([chunk], [first], slots[None].to(torch.int32), torch.tensor([0]), 1)
            nothing = torch.empty(0, dtype=torch.int64)
            forward_batch: ForwardBatch[Any] = ForwardBatch(
                input_ids=positions,
                positions=positions,
                kv_slots=slots[positions],
                attention_plan=backend.plan(batch),
                layout=ReplicatedTokens(Axis.single()),
                sample_rows=nothing,
                sampling_req_rows=nothing,
            )
            results.append(self.ours(hidden[positions], self._rotary(positions), forward_batch, backend, cache))
        return torch.cat(results)


def make_twins(changes: dict[str, Any], rank: int = 0, size: int = 1) -> Twins:
    hf_config = DeepseekV3Config(**{**SIZES, **changes})
    return Twins(hf_config, StubConfig(parse_latent(hf_config)), rank, size)


class StubConfig:
    """What layers ask a `ModelConfig` for."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.hidden_size = SIZES["hidden_size"]
        self.rms_norm_eps = SIZES["rms_norm_eps"]
        self.dtype = torch.float32
        self.wide_norms = False
        self.is_fp8 = False


@pytest.mark.parametrize("backend_name", ["sdpa", "torch_reference"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_equals_transformers(case: str, backend_name: str) -> None:
    """Plain, plain over a cached context, and absorbed."""
    twins = make_twins(CASES[case])
    hidden = torch.randn(LENGTH, SIZES["hidden_size"])
    expected = twins.expected(hidden)
    for chunks in ([LENGTH], [7, 9, 7], [1] * LENGTH, [5, *[1] * (LENGTH - 5)]):
        torch.testing.assert_close(twins.found(hidden, chunks, backend_name), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_ranks_give_partial_sums_of_their_heads() -> None:
    hidden = torch.randn(LENGTH, SIZES["hidden_size"])
    ranks = [make_twins({"attention_bias": True}, rank, 2) for rank in range(2)]
    expected = ranks[0].expected(hidden)
    for chunks in ([LENGTH], [1] * LENGTH):
        found = sum(twins.found(hidden, chunks, "sdpa") for twins in ranks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ranks[0].ours.output_shape == (2, 12)
    # Latents do not depend on heads.
    assert ranks[0].ours.kv_specs(torch.float32)[0].width == (40,)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=4: must be a multiple of the tp size, 3"):
        make_twins({}, 0, 3)
