"""What each rank checks: collectives by their definition, sharded layers against their unsharded twins in plain torch.

All ranks make the same random tensors, so each knows the whole answer.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from waybill.engine.io_struct import OutputOptions, SamplingParams
from waybill.engine.plan import Draw
from waybill.engine.runner.gumbel import choose_tokens_numpy
from waybill.engine.runner.plain_sampling import sample_plain
from waybill.engine.runner.sampler import NO_TOKEN, SamplingRow, sample
from waybill.parallel.collectives import all_gather, all_reduce, broadcast, gather, reduce_scatter
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from waybill.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.moe.dispatch import ReplicatedDispatcher
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import RouterConfig, TopKRouter
from waybill.parallel.weight_format import WeightFormat

CPU = torch.device("cpu")
OPTIONS = {"weight_format": WeightFormat(torch.float32, CPU)}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


def check_two_ranks() -> None:
    """Everything that two ranks show: tp 2, and the mesh of dp 2 over the same ranks."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    check_wrong_mesh()
    check_mesh(2, 1, dp_rank=rank, tp_rank=0)
    tp = check_mesh(1, 2, dp_rank=0, tp_rank=rank).tp
    check_collectives(tp)
    check_all_reduce_bits(tp)
    check_column_then_row(tp)
    check_attention_heads(tp, num_kv_heads=1)
    check_attention_heads(tp, num_kv_heads=4)
    check_vocabulary(tp, 11)
    for split in ("ep", "tp"):
        check_moe_layer(tp, split)


def check_four_ranks() -> None:
    """What two ranks cannot show: a mesh with two real axes, and sums of more than two terms."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    mesh = check_mesh(2, 2, dp_rank=rank // 2, tp_rank=rank % 2)
    check_collectives(mesh.dp)
    check_collectives(mesh.tp)
    check_all_reduce_bits(mesh.world)
    check_moe_layer(mesh.world, "ep")
    check_attention_heads(mesh.world, num_kv_heads=2)


def check_eight_ranks() -> None:
    """Fewer kv heads than ranks, an expert a rank, and a rank with one token of the vocabulary."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    mesh = check_mesh(4, 2, dp_rank=rank // 2, tp_rank=rank % 2)
    check_collectives(mesh.dp)
    check_collectives(mesh.world)
    check_all_reduce_bits(mesh.world)
    for num_kv_heads in (1, 4, 8):
        check_attention_heads(mesh.world, num_kv_heads)
    for split in ("ep", "tp"):
        check_moe_layer(mesh.world, split)
    check_vocabulary(mesh.world, 15)


def check_wrong_mesh() -> None:
    with pytest.raises(ValueError, match="dp_size=3"):
        ParallelMesh.build(dp_size=3, tp_size=1, device=CPU)


def check_mesh(dp_size: int, tp_size: int, *, dp_rank: int, tp_rank: int) -> ParallelMesh:
    mesh = ParallelMesh.build(dp_size, tp_size, CPU)
    assert (mesh.dp.rank, mesh.dp.size) == (dp_rank, dp_size)
    assert (mesh.tp.rank, mesh.tp.size) == (tp_rank, tp_size)
    assert (mesh.world.rank, mesh.world.size) == (dist.get_rank(), dp_size * tp_size)
    assert mesh.dp.ranks == tuple(range(tp_rank, dp_size * tp_size, tp_size))
    assert mesh.tp.ranks == tuple(range(dp_rank * tp_size, (dp_rank + 1) * tp_size))
    for axis in (mesh.world, mesh.dp, mesh.tp):
        assert axis.ranks[axis.rank] == dist.get_rank()
        assert (axis.group is None) == (axis.size == 1)
    return mesh


def check_collectives(axis: Axis) -> None:
    """Small whole numbers, which every dtype holds exactly."""
    for dtype in DTYPES:
        parts = torch.randint(0, 5, (axis.size, 2 * axis.size, 3)).to(dtype)
        own = parts[axis.rank]
        rows, columns, total = torch.cat(list(parts)), torch.cat(list(parts), dim=-1), parts.sum(0, dtype=dtype)
        assert torch.equal(all_gather(own, axis), rows), dtype
        assert torch.equal(all_gather(own, axis, dim=-1), columns), dtype
        gathered = gather(own, axis, dim=-1)
        assert (gathered is None) == (axis.rank > 0)
        assert gathered is None or torch.equal(gathered, columns), dtype
        assert torch.equal(all_reduce(own.clone(), axis), total), dtype
        assert torch.equal(reduce_scatter(own, axis), total[2 * axis.rank : 2 * axis.rank + 2]), dtype
        assert torch.equal(broadcast(own.clone(), axis, source=axis.size - 1), parts[-1]), dtype
        # A view that is not contiguous is taken like any other tensor.
        assert torch.equal(all_gather(own.t(), axis, dim=-1), torch.cat([part.t() for part in parts], dim=-1)), dtype


def check_all_reduce_bits(axis: Axis) -> None:
    """Every rank must hold the same bits, or ranks would route and sample differently."""
    for dtype in (torch.float32, torch.bfloat16):
        for num_values in (1, 7, 4096, 100_003):
            own = torch.randn(axis.size, num_values)[axis.rank].to(dtype)
            total = all_reduce(own.clone(), axis)
            everyones = all_gather(total[None], axis)
            assert torch.equal(everyones, total.expand_as(everyones)), (dtype, num_values)


