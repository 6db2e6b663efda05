"""Every family's tensors, by their names in checkpoints and in memory, and what ranks keep of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.fp8_checkpoint import quantise
from support.tiny_families import FAMILIES, make_family_model, write_family

from waybill.engine.attention import AttentionBatch, make_attention_backend
from waybill.engine.config import EngineConfig
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.models.causal_lm import CausalLM
from waybill.engine.models.checkpoint import Checkpoint, check_tensors
from waybill.engine.models.forward_batch import ForwardBatch
from waybill.engine.models.model_config import ModelConfig
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, family_of, load_model_config
from waybill.engine.models.weight_loader import load_weights
from waybill.engine.routing.dequantised import floating_point
from waybill.engine.routing.hf_config import read_hf_config
from waybill.engine.routing.transformers_reference import auto_class
from waybill.parallel.cpu_ops.library import SWITCH
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")
IN_FP8 = [family for family in FAMILIES if family not in ("gpt_oss", "qwen3_vl_moe")]
LAYOUTS = [(1, 1, "ep"), (1, 2, "tp"), (2, 1, "ep"), (1, 4, "ep"), (1, 4, "tp")]


def make_ranks(config: ModelConfig, dp_size: int, tp_size: int, split: str) -> list[CausalLM]:
    """The model as each rank of a mesh builds it; nobody computes, so there are no process groups."""
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
        models.append(build_model(ModelContext(config, mesh, split), 8))
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_checkpoints_and_of_memory(family: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path)
    (model,) = make_ranks(load_model_config(EngineConfig(model_path=str(folder))), 1, 1, "ep")
    weights, fused = model.sharded_weights(), model.fused_weights()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {name for name in file.keys() if name not in model.ignored_weights} == weights.keys()  # noqa: SIM118
    state = make_family_model(family).state_dict()
    in_memory = {name: tensor for name, tensor in state.items() if name not in model.ignored_weights}
    stands_for = [fused[name].names if name in fused else {name} for name in in_memory]
    assert set().union(*stands_for) == weights.keys()
    assert sum(map(len, stands_for)) == len(weights)
    for name, tensor in in_memory.items():
        (fused[name].weight if name in fused else weights[name]).check(tensor.shape)


# In 16 bits attention is rounded otherwise: `transformers` takes gpt-oss's softmax in them, and values that are narrower
# than keys go through another of torch's kernels.
ROUNDED_OTHERWISE = {"gpt_oss", "deepseek_v3", "kimi_k2"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_is_that_of_transformers(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a prompt: operation by operation, so that in 16 bits every rounding between them is the same. That needs
    torch's own products, whose sums have another order than those of the CPU operators."""
    monkeypatch.setenv(SWITCH, "off")
    if dtype == "bfloat16" and family in ROUNDED_OTHERWISE:
        pytest.skip("attention is rounded otherwise")
    folder = write_family(family, tmp_path)
    tokens = [(37 * i + 11) % 256 for i in range(80)]
    found = prefill(load_model_config(EngineConfig(model_path=str(folder), dtype=dtype)), folder, tokens)
    hf_config = read_hf_config(str(folder))
    model = auto_class(hf_config).from_pretrained(
        folder,
        config=hf_config,
        dtype=getattr(torch, dtype),
        experts_implementation="eager",
    )
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([tokens])).logits[0]
    if dtype == "float32":
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", IN_FP8)
def test_in_fp8_a_forward_is_that_of_the_dequantised_weights(family: str, tmp_path: Path) -> None:
    folder = quantise(write_family(family, tmp_path / "plain"), tmp_path / "fp8")
    config = load_model_config(EngineConfig(model_path=str(folder), dtype="float32"))
    for rank in make_ranks(config, 1, 2, "ep"):
        # Every rank knows every tensor, also of experts that others have.
        check_tensors(rank.sharded_weights(), Checkpoint(str(folder)), rank.ignored_weights)
    tokens = [(37 * i + 11) % 256 for i in range(80)]
    with floating_point(str(folder)) as floats:
        model = auto_class(read_hf_config(floats)).from_pretrained(
            floats, config=read_hf_config(floats), dtype=torch.float32, experts_implementation="eager"
        )
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(prefill(config, folder, tokens), expected, rtol=0.0, atol=5e-5)


