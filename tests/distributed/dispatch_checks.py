"""What each rank checks about tokens scattered over the world: where rows go, who computes them, what the recorder gets.

All ranks make the same tensors and so know the whole answer. Numbers are small and whole, which every dtype here adds
exactly: results must be equal, not close.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from distributed.recorded_routes import check_recorded, make_recorder
from torch.testing import assert_close

from waybill.parallel.collectives import all_gather
from waybill.parallel.dp_attention import FixedTokens, ReplicatedTokens, ScatteredTokens, pad_rows, rows_per_rank
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.moe.all_to_all import AllToAllDispatcher
from waybill.parallel.moe.dispatch import (
    AllGatherDispatcher,
    Dispatcher,
    PlainDispatcher,
    ReplicatedDispatcher,
    SyncClock,
)
from waybill.parallel.moe.experts import Experts
from waybill.parallel.moe.layer import MoeLayer
from waybill.parallel.moe.router import RouterConfig, RouterOutput, TopKRouter
from waybill.parallel.weight_format import WeightFormat

CPU = torch.device("cpu")
NUM_EXPERTS = 8
HIDDEN = 6
DTYPES = (torch.float32, torch.bfloat16)
# Tokens of the two dp ranks: even, uneven, one token in the world, none on one rank.
COUNTS = ((4, 4), (7, 2), (3, 5), (1, 0), (0, 1), (0, 6), (9, 1))
ROUTES = ("any", "one expert", "one rank", "the last rank")


@dataclass(frozen=True)
class Case:
    counts: tuple[int, int]
    routes: str
    top_k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Tokens:
    """One dp rank's: hidden [T, D], ids [T, K], weights [T, K], and what the layer makes of them, [T, D]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @property
    def expected(self) -> torch.Tensor:
        factor = (self.weights.float() * (self.ids + 1)).sum(dim=1, keepdim=True)
        return (self.hidden.float() * factor).to(self.hidden.dtype)


def make_tokens(case: Case, num_tokens: int, rng: torch.Generator) -> Tokens:
    hidden = torch.randint(-2, 3, (num_tokens, HIDDEN), generator=rng).to(case.dtype)
    candidates = {
        "any": range(NUM_EXPERTS),
        "one expert": range(case.top_k),
        "one rank": range(case.top_k),
        "the last rank": range(NUM_EXPERTS - case.top_k, NUM_EXPERTS),
    }[case.routes]
    rows = [
        torch.tensor(list(candidates))[torch.randperm(len(candidates), generator=rng)][: case.top_k]
        for _ in range(num_tokens)
    ]
    ids = torch.stack(rows) if rows else torch.zeros(0, case.top_k, dtype=torch.int64)
    return Tokens(hidden, ids, torch.randint(1, 3, (num_tokens, case.top_k), generator=rng).to(case.dtype))


class WholeNumberExperts:
    """Expert e multiplies by e + 1. Counts the (row, choice) pairs that it computes."""

    def __init__(self, axis: Axis) -> None:
        num_local = NUM_EXPERTS // axis.size
        self._local = range(axis.rank * num_local, (axis.rank + 1) * num_local)
        self.num_computed = 0

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        held = (ids >= self._local.start) & (ids < self._local.stop)
        self.num_computed += int(held.sum())
        factor = (weights.float() * (ids + 1) * held).sum(dim=1, keepdim=True)
        return (hidden.float() * factor).to(hidden.dtype)

    def num_rows_wanted(self, tokens: list[Tokens]) -> int:
        return sum(any(id_ in self._local for id_ in row) for part in tokens for row in part.ids.tolist())

    def num_wanted(self, tokens: list[Tokens]) -> int:
        return sum(int(id_) in self._local for part in tokens for id_ in part.ids.flatten().tolist())


def check_dispatchers(dp_size: int, tp_size: int) -> None:
    mesh = ParallelMesh.build(dp_size, tp_size, CPU)
    check_scattered_tokens(mesh)
    rng = torch.Generator().manual_seed(1)
    for case in all_cases():
        tokens = [make_tokens(case, count, rng) for count in case.counts]
        for dispatcher in make_dispatchers(mesh.world):
            check_case(case, tokens, dispatcher, mesh)
        check_replicated(case, tokens, mesh)
    for split, dtype in itertools.product(("ep", "tp"), DTYPES):
        check_moe_layers(mesh, split, dtype)
    check_fixed_tokens(mesh)
    check_sync_clock(mesh.world)