def check_column_then_row(axis: Axis) -> None:
    """Column-parallel, then row-parallel: the way an MLP is sharded. The bias must stand in the sum once."""
    wide, narrow, bias, x = torch.randn(24, 16), torch.randn(16, 24), torch.randn(16), torch.randn(5, 16)
    column = MergedColumnParallelLinear(16, [24], axis, **OPTIONS)
    column.sharded_weight(0).load(wide)
    row = RowParallelLinear(24, 16, axis, bias=True, **OPTIONS)
    row.sharded_weight().load(narrow)
    row.sharded_bias().load(bias)
    middle = F.linear(x, wide)
    assert_close(all_gather(column(x), axis, dim=-1), middle)
    assert_close(all_reduce(row(column(x)), axis), F.linear(middle, narrow, bias))


def check_attention_heads(axis: Axis, num_kv_heads: int) -> None:
    """Each rank's key and value heads are those that its query heads use, also where ranks share one."""
    num_heads, width, hidden = 8, 4, 16
    q, k, v = (torch.randn(heads * width, hidden) for heads in (num_heads, num_kv_heads, num_kv_heads))
    layer = QKVParallelLinear(hidden, width, num_heads, num_kv_heads, axis, **OPTIONS)
    for part, weight in (("q", q), ("k", k), ("v", v)):
        layer.sharded_weight(part).load(weight)
    x = torch.randn(3, hidden)
    sizes = [layer.num_local_heads, layer.num_local_kv_heads, layer.num_local_kv_heads]
    local = layer(x).view(3, -1, width).split(sizes, dim=1)
    queries_per_kv = layer.num_local_heads // layer.num_local_kv_heads
    repeated = num_heads // num_kv_heads
    for weight, out, repeats, copies in (
        (q, local[0], 1, 1),
        (k, local[1], queries_per_kv, repeated),
        (v, local[2], queries_per_kv, repeated),
    ):
        of_every_query = F.linear(x, weight).view(3, -1, width).repeat_interleave(copies, dim=1)
        assert_close(all_gather(out.repeat_interleave(repeats, dim=1), axis, dim=1), of_every_query)


def check_vocabulary(axis: Axis, vocab_size: int) -> None:
    """One that the axis does not divide."""
    hidden = 6
    weight, ids = torch.randn(vocab_size, hidden), torch.arange(vocab_size)
    embedding = VocabParallelEmbedding(vocab_size, hidden, axis, **OPTIONS)
    embedding.sharded_weight().load(weight)
    assert torch.equal(embedding(ids), weight)
    head = ParallelLMHead(vocab_size, hidden, axis, **OPTIONS)
    head.tie(embedding)
    x = torch.randn(4, hidden)
    local = head(x)
    expected = F.linear(x, weight)
    first, count = head.columns
    assert_close(local[:, :count], expected[:, first : first + count])
    logits = head.gather(local)
    assert (logits is None) == (axis.rank > 0)
    if logits is not None:
        assert_close(logits, expected)
    check_plain_sampling(local[:, :count], first, expected, axis)


def check_plain_sampling(local: torch.Tensor, first: int, logits: torch.Tensor, axis: Axis) -> None:
    """Ranks that choose together against one that has all columns: tokens, what is no choice, log-probabilities."""
    draws = [Draw(0.0, 0, 0, True), Draw(1.0, 5, 3, True), Draw(0.3, 2**64 - 1, 10**6), Draw(1.0, 5, 3)]
    spoilt = [logits.clone(), logits.clone()]
    spoilt[0][1, 8], spoilt[1][2] = float("nan"), -float("inf")
    for whole in (logits, *spoilt):
        mine = whole[:, first : first + local.shape[1]]
        found = sample_plain(mine, first, whole.shape[1], draws, axis, choose_tokens_numpy)
        rows = [
            SamplingRow(
                SamplingParams(temperature=draw.temperature, sampling_seed=draw.seed),
                OutputOptions(return_logprob=draw.with_logprob),
                (),
                position=draw.position,
            )
            for draw in draws
        ]
        expected = sample(whole, rows)
        assert torch.equal(found.outcomes, expected.outcomes) and torch.equal(found.token_ids, expected.token_ids)
        assert found.logprobs is not None and expected.logprobs is not None
        asking = [i for i, draw in enumerate(draws) if draw.with_logprob and found.outcomes[i] != NO_TOKEN]
        assert_close(found.logprobs[asking], expected.logprobs[asking])
        everyones = all_gather(found.token_ids[None], axis)
        assert torch.equal(everyones, found.token_ids.expand_as(everyones))


def check_moe_layer(axis: Axis, split: str) -> None:
    """The layer's sum over the axis, against the same layer on one rank; every rank must hold the same bits."""
    num_experts, top_k, hidden, width = 8, 3, 16, 8
    router = TopKRouter(hidden, RouterConfig(num_experts, top_k), **OPTIONS)
    router.sharded_weights("gate")["gate.weight"].load(torch.randn(num_experts, hidden))
    sharded = Experts(num_experts, hidden, width, axis, split=split, backend="auto", **OPTIONS)
    whole = Experts(num_experts, hidden, width, Axis.single(), split=split, backend="torch_reference", **OPTIONS)
    for expert_id in range(num_experts):
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            weight = torch.randn(shape) / 4
            sharded.sharded_weight(expert_id, part).load(weight)
            whole.sharded_weight(expert_id, part).load(weight)
    x = torch.randn(9, hidden)
    out = MoeLayer(0, router, ReplicatedDispatcher(axis), sharded)(x, ReplicatedTokens(axis)).complete()
    alone = Axis.single()
    assert_close(out, MoeLayer(0, router, ReplicatedDispatcher(alone), whole)(x, ReplicatedTokens(alone)).complete())
    everyones = all_gather(out[None], axis)
    assert torch.equal(everyones, out.expand_as(everyones))


def fail_on_rank_one() -> None:
    """For the harness: rank 0 then waits for a peer that is gone."""
    if dist.get_rank() == 1:
        raise ValueError("the reason")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