def prefill(config: ModelConfig, folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of one rank."""
    model = build_model(ModelContext(config, ParallelMesh.single(CPU), experts_backend="torch_reference"), 128)
    load_weights(model.sharded_weights(), Checkpoint(str(folder)), model.ignored_weights, CPU)
    count, positions = len(tokens), torch.arange(len(tokens))
    backend = make_attention_backend("auto", CPU)
    pages = AttentionBatch([count], [count], torch.arange(count, dtype=torch.int32)[None], torch.tensor([0]), 1)
    layout = ReplicatedTokens(Axis.single())
    batch = ForwardBatch(
        torch.tensor(tokens), positions, positions, backend.plan(pages), layout, positions, torch.tensor([0])
    )
    with torch.inference_mode():
        hidden = model(batch, backend, KVStore(config.num_layers, count, 1, model.kv_specs(), CPU), None)
        return model.compute_logits(hidden)


@pytest.mark.parametrize(
    ("family", "is_fp8"), [*((family, False) for family in FAMILIES), *((family, True) for family in IN_FP8)]
)
@pytest.mark.parametrize(("dp_size", "tp_size", "split"), LAYOUTS)
def test_pieces_of_all_ranks_tile_every_tensor(
    family: str, is_fp8: bool, dp_size: int, tp_size: int, split: str
) -> None:
    parsed = family_of(family).parse_config(FAMILIES[family](), "nowhere", "float32")
    config = replace(parsed, model_type=family, is_fp8=is_fp8)
    ranks = [
        model.sharded_weights() | {name: fused.weight for name, fused in model.fused_weights().items()}
        for model in make_ranks(config, dp_size, tp_size, split)
    ]
    for name, weight in ranks[0].items():
        held = torch.zeros(weight.shape, dtype=torch.int64)
        pieces = {}
        for weights in ranks:
            assert weights[name].shape == weight.shape
            for piece in weights[name].pieces:
                assert piece.storage.shape == tuple(part.stop - part.start for part in piece.index), name
                pieces[tuple((part.start, part.stop) for part in piece.index)] = piece.index
        for index in pieces.values():
            held[index] += 1
        assert (held == 1).all(), name


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss"])
def test_a_checkpoint_may_hold_experts_fused(family: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path)
    config = load_model_config(EngineConfig(model_path=str(folder)))
    on_hub, in_memory = (make_ranks(config, 1, 2, "tp")[1] for _ in range(2))
    load(on_hub, folder)
    tensors = {name: tensor.clone() for name, tensor in make_family_model(family).state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    load(in_memory, folder)
    for found, expected in zip(in_memory.parameters(), on_hub.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_stacks_of_experts_may_be_transposed(tmp_path: Path) -> None:
    """As on the hub, where `transformers` turns them as it loads."""
    folder = write_family("qwen3_vl_moe", tmp_path)
    config = load_model_config(EngineConfig(model_path=str(folder)))
    as_they_are, turned = (make_ranks(config, 1, 2, "tp")[1] for _ in range(2))
    load(as_they_are, folder)
    stored = load_file(folder / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert experts
    save_file(
        stored | {name: stored[name].transpose(1, 2).contiguous() for name in experts}, folder / "model.safetensors"
    )
    load(turned, folder)
    for found, expected in zip(turned.parameters(), as_they_are.parameters(), strict=True):
        assert torch.equal(found, expected)
    save_file(stored | {experts[0]: stored[experts[0]][:, 1:].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must be \(8, .*\), or \(8, .*\) for the transpose"):
        load(turned, folder)


def load(model: CausalLM, folder: Path) -> None:
    weights, fused = model.sharded_weights(), model.fused_weights()
    checkpoint = Checkpoint(str(folder))
    check_tensors(weights, checkpoint, model.ignored_weights, fused)
    known = weights | {name: each.weight for name, each in fused.items()}
    load_weights(known, checkpoint, model.ignored_weights, CPU)


def test_an_expert_that_comes_alone_and_fused_is_refused(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path)
    (model,) = make_ranks(load_model_config(EngineConfig(model_path=str(folder))), 1, 1, "ep")
    name = "model.layers.1.mlp.experts.down_proj"
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {name: make_family_model("qwen3_moe").state_dict()[name]}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has, alone and fused, 8 tensors: model\.layers\.1\.mlp\.experts\.0\.down_proj"
    ):
        load(model, folder)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "no MoE layer: first_k_dense_replace=4 of 4"),
        ("glm4_moe", {"topk_group": 5}, "topk_group=5"),
        ("qwen2_moe", {"layer_types": ["chunked_attention"] * 4}, "layer_types: 'chunked_attention'"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 0}, "sliding_window=0"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no MoE layer"),
        ("olmoe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ],
)
def test_what_a_model_file_does_not_compute_is_refused(family: str, change: dict[str, object], message: str) -> None:
    hf_config = FAMILIES[family]()
    for name, value in change.items():
        setattr(hf_config, name, value)
    with pytest.raises(ValueError, match=message):
        family_of(family).parse_config(hf_config, "nowhere", "float32")


def test_heads_are_turned_in_part_where_the_family_does_so() -> None:
    """`transformers` looks at the factor in some families alone."""
    for family, share in (("glm4_moe", 0.5), ("qwen3_moe", 1.0)):
        hf_config = FAMILIES[family]()
        hf_config.rope_parameters = {**hf_config.rope_parameters, "partial_rotary_factor": 0.5}
        attention = family_of(family).parse_config(hf_config, "nowhere", "float32").attention
        assert 2 * len(attention.rope.inv_freq) == attention.head_dim * share, family
