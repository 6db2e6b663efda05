"""Cutting of linear layers, without ranks: a shard needs its place on the axis, only sums need a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from waybill.parallel.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.weight_format import WeightFormat

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"weight_format": WeightFormat(torch.float32, CPU)}


def place(rank: int, size: int) -> Axis:
    """A place on an axis nobody communicates along."""
    return Axis("tp", rank, size, None, tuple(range(size)))


def test_single_mesh_has_one_rank_everywhere() -> None:
    mesh = ParallelMesh.single(CPU)
    assert {(axis.rank, axis.size, axis.ranks) for axis in (mesh.world, mesh.dp, mesh.tp)} == {(0, 1, (0,))}


def test_on_one_rank_layers_are_plain_linear() -> None:
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    column = MergedColumnParallelLinear(4, [6], Axis.single(), **OPTIONS)
    column.sharded_weight(0).load(weight)
    assert torch.equal(column(x), F.linear(x, weight))
    row = RowParallelLinear(4, 6, Axis.single(), bias=True, **OPTIONS)
    row.sharded_weight().load(weight)
    row.sharded_bias().load(bias)
    assert torch.equal(row(x), F.linear(x, weight, bias))


def test_merged_columns_keep_each_matrix_together() -> None:
    gate, up = torch.randn(8, 4), torch.randn(4, 4)
    for rank in range(2):
        layer = MergedColumnParallelLinear(4, [8, 4], place(rank, 2), **OPTIONS)
        layer.sharded_weight(part=1).load(up)
        layer.sharded_weight(part=0).load(gate)
        assert torch.equal(layer.weight, torch.cat((gate.chunk(2)[rank], up.chunk(2)[rank])))


def test_row_parallel_returns_partial_results() -> None:
    weight, bias, x = torch.randn(5, 6), torch.randn(5), torch.randn(2, 6)
    partial = []
    for rank in range(2):
        layer = RowParallelLinear(6, 5, place(rank, 2), bias=True, **OPTIONS)
        layer.sharded_weight().load(weight)
        layer.sharded_bias().load(bias)
        partial.append(layer(x.chunk(2, dim=1)[rank]))
    torch.testing.assert_close(partial[0] + partial[1], F.linear(x, weight, bias))


@pytest.mark.parametrize(("num_kv_heads", "size", "expected"), [(4, 2, (0, 1)), (2, 4, (0, 0, 1, 1)), (1, 2, (0, 0))])
def test_kv_heads_are_cut_or_shared(num_kv_heads: int, size: int, expected: tuple[int, ...]) -> None:
    width, hidden = 4, 8
    k, bias = torch.randn(num_kv_heads * width, hidden), torch.randn(num_kv_heads * width)
    for rank in range(size):
        layer = QKVParallelLinear(hidden, width, 4, num_kv_heads, place(rank, size), bias=True, **OPTIONS)
        layer.sharded_weight("k").load(k)
        layer.sharded_bias("k").load(bias)
        rows = layer.num_local_kv_heads * width
        cut = slice(expected[rank] * rows, (expected[rank] + 1) * rows)
        start = layer.num_local_heads * width
        assert torch.equal(layer.weight[start : start + rows], k[cut])
        assert layer.bias is not None
        assert torch.equal(layer.bias[start : start + rows], bias[cut])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergedColumnParallelLinear(4, [5], place(0, 2), **OPTIONS), "out_features=5"),
        (lambda: RowParallelLinear(5, 4, place(0, 2), **OPTIONS), "in_features=5"),
        (lambda: QKVParallelLinear(4, 2, 3, 1, place(0, 2), **OPTIONS), "num_heads=3"),
        (lambda: QKVParallelLinear(4, 2, 8, 3, place(0, 2), **OPTIONS), "num_kv_heads=3"),
        (lambda: QKVParallelLinear(4, 2, 8, 3, place(0, 4), **OPTIONS), "num_kv_heads=3"),
    ],
)
def test_sizes_that_the_axis_does_not_divide_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_shape_names_what_was_found_and_expected() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\): must be \(6, 4\)"):
        MergedColumnParallelLinear(4, [6], place(0, 2), **OPTIONS).sharded_weight(0).load(torch.zeros(4, 6))
