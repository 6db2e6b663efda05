"""Every Triton kernel against its torch twin: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from support.triton_twins import DEVICE, DTYPES, TOLERANCE, normal

from waybill.engine.attention import triton_paged
from waybill.engine.attention.backend import AttentionBatch, AttentionRule
from waybill.engine.attention.sdpa import SdpaAttention
from waybill.engine.attention.torch_reference import TorchReferenceAttention
from waybill.engine.attention.triton_paged import TritonPagedAttention
from waybill.engine.disaggregation.row_copy import Heads, as_words, copy_rows_torch, select_heads
from waybill.engine.disaggregation.row_copy_triton import copy_rows_triton
from waybill.engine.models.norm_rope import HeadNorms, KVTarget, TorchLayerOps
from waybill.engine.models.norm_rope_triton import TritonLayerOps
from waybill.engine.plan import Draw
from waybill.engine.runner.gumbel import choose_tokens_numpy
from waybill.engine.runner.gumbel_triton import choose_tokens_triton
from waybill.engine.runner.step_tensors import read_inputs_torch
from waybill.engine.runner.step_tensors_triton import read_inputs_triton
from waybill.parallel.best_choice import NO_CHOICE, best_choice_torch
from waybill.parallel.best_choice_triton import best_choice_triton
from waybill.parallel.embedding import look_up_torch
from waybill.parallel.embedding_triton import look_up_triton
from waybill.parallel.linear_triton import linear_triton
from waybill.parallel.mesh import Axis
from waybill.parallel.moe.activation import ClampedExperts, SwigluClamp
from waybill.parallel.moe.experts import experts_by_group, experts_torch_reference
from waybill.parallel.moe.experts_few_triton import experts_few_triton
from waybill.parallel.moe.experts_triton import experts_triton
from waybill.parallel.moe.router import Choose, RouterConfig, choose_torch
from waybill.parallel.moe.router_triton import choose_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 100])
@pytest.mark.parametrize("is_wide", [False, True])
def test_norms(dtype: torch.dtype, width: int, is_wide: bool) -> None:
    hidden, residual = (normal(5, width, dtype=dtype, seed=seed) for seed in range(2))
    weight = normal(width, dtype=torch.float32 if is_wide else dtype, seed=2)
    torch.testing.assert_close(
        TritonLayerOps().rms_norm(hidden, weight, 1e-6),
        TorchLayerOps().rms_norm(hidden, weight, 1e-6),
        **TOLERANCE[dtype],
    )
    torch.testing.assert_close(
        TritonLayerOps().swiglu(hidden), TorchLayerOps().swiglu(hidden), **TOLERANCE[hidden.dtype]
    )
    expected = TorchLayerOps().add_rms_norm(hidden, residual, weight, 1e-6)
    found = TritonLayerOps().add_rms_norm(hidden, residual.clone(), weight, 1e-6)
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE[dtype])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [16, 8])
@pytest.mark.parametrize("has_norms", [True, False])
def test_norm_rope_and_store(dtype: torch.dtype, turned: int, has_norms: bool) -> None:
    tokens, heads, kv_heads, width, slots = 5, 4, 2, 16, 12
    qkv = normal(tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
    norms = HeadNorms(normal(width, dtype=dtype, seed=1), normal(width, dtype=dtype, seed=2), 1e-6)
    rope = (normal(tokens, 1, turned, dtype=dtype, seed=3), normal(tokens, 1, turned, dtype=dtype, seed=4))
    where = torch.tensor([3, 0, 11, 7, 5], device=DEVICE)
    results = []
    for ops in (TorchLayerOps(), TritonLayerOps()):
        keys, values = (torch.zeros(slots, kv_heads, width, dtype=dtype, device=DEVICE) for _ in range(2))
        target = KVTarget(where, keys, values)
        results.append((ops.norm_rope_store(qkv, norms if has_norms else None, rope, target), keys, values))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("page_size", "q_lens", "kv_lens"),
    [(1, [1, 1, 1, 1], [1, 70, 300, 64]), (4, [1, 1], [5, 129]), (4, [1, 5, 1], [70, 9, 33])],
)
@pytest.mark.parametrize(("window", "has_sinks"), [(None, False), (40, False), (None, True), (7, True)])
@pytest.mark.parametrize("wanted_programs", [512, 1])
def test_decode_attention(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    page_size: int,
    q_lens: list[int],
    kv_lens: list[int],
    window: int | None,
    has_sinks: bool,
    wanted_programs: int,
) -> None:
    """Keys that are split over programs and, as those of many requests, are not; decodes alone, and beside a prefill."""
    monkeypatch.setattr(triton_paged, "WANTED_PROGRAMS", wanted_programs)
    heads, kv_heads, width = 4, 2, 16
    pages = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(kv_lens) + 2, max(pages), dtype=torch.int32)
    rows = torch.arange(len(kv_lens)).flip(0) + 1
    for row, part in zip(rows.tolist(), order.split(pages), strict=True):
        table[row, : len(part)] = part
    query = normal(sum(q_lens), heads, width, dtype=dtype)
    cache = [normal(sum(pages) * page_size, kv_heads, width, dtype=dtype, seed=s) for s in (1, 2)]
    batch = AttentionBatch(q_lens, kv_lens, table.to(DEVICE), rows.to(DEVICE), page_size)
    sinks = normal(heads, dtype=dtype, seed=3) * 2 if has_sinks else None
    rule, kv = AttentionRule(width**-0.5, window, sinks), dict(zip("kv", cache, strict=True))
    results = [
        backend.forward(query, kv, backend.plan(batch), rule)
        for backend in (TorchReferenceAttention(), TritonPagedAttention(), SdpaAttention())
    ]
    torch.testing.assert_close(results[2], results[0], **TOLERANCE[dtype])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE[dtype])


def test_decode_attention_reads_nothing_beyond_a_requests_keys() -> None:
    """Other requests' NaN stand there: in the pages of the neighbour, and in what is left of the last page."""
    page_size, kv_lens, width = 4, [5, 70], 16
    table = torch.zeros(2, 18, dtype=torch.int32)
    table[0, :2], table[0, 2:] = torch.tensor([0, 1]), 2
    table[1] = torch.arange(2, 20)
    cache = {name: normal(80, 2, width, dtype=torch.float32, seed=seed) for seed, name in enumerate("kv", 1)}
    query = normal(2, 4, width, dtype=torch.float32)
    batch = AttentionBatch([1, 1], kv_lens, table.to(DEVICE), torch.arange(2).to(DEVICE), page_size)
    backend = TritonPagedAttention()
    rule = AttentionRule(width**-0.5)
    expected = backend.forward(query, cache, backend.plan(batch), rule)
    for tensor in cache.values():
        tensor[5:] = float("nan")
    found = backend.forward(query, cache, backend.plan(batch), rule)
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()


