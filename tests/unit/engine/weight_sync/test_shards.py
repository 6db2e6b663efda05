"""Which part of every tensor each rank keeps: together all of it, whatever the split, and under either naming."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import Qwen3MoeConfig

from waybill.engine.models.decoder import DecoderLM
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.qwen3_moe import build, parse_config
from waybill.engine.weight_sync.checksum import BITS, GOLDEN, ODD, checksum
from waybill.engine.weight_sync.inspection import bounds_of, first_rows, join_checksums, join_rows, piece_checksums
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.weights import ShardedWeight

CPU = torch.device("cpu")
EXPERTS = "model.layers.1.mlp.experts"
LAYOUTS = [(1, 1, "ep"), (1, 2, "ep"), (1, 2, "tp"), (2, 1, "ep"), (2, 1, "tp"), (2, 2, "ep"), (1, 4, "tp")]


def make_ranks(dp_size: int, tp_size: int, split: str, *, tied: bool = False) -> list[DecoderLM]:
    """The model as each rank of a mesh builds it; nobody computes, so there are no process groups."""
    hf_config = Qwen3MoeConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        mlp_only_layers=[0],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        tie_word_embeddings=tied,
        attention_bias=True,
        eos_token_id=0,
        dtype="bfloat16",
    )
    config = parse_config(hf_config, "nowhere", "auto")
    world = tuple(range(dp_size * tp_size))
    models = []
    for rank in world:
        mesh = ParallelMesh(
            CPU,
            Axis("world", rank, len(world), None, world),
            Axis("dp", rank // tp_size, dp_size, None, world[rank % tp_size :: tp_size]),
            Axis("tp", rank % tp_size, tp_size, None, world[rank - rank % tp_size :][:tp_size]),
            Axis("ep", rank, len(world), None, world),
            Axis("node", rank, len(world), None, world),
        )
        models.append(build(ModelContext(config, mesh, split), 8))
    return models


def random_tensors(weights: Mapping[str, ShardedWeight]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(weight.shape).bfloat16() for name, weight in weights.items()}


@pytest.mark.parametrize(("dp_size", "tp_size", "split"), LAYOUTS)
def test_pieces_of_all_ranks_tile_every_tensor(dp_size: int, tp_size: int, split: str) -> None:
    ranks = [
        model.sharded_weights() | {name: fused.weight for name, fused in model.fused_weights().items()}
        for model in make_ranks(dp_size, tp_size, split)
    ]
    assert "lm_head.weight" in ranks[0] and "model.layers.0.self_attn.q_proj.bias" in ranks[0]
    for name, weight in ranks[0].items():
        held = torch.zeros(weight.shape, dtype=torch.int64)
        pieces = {}
        for weights in ranks:
            assert weights[name].shape == weight.shape
            for piece in weights[name].pieces:
                sizes = tuple(part.stop - part.start for part in piece.index)
                assert piece.storage.shape == sizes, f"{name}: storage {tuple(piece.storage.shape)} for {sizes}"
                pieces[tuple(bounds_of(piece))] = piece.index
        for index in pieces.values():
            held[index] += 1
        assert (held == 1).all(), f"{name}: values that nobody holds, or pieces that overlap"


@pytest.mark.parametrize(("dp_size", "tp_size", "split"), LAYOUTS)
def test_what_was_loaded_is_read_back(dp_size: int, tp_size: int, split: str) -> None:
    ranks = [model.sharded_weights() for model in make_ranks(dp_size, tp_size, split)]
    tensors = random_tensors(ranks[0])
    for weights in ranks:
        for name, weight in weights.items():
            weight.load(tensors[name])
    joined = join_checksums([piece_checksums(weights) for weights in ranks], ranks[0])
    assert joined == {name: checksum(tensor) for name, tensor in tensors.items()}
    for name in ("model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
        shape = tuple(tensors[name].shape)
        rows = join_rows([first_rows(weights[name], 99) for weights in ranks], shape, 99)
        assert torch.equal(torch.from_numpy(rows), tensors[name].float())


@pytest.mark.parametrize(("dp_size", "tp_size", "split"), LAYOUTS)
def test_fused_names_bring_the_same_bytes(dp_size: int, tp_size: int, split: str) -> None:
    for alone, together in zip(*(make_ranks(dp_size, tp_size, split) for _ in range(2)), strict=True):
        tensors = random_tensors(alone.sharded_weights())

        def stack(part: str, tensors: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            return torch.stack([tensors[f"{EXPERTS}.{expert}.{part}_proj.weight"] for expert in range(8)])

        fused = {
            f"{EXPERTS}.gate_up_proj": torch.cat([stack("gate"), stack("up")], dim=1),
            f"{EXPERTS}.down_proj": stack("down"),
        }
        weights, stands_for = together.sharded_weights(), together.fused_weights()
        assert stands_for.keys() == fused.keys()
        for name, weight in alone.sharded_weights().items():
            weight.load(tensors[name])
            if not any(name in part.names for part in stands_for.values()):
                weights[name].load(tensors[name])
        for name, tensor in fused.items():
            stands_for[name].weight.load(tensor)
        for (name, expected), actual in zip(alone.state_dict().items(), together.state_dict().values(), strict=True):
            assert torch.equal(actual, expected), name
        covered = set().union(*(part.names for part in stands_for.values()))
        assert covered == {name for name in weights if ".experts." in name}


def test_a_tied_head_is_not_waited_for_and_shares_its_memory() -> None:
    (model,) = make_ranks(1, 1, "ep", tied=True)
    assert "lm_head.weight" not in model.sharded_weights() and "lm_head.weight" in model.ignored_weights
    model.sharded_weights()["model.embed_tokens.weight"].load(torch.ones(37, 16))
    assert (model.lm_head.weight == 1).all()


def test_another_shape_is_refused_before_anything_changes() -> None:
    (model,) = make_ranks(1, 1, "ep")
    weight = model.sharded_weights()["model.norm.weight"]
    weight.load(torch.zeros(16))
    with pytest.raises(ValueError, match=r"shape \(15,\): must be \(16,\)"):
        weight.load(torch.ones(15))
    assert (weight.pieces[0].storage == 0).all()


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7), (2, 3, 5), (40, 5000), (3, 70_000), (70_001,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_checksum_is_what_it_is_defined_as(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The sum of (bits + 1) times a factor by place, in whole numbers; whatever blocks it is summed in."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = tensor.reshape(-1).view(BITS[dtype.itemsize]).tolist()
    total = sum((value + 1) * (place * GOLDEN + ODD) for place, value in enumerate(bits))
    assert checksum(tensor) == f"{total % 2**64:016x}"