def all_cases() -> Iterator[Case]:
    for counts, routes, top_k, dtype in itertools.product(COUNTS, ROUTES, (1, 2, 3), DTYPES):
        if routes != "one expert" or top_k == 1:
            yield Case(counts, routes, top_k, dtype)


def make_dispatchers(world: Axis) -> list[Dispatcher]:
    return [
        PlainDispatcher(world),
        AllGatherDispatcher(world, SyncClock()),
        AllToAllDispatcher(world, NUM_EXPERTS, SyncClock()),
    ]


def check_case(case: Case, tokens: list[Tokens], dispatcher: Dispatcher, mesh: ParallelMesh) -> None:
    name = f"{case} {type(dispatcher).__name__}"
    own = tokens[mesh.dp.rank]
    layout = ScatteredTokens(len(own.hidden), rows_per_rank(list(case.counts), mesh.tp.size), mesh.tp, CPU)
    hidden, held = layout.scatter(own.hidden), layout.num_held
    routed = RouterOutput(layout.scatter(own.ids), layout.scatter(own.weights))
    # A router routes padding like anything else; it must be the dispatcher that drops it.
    hidden[held:] = 1
    routed.ids[held:] = torch.arange(case.top_k)
    routed.weights[held:] = 1
    before = (hidden.clone(), routed.ids.clone(), routed.weights.clone())
    experts = WholeNumberExperts(mesh.world)
    dispatched = dispatcher.dispatch(hidden, routed, layout.is_padding)
    out = dispatcher.combine(experts(dispatched.hidden, dispatched.ids, dispatched.weights), dispatched).complete()
    assert experts.num_computed == experts.num_wanted(tokens), f"{name}: padding, or a row twice"
    assert out.dtype == case.dtype and out.shape == hidden.shape, name
    assert torch.equal(layout.gather(out), own.expected), name
    assert not out[held:].any(), name
    for given, kept in zip((hidden, routed.ids, routed.weights), before, strict=True):
        assert torch.equal(given, kept), f"{name}: the caller's tensors were changed"
    if isinstance(dispatcher, AllToAllDispatcher):
        assert len(dispatched.hidden) == experts.num_rows_wanted(tokens), f"{name}: a row came that nobody needs here"
    if dispatcher.gathers_ids:
        assert torch.equal(dispatched.ids, world_ids(tokens, layout, mesh)), name


def world_ids(tokens: list[Tokens], layout: ScatteredTokens, mesh: ParallelMesh) -> torch.Tensor:
    """Ids of all rows in world order, padding -1."""
    rows = layout.num_rows * mesh.tp.size
    parts = []
    for part in tokens:
        padded = torch.full((rows, part.ids.shape[1]), -1)
        padded[: len(part.ids)] = part.ids
        parts.append(padded)
    return torch.cat(parts)


def check_replicated(case: Case, tokens: list[Tokens], mesh: ParallelMesh) -> None:
    """All tokens on all ranks."""
    hidden, ids, weights = (
        torch.cat([getattr(part, name) for part in tokens]) for name in ("hidden", "ids", "weights")
    )
    experts, dispatcher = WholeNumberExperts(mesh.world), ReplicatedDispatcher(mesh.world)
    dispatched = dispatcher.dispatch(hidden, RouterOutput(ids, weights), None)
    out = dispatcher.combine(experts(dispatched.hidden, dispatched.ids, dispatched.weights), dispatched).complete()
    assert torch.equal(out, torch.cat([part.expected for part in tokens])), case
    assert experts.num_computed == experts.num_wanted(tokens), case


# --- layers with a recorder -------------------------------------------------------------------------------------------