ROUTERS = {
    "softmax": RouterConfig(16, 4),
    "unnormalised": RouterConfig(20, 3, renormalises=False),
    "wide": RouterConfig(20, 3, wide_weights=True),
    "of_chosen": RouterConfig(20, 4, "softmax_of_chosen", bias=True),
    "sigmoid": RouterConfig(20, 3, "sigmoid", correction=True, scale=2.5),
    "groups": RouterConfig(24, 4, "sigmoid", correction=True, num_groups=4, num_chosen_groups=2, wide_weights=True),
    # Ids that do not fit into a byte.
    "many": RouterConfig(384, 8, "sigmoid", correction=True, scale=2.8, wide_weights=True),
    "odd_groups": RouterConfig(30, 5, "sigmoid", renormalises=False, num_groups=6, num_chosen_groups=3, scale=0.5),
}


def router_inputs(config: RouterConfig, num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits and, where the router has one, a correction that changes the choice."""
    if config.scoring == "sigmoid":
        dtype = torch.float32
    correction = normal(config.num_experts, dtype=torch.float32, seed=1) if config.correction else None
    return normal(num_rows, config.num_experts, dtype=dtype), correction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_choice_of_experts(dtype: torch.dtype, router: str) -> None:
    config = ROUTERS[router]
    logits, correction = router_inputs(config, 7, dtype)
    dtype_of_ids = torch.uint8 if config.num_experts <= 256 else torch.uint16
    records = [torch.full((7, config.top_k), 255, dtype=dtype_of_ids, device=DEVICE) for _ in range(2)]
    weights_dtype = config.weights_dtype(dtype)
    expected = choose_torch(logits, config, correction, records[0], weights_dtype)
    found = choose_triton(logits, config, correction, records[1], weights_dtype)
    assert torch.equal(found[0], expected[0]) and torch.equal(records[1].long(), records[0].long())
    assert found[1].dtype == expected[1].dtype == weights_dtype
    torch.testing.assert_close(found[1], expected[1], **TOLERANCE[dtype])
    assert torch.equal(choose_triton(logits, config, correction, None, weights_dtype)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("choose", [choose_torch, choose_triton])
def test_a_row_without_a_choice_of_experts_gets_distinct_ones(dtype: torch.dtype, router: str, choose: Choose) -> None:
    """NaN of either sign, infinity, nothing but -inf: ids that may be counted and sorted by, neighbours that do not notice,
    and under a softmax over all experts weights of NaN."""
    nan, inf = float("nan"), float("inf")
    config = ROUTERS[router]
    logits, correction = router_inputs(config, 9, dtype)
    expected = choose(logits, config, correction, None, dtype)
    bad, good = [1, 2, 4, 6, 7], [0, 3, 5, 8]
    logits[1, 7], logits[2], logits[4, 0] = nan, nan, inf
    logits[6] = -inf
    logits[7] = torch.tensor(nan, dtype=dtype).copysign(torch.tensor(-1.0, dtype=dtype))
    record = torch.full((9, config.top_k), 255, dtype=torch.int32, device=DEVICE)
    ids, weights = choose(logits, config, correction, record, dtype)
    assert torch.equal(record.long(), ids)
    assert ids.min() >= 0 and ids.max() < config.num_experts
    assert all(len(set(row)) == config.top_k for row in ids.tolist())
    assert config.scoring != "softmax" or weights[bad].isnan().all()
    assert weights[[2, 7]].isnan().all()
    assert torch.equal(ids[good], expected[0][good]) and torch.equal(weights[good], expected[1][good])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_a_token_of_nan_stays_alone(dtype: torch.dtype, num_tokens: int) -> None:
    """In the experts, whose tiles it shares with others."""
    experts, width, intermediate, top_k = 6, 48, 24, 3
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(num_tokens)]).to(DEVICE)
    weights = torch.softmax(normal(num_tokens, top_k, dtype=torch.float32), dim=-1).to(dtype)
    gate_up = normal(experts, 2 * intermediate, width, dtype=dtype, seed=1) * width**-0.5
    down = normal(experts, width, intermediate, dtype=dtype, seed=2) * intermediate**-0.5
    hidden = normal(num_tokens, width, dtype=dtype, seed=4)
    spoilt, spoilt_weights = hidden.clone(), weights.clone()
    spoilt[1], spoilt_weights[1] = float("nan"), float("nan")
    others = [row for row in range(num_tokens) if row != 1]
    for function in (experts_torch_reference, experts_by_group, experts_triton, experts_few_triton):
        if function is experts_few_triton and num_tokens > 4:
            continue
        expected = function(hidden, ids, weights, gate_up, down)
        found = function(spoilt, ids, spoilt_weights, gate_up, down)
        assert found[1].isnan().all()
        assert torch.equal(found[others], expected[others]), function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 70, 200])
@pytest.mark.parametrize("is_clamped", [False, True])
def test_experts(dtype: torch.dtype, num_tokens: int, is_clamped: bool) -> None:
    """Some ids belong to other ranks: negative, or beyond the local experts. Many tokens make full tiles and short ones."""
    experts, width, intermediate, top_k = 6, 48, 24, 3
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(experts + 4, generator=generator)[:top_k] - 2 for _ in range(num_tokens)])
    weights = torch.softmax(normal(num_tokens, top_k, dtype=torch.float32), dim=-1).to(dtype)
    gate_up = normal(experts, 2 * intermediate, width, dtype=dtype, seed=1) * width**-0.5
    down = normal(experts, width, intermediate, dtype=dtype, seed=2) * intermediate**-0.5
    hidden = normal(num_tokens, width, dtype=dtype, seed=4)
    clamped = None
    if is_clamped:
        biases = [normal(experts, size, dtype=dtype, seed=5) for size in (2 * intermediate, width)]
        clamped = ClampedExperts(*biases, SwigluClamp(1.702, 0.8))
    expected = experts_torch_reference(hidden, ids.to(DEVICE), weights, gate_up, down, clamped=clamped)
    for function in (experts_triton, experts_few_triton):
        if function is experts_few_triton and num_tokens > 100:
            continue
        # As they come: counted over all ranks, of which this one has the experts from the third on.
        for first in (0, 2):
            found = function(hidden, ids.to(DEVICE) + first, weights, gate_up, down, first=first, clamped=clamped)
            torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(("num_outputs", "width"), [(20, 48), (700, 64)])
def test_linear(dtype: torch.dtype, num_rows: int, num_outputs: int, width: int) -> None:
    x, weight = normal(num_rows, width, dtype=dtype), normal(num_outputs, width, dtype=dtype, seed=1) * width**-0.5
    torch.testing.assert_close(
        linear_triton(x, weight, None), torch.nn.functional.linear(x, weight), **TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_is_found_again_by_what_it_was_compiled_for(dtype: torch.dtype) -> None:
    """Rows that do and do not start at a multiple of 16 bytes, and sizes that are and are not one of 16, in turn."""
    for _ in range(2):
        for first, num_experts in [(0, 16), (1, 16), (1, 20), (0, 20)]:
            logits = normal(8, 32, dtype=dtype).flatten()[first : first + 7 * num_experts].view(7, num_experts)
            found, expected = (
                choose(logits, RouterConfig(num_experts, 3), None, None, dtype)
                for choose in (choose_triton, choose_torch)
            )
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_columns", "first"), [(50, 0), (4100, 13)])
def test_choice_of_tokens(dtype: torch.dtype, num_columns: int, first: int) -> None:
    """The noise has the same bits; a score may differ in its last ones."""
    logits = normal(6, num_columns + 3, dtype=dtype)[:, :num_columns]
    logits[3, 7], logits[4], logits[2, 5] = float("nan"), float("-inf"), float("-inf")
    logits[0, [9, 40]] = 30.0
    draws = [Draw(0.0, 1, 0), Draw(1.0, 2**64 - 1, 3), Draw(0.7, 12345, 10**6), Draw(1.0, 5, 5), Draw(1.0, 5, 5)]
    draws.append(Draw(1e-5, 6, 0))
    expected, found = choose_tokens_numpy(logits.cpu(), first, draws), choose_tokens_triton(logits, first, draws)
    best = found.scores.amax(dim=1, keepdim=True).cpu()
    torch.testing.assert_close(best, expected.scores, rtol=1e-5, atol=1e-5, equal_nan=True)
    for choose in (best_choice_torch, lambda scores, ids, _: best_choice_triton(scores, ids, None)):
        ids = choose(found.scores, found.token_ids, Axis.single()).cpu()
        wanted = best_choice_torch(expected.scores, expected.token_ids, Axis.single())
        assert torch.equal(ids, wanted) and wanted[3] == NO_CHOICE


@pytest.mark.parametrize("page_size", [1, 4])
def test_inputs_of_a_step(page_size: int) -> None:
    table = (torch.arange(6 * 9, dtype=torch.int32, device=DEVICE) * 7 % 54).view(6, 9)
    last = torch.tensor([3, 1, 4, 1, 5, 9], device=DEVICE)
    # With positions for the rotation and without.
    values = torch.tensor([[-1, 8, -1, 0], [0, 7, 8, 3], [2, 0, 5, 4], [1, 1, 1, 1]], device=DEVICE)
    for inputs in (values, values[:3]):
        expected = read_inputs_torch(inputs, last, table, page_size)
        found = read_inputs_triton(inputs, last, table, page_size)
        for name in ("ids", "kv_slots", "kv_lens"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_look_up_of_a_shard(dtype: torch.dtype) -> None:
    """A row of NaN reaches none but its own token."""
    weight = normal(5, 100, dtype=dtype)
    weight[0], weight[4] = float("nan"), float("nan")
    ids = torch.tensor([9, 10, 12, 13, 14, 15, 2**30], device=DEVICE)
    found = look_up_triton(ids, weight, 10)
    torch.testing.assert_close(found, look_up_torch(ids, weight, 10), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().any(dim=1).tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize("width", [16, 300, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("theirs", "ours"), [((1, 3), (0, 2)), (None, None)])
def test_rows_of_one_pool_to_another(dtype: torch.dtype, theirs: Heads, ours: Heads, width: int) -> None:
    """A row in one program and in several, and rows that are no whole words."""
    source, results = normal(3, 10, 4, width, dtype=dtype), []
    there, here = (torch.tensor(slots, device=DEVICE) for slots in ([3, 9, 1], [0, 5, 2]))
    for copy_rows in (copy_rows_torch, copy_rows_triton):
        results.append(torch.zeros(3, 8, 4, width, dtype=dtype, device=DEVICE))
        copy_rows(*as_words(select_heads(source, theirs), select_heads(results[-1], ours)), there, here)
    assert torch.equal(*results) and results[0].any()