def check_moe_layers(mesh: ParallelMesh, split: str, dtype: torch.dtype) -> None:
    """Two real layers: their sum against the same layers on one rank, and the ids and weights that reach the ring from
    every dispatcher, by `record` and by the late gather."""
    rng = torch.Generator().manual_seed(2)
    top_k, hidden, width = 3, 16, 8
    weights = [make_weights(hidden, width, rng) for _ in range(2)]
    for counts in COUNTS:
        tokens = [torch.randn(count, hidden, generator=rng).to(dtype) for count in counts]
        layout = ScatteredTokens(counts[mesh.dp.rank], rows_per_rank(list(counts), mesh.tp.size), mesh.tp, CPU)
        x = layout.scatter(tokens[mesh.dp.rank])
        whole = [
            make_layer(index, each, Axis.single(), split, dtype, top_k, ReplicatedDispatcher(Axis.single()))
            for index, each in enumerate(weights)
        ]
        dispatchers = make_dispatchers(mesh.world)
        for dispatcher in dispatchers if split == "ep" else dispatchers[:2]:
            ring, recorder = make_recorder(mesh, layout, top_k, dispatcher, dtype, NUM_EXPERTS)
            seq = recorder.begin(layout.num_rows) if recorder is not None else -1
            for index, each in enumerate(weights):
                layer = make_layer(index, each, mesh.world, split, dtype, top_k, dispatcher)
                out = layout.gather(layer(x, layout, recorder).complete())
                alone = ReplicatedTokens(Axis.single())
                expected = whole[index](tokens[mesh.dp.rank], alone).complete() if layout.num_tokens else out
                tolerance = 1e-5 if dtype == torch.float32 else 2**-7
                torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * 4)
            if recorder is not None:
                recorder.finish()
            # A product's last bits are those of its shape: the same rows as a rank's router has had.
            used = [all_gather(layer.router(x).weights, mesh.world) for layer in whole]
            if ring is not None:
                for dp_rank, part in enumerate(tokens):
                    first = dp_rank * layout.num_rows * mesh.tp.size
                    chosen = [layer.router(part).ids.tolist() for layer in whole]
                    where = f"{counts} {type(dispatcher).__name__} dp rank {dp_rank}"
                    check_recorded(ring, seq, slice(first, first + len(part)), chosen, used, where)
        if x.shape[0]:
            # Of the plain twin and the one by all-gather: the same inputs reach the same experts in the same order.
            plain, packed = (each.dispatch(x, whole[0].router(x), layout.is_padding) for each in dispatchers[:2])
            assert torch.equal(plain.hidden, packed.hidden)
            assert torch.equal(plain.ids, packed.ids)
            held = plain.ids[:, 0] >= 0
            assert torch.equal(plain.weights[held], packed.weights[held])


def check_fixed_tokens(mesh: ParallelMesh) -> None:
    """What a CUDA graph records, run as it is: the results and routes of a layout that knows its padding on the host."""
    rng = torch.Generator().manual_seed(3)
    top_k, hidden, width, spare = 3, 16, 8, 2
    weights = make_weights(hidden, width, rng)
    for counts in COUNTS:
        num_rows = rows_per_rank(list(counts), mesh.tp.size) + spare
        num_tokens = counts[mesh.dp.rank]
        tokens = [torch.randn(count, hidden, generator=rng) for count in counts]
        padding = torch.arange(num_rows * mesh.tp.size) >= num_tokens
        known = ScatteredTokens(num_tokens, num_rows, mesh.tp, CPU)
        fixed = FixedTokens(num_rows, mesh.tp, padding)
        # Padding has hidden states like anything else.
        padded = pad_rows(tokens[mesh.dp.rank], num_rows * mesh.tp.size) + padding[:, None]
        for dispatcher in make_dispatchers(mesh.world):
            layer = make_layer(0, weights, mesh.world, "ep", torch.float32, top_k, dispatcher)
            ring, recorder = make_recorder(
                mesh, known, top_k, dispatcher.fixed, torch.float32, NUM_EXPERTS, num_layers=1
            )
            seq = -1 if recorder is None else recorder.begin(num_rows)
            found = fixed.gather(layer(fixed.scatter(padded), fixed, recorder).complete())[:num_tokens]
            expected = known.gather(layer(known.scatter(tokens[mesh.dp.rank]), known).complete())
            assert_close(found, expected)
            block = fixed.run_sharded(lambda rows: rows * 2, fixed.scatter(padded)).complete()
            assert torch.equal(fixed.gather(block), padded * 2 * mesh.tp.size)
            if recorder is not None:
                recorder.finish()
            used = [all_gather(layer.router(fixed.scatter(padded)).weights, mesh.world)]
            if ring is not None:
                for dp_rank, part in enumerate(tokens):
                    first = dp_rank * num_rows * mesh.tp.size
                    chosen = [layer.router(part).ids.tolist()]
                    check_recorded(ring, seq, slice(first, first + len(part)), chosen, used, f"{counts} {dp_rank}")


def make_weights(hidden: int, width: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "router": torch.randn(NUM_EXPERTS, hidden, generator=rng),
        "gate": torch.randn(NUM_EXPERTS, width, hidden, generator=rng) / 4,
        "up": torch.randn(NUM_EXPERTS, width, hidden, generator=rng) / 4,
        "down": torch.randn(NUM_EXPERTS, hidden, width, generator=rng) / 4,
    }


def make_layer(
    index: int,
    weights: dict[str, torch.Tensor],
    axis: Axis,
    split: str,
    dtype: torch.dtype,
    top_k: int,
    dispatcher: Dispatcher,
) -> MoeLayer:
    hidden, width = weights["down"].shape[1:]
    router = TopKRouter(hidden, RouterConfig(NUM_EXPERTS, top_k), weight_format=WeightFormat(dtype, CPU))
    router.sharded_weights("gate")["gate.weight"].load(weights["router"])
    experts = Experts(
        NUM_EXPERTS, hidden, width, axis, split=split, backend="auto", weight_format=WeightFormat(dtype, CPU)
    )
    for expert_id, part in itertools.product(range(NUM_EXPERTS), ("gate", "up", "down")):
        experts.sharded_weight(expert_id, part).load(weights[part][expert_id])
    return MoeLayer(index, router, dispatcher, experts)


# --- tokens over the tp axis ------------------------------------------------------------------------------------------


def check_scattered_tokens(mesh: ParallelMesh) -> None:
    """Scatter and gather are inverse; a block runs on all rows of the dp rank, and its partial sums arrive once."""
    axis = mesh.tp
    for num_tokens, spare in itertools.product(range(8), range(3)):
        num_rows = rows_per_rank([num_tokens], axis.size) + spare
        layout = ScatteredTokens(num_tokens, num_rows, axis, CPU)
        x = torch.arange(num_tokens * 2, dtype=torch.float32).view(num_tokens, 2) + 1 + 100 * mesh.dp.rank
        scattered = layout.scatter(x)
        assert scattered.shape == (num_rows, 2)
        assert not scattered[layout.num_held :].any() and scattered[: layout.num_held].all()
        held = all_gather(torch.tensor([layout.num_held]), axis)
        assert int(held.sum()) == num_tokens, "a row on two ranks, or on none"
        assert torch.equal(layout.gather(scattered), x)
        calls: list[torch.Tensor] = []

        def block(rows: torch.Tensor, calls: list[torch.Tensor] = calls) -> torch.Tensor:
            calls.append(rows)
            return rows * (axis.rank + 1)

        # What stands in the padding must not leak into anybody's rows.
        scattered[layout.num_held :] = 77
        result = layout.run_sharded(block, scattered).complete()
        assert all(torch.equal(rows, x) for rows in calls) and len(calls) == (num_tokens > 0)
        assert not result[layout.num_held :].any()
        assert torch.equal(layout.gather(result), x * sum(range(1, axis.size + 1)))


def check_sync_clock(world: Axis) -> None:
    """Ranks that come early see time pass in the collective; the one that comes last hardly any."""
    for dispatcher_class in (AllGatherDispatcher, AllToAllDispatcher):
        clock = SyncClock()
        args = (world, clock) if dispatcher_class is AllGatherDispatcher else (world, NUM_EXPERTS, clock)
        dispatcher = dispatcher_class(*args)
        hidden, routed = torch.ones(1, HIDDEN), RouterOutput(torch.tensor([[0, 1]]), torch.ones(1, 2))
        if world.rank == 0:
            # The others wait in the dispatch until this rank, which they tell nothing, has done its work.
            busy = torch.ones(1500, 1500)
            for _ in range(20):
                busy = busy @ busy / 1500
        dispatcher.dispatch(hidden, routed, None)
        waits = all_gather(torch.tensor([clock.seconds], dtype=torch.float64), world).tolist()
        assert min(waits) == waits[0], waits
    dist.barrier()
