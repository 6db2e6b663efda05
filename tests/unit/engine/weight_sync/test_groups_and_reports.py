"""Update groups among threads, what ranks conclude together, and checksums that add up."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.field_trainer import init_custom_process_group

from waybill.engine.control.operations import InitWeightsUpdateGroup
from waybill.engine.weight_sync.checksum import GOLDEN, ODD, checksum, checksum_piece, render
from waybill.engine.weight_sync.group_registry import GroupRegistry
from waybill.engine.weight_sync.inspection import first_rows, join_checksums, join_rows, piece_checksums
from waybill.engine.weight_sync.manifest import parse_specs
from waybill.engine.weight_sync.report import RankReport, Verdict
from waybill.engine.weight_sync.sender import WeightSender, free_port
from waybill.engine.weight_sync.shared_file import shared_safetensors
from waybill.engine.weight_sync.update_group import UpdateGroup
from waybill.parallel.mesh import ParallelMesh
from waybill.parallel.weights import ShardedWeight

CPU = torch.device("cpu")
HERE = "127.0.0.1"


@pytest.fixture
def pool() -> Any:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield pool


def join(pool: concurrent.futures.Executor, name: str, timeout_s: float = 20.0) -> list[UpdateGroup]:
    port = free_port(HERE)
    joining = [pool.submit(UpdateGroup, HERE, port, rank, 3, name, "gloo", CPU, timeout_s) for rank in range(3)]
    return [future.result() for future in joining]


def test_a_trainer_that_uses_torchs_helper(pool: concurrent.futures.Executor) -> None:
    port = free_port(HERE)
    trainer = pool.submit(init_custom_process_group, f"tcp://{HERE}:{port}", 3, 0, "field helper")
    joining = [pool.submit(UpdateGroup, HERE, port, rank, 3, "field helper", "gloo", CPU, 60.0) for rank in (1, 2)]
    ranks, group = [future.result() for future in joining], trainer.result()
    for spec in parse_specs(["a", "b", "c"], ["float32", "bfloat16", "float64"], [[5, 3], [7], []]):
        sent = torch.randn(spec.shape).to(getattr(torch, spec.dtype))
        receiving = [pool.submit(rank.receive, spec) for rank in ranks]
        dist.broadcast(sent, src=0, group=group)
        assert all(torch.equal(future.result(), sent) for future in receiving)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["float32", "bfloat16", "float64"]), st.lists(st.integers(0, 4), max_size=3)))
)
def test_a_bucket_arrives_whatever_its_parts_are(parts: list[tuple[str, list[int]]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        specs = parse_specs(
            ["first", *map(str, range(len(parts)))], ["bfloat16", *(p[0] for p in parts)], [[3], *(p[1] for p in parts)]
        )
        tensors = [torch.randn(spec.shape).to(getattr(torch, spec.dtype)) for spec in specs]
        trainer, *ranks = join(pool, "bucket")
        receiving = [pool.submit(rank.receive_bucket, specs) for rank in ranks]
        trainer.send_bucket(tensors)
        for future in receiving:
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(future.result(), tensors, strict=True))
        for group in (trainer, *ranks):
            group.close()


def test_bytes_of_a_refused_bucket_would_arrive_as_the_next_ones(pool: concurrent.futures.Executor) -> None:
    """Why a group is left after a refusal."""
    trainer, *ranks = join(pool, "stale")
    (spec,) = parse_specs(["a"], ["float32"], [[2]])
    sending = [pool.submit(trainer.broadcast, torch.full((2,), value)) for value in (1.0,)]
    # The ranks refuse what value 1 stands for and do not receive; then value 2 is announced.
    receiving = [pool.submit(rank.receive, spec) for rank in ranks]
    assert [future.result().tolist() for future in receiving] == [[1.0, 1.0]] * 2
    sending[0].result()


def test_a_trainer_that_is_gone_ends_a_transfer(pool: concurrent.futures.Executor) -> None:
    trainer, *ranks = join(pool, "gone", timeout_s=1.0)
    (spec,) = parse_specs(["a"], ["float32"], [[2]])
    receiving = [pool.submit(rank.receive, spec) for rank in ranks]
    trainer.close()
    for future in receiving:
        with pytest.raises(RuntimeError):
            future.result()


def test_a_backend_must_fit_the_device() -> None:
    for backend, words in (("nccl", "needs ranks on CUDA devices"), ("mpi", "must be one of auto, gloo, nccl")):
        with pytest.raises(ValueError, match=words):
            UpdateGroup(HERE, 1, 1, 2, "x", backend, CPU, 1.0)


def init_request(port: int, **fields: Any) -> InitWeightsUpdateGroup:
    given: dict[str, Any] = {"rank_offset": 1, "world_size": 2, "group_name": "g", "backend": "gloo", **fields}
    return InitWeightsUpdateGroup(HERE, port, **given)


def join_registry(registry: GroupRegistry, op: InitWeightsUpdateGroup) -> tuple[threading.Event, list[str | None]]:
    done, said = threading.Event(), []

    def note(error: str | None) -> None:
        said.append(error)
        done.set()

    registry.join(op, note)
    return done, said


def test_the_registry_says_what_a_name_stands_for(pool: concurrent.futures.Executor) -> None:
    registry = GroupRegistry(ParallelMesh.single(CPU), 20.0, 8)
    with pytest.raises(ValueError, match="group_name: 'g' was not joined"):
        registry.get("g")
    for fields, words in (
        ({"rank_offset": 0}, r"rank_offset=0: must lie in 1 \.\. 1"),
        ({"rank_offset": 2}, r"rank_offset=2: must lie in 1 \.\. 1"),
        ({"world_size": 1}, "world_size=1: must be at least 2, for 1 engine ranks and the trainer"),
    ):
        with pytest.raises(ValueError, match=words):
            registry.check(init_request(1, **fields))
    port = free_port(HERE)
    op = init_request(port)
    registry.check(op)
    done, said = join_registry(registry, op)
    with pytest.raises(ValueError, match="'g' is taken"):
        registry.check(op)
    with pytest.raises(ValueError, match="has not come together yet"):
        registry.get("g")
    trainer = UpdateGroup(HERE, port, 0, 2, "g", "gloo", CPU, 20.0)
    assert done.wait(20) and said == [None]
    assert registry.serial("g") == 1
    receiving = pool.submit(registry.get("g").receive, parse_specs(["a"], ["float32"], [[2]])[0])
    trainer.broadcast(torch.ones(2))
    assert receiving.result().tolist() == [1.0, 1.0]
    assert registry.discard("g") and not registry.discard("g")
    registry.check(op)


def test_a_group_that_does_not_come_together_leaves_its_name_free() -> None:
    registry = GroupRegistry(ParallelMesh.single(CPU), 1.0, 8)
    op = init_request(free_port(HERE))
    done, said = join_registry(registry, op)
    assert done.wait(30)
    assert said == ["group 'g' did not come together within 1 s; the log of rank 0 says why"]
    registry.check(op)
    assert not registry._serials, "names are the trainers' choice, none is kept"


def test_tied_tensors_travel_in_a_file_each(tmp_path: Path) -> None:
    """A trainer's state dict has tensors that share memory where the head is tied."""
    tied, view = torch.arange(6.0), torch.arange(4.0)
    with shared_safetensors({"a": tied, "b": tied, "c": view[2:], "d": view[:2], "e": tied.view(2, 3).T}) as path:
        loaded = load_file(path)
    assert torch.equal(loaded["a"], tied) and torch.equal(loaded["b"], tied)
    assert loaded["c"].tolist() == [2, 3] and loaded["d"].tolist() == [0, 1]
    assert torch.equal(loaded["e"], tied.view(2, 3).T)
    assert not Path(path).exists()


class Deaf:
    """An engine of one rank that refuses everything."""

    def get_server_info(self) -> dict[str, int]:
        return {"tp_size": 1, "dp_size": 1}

    def init_weights_update_group(self, *_: object) -> None:
        raise RuntimeError("not today")


def test_a_sender_tells_what_an_engine_said() -> None:
    sender = WeightSender([(Deaf(), 1)], timeout_s=2.0)  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="weights were not sent: not today"):
        sender.connect()
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        WeightSender([], bucket_bytes=0)
    with pytest.raises(ValueError, match=r"engines\[0\]: it has 1 x 1 ranks \(dp x tp\), not 3"):
        WeightSender([(Deaf(), 3)]).connect()  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="call connect first"):
        sender.send([("a", torch.zeros(1))])


class Member:
    """An engine of one rank that joins in this process, and takes or refuses what is sent."""

    def __init__(self, refusal: str | None) -> None:
        self._refusal = refusal
        self._group: UpdateGroup | None = None
        self.num_taken = 0

    def get_server_info(self) -> dict[str, int]:
        return {"tp_size": 1, "dp_size": 1}

    def init_weights_update_group(self, host: str, port: int, rank: int, world: int, name: str, backend: str) -> None:
        if self._group is not None:
            raise RuntimeError("group_name: is taken")
        self._group = UpdateGroup(host, port, rank, world, name, backend, CPU, 20.0)

    def update_weights_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str, **_: object
    ) -> None:
        assert self._group is not None
        if self._refusal is not None:
            self._group.close()
            self._group = None
            raise RuntimeError(self._refusal)
        self._group.receive_bucket(parse_specs(names, dtypes, shapes))
        self.num_taken += 1

    def destroy_weights_update_group(self, group_name: str) -> None:
        if self._group is None:
            raise RuntimeError("was not joined")
        self._group.close()
        self._group = None


def test_after_a_refusal_of_one_engine_the_group_of_several_is_formed_anew() -> None:
    taker, refuser = Member(None), Member("names: no")
    sender = WeightSender([(taker, 1), (refuser, 1)], timeout_s=20.0)
    for _ in range(2):
        sender.connect()
        with pytest.raises(RuntimeError, match=r"weights were not sent: .*engines\[1\]: names: no"):
            sender.send([("a", torch.ones(3))])
    refuser._refusal = None
    sender.connect()
    assert sender.send([("a", torch.ones(3))]).num_tensors == 1
    assert refuser.num_taken == 1
    sender.close()


# --- verdicts -----------------------------------------------------------------------------------------------------------


def test_a_verdict_names_the_rank_where_not_all_failed() -> None:
    good, bad = RankReport(has_changed=True), RankReport("no such file")
    assert Verdict([good, good]).error is None
    assert Verdict([good, bad]).error == "rank 1: no such file"
    assert Verdict([bad, bad]).error == "no such file"
    assert Verdict([bad, good]).any_changed and not Verdict([bad, bad]).any_changed


# --- checksums ----------------------------------------------------------------------------------------------------------


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[slice, ...]]]:
    """A tensor and a grid of pieces that tiles it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    pieces: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        pieces = [(*piece, slice(a, b)) for piece in pieces for a, b in zip(cuts, cuts[1:], strict=False)]
    return tensor, pieces


@settings(deadline=None)
@given(cut_tensors())
def test_checksums_add_up_over_any_pieces(case: tuple[torch.Tensor, list[tuple[slice, ...]]]) -> None:
    tensor, pieces = case
    shape = tuple(tensor.shape)
    assert render(sum(checksum_piece(tensor[piece], piece, shape) for piece in pieces)) == checksum(tensor)


@settings(deadline=None)
@given(cut_tensors())
def test_a_checksum_is_the_sum_that_it_claims_to_be(case: tuple[torch.Tensor, list[tuple[slice, ...]]]) -> None:
    """The definition, value by value, in Python's integers."""
    tensor, _ = case
    bits = tensor.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]).tolist()
    assert checksum(tensor) == render(sum((value + 1) * (i * GOLDEN + ODD) for i, value in enumerate(bits)))


def test_a_checksum_sees_every_value_and_its_place() -> None:
    tensor = torch.arange(24, dtype=torch.float32).view(4, 6)
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    one_bit = tensor.clone()
    one_bit.view(torch.int32)[3, 5] ^= 1
    assert len({checksum(t) for t in (tensor, swapped, one_bit, tensor.T.contiguous(), tensor * 0, -0.0 * tensor)}) == 6


def two_ranks(tensor: torch.Tensor, dim: int) -> list[dict[str, ShardedWeight]]:
    """A tensor cut in two along `dim`, and one that both hold."""
    shape, half = tuple(tensor.shape), tensor.shape[dim] // 2
    both = torch.arange(3.0)
    return [
        {
            "cut": ShardedWeight.of(shape, tensor.narrow(dim, rank * half, half).clone(), dim, rank * half),
            "both": ShardedWeight.of((3,), both.clone()),
        }
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("dim", [0, 1])
def test_what_ranks_hold_is_put_together(dim: int) -> None:
    tensor = torch.randn(6, 4)
    ranks = two_ranks(tensor, dim)
    joined = join_checksums([piece_checksums(weights) for weights in ranks], ranks[0])
    assert joined == {"cut": checksum(tensor), "both": checksum(torch.arange(3.0))}
    for num_rows in (1, 3, 4, 6, 100):
        rows = join_rows([first_rows(weights["cut"], num_rows) for weights in ranks], (6, 4), num_rows)
        assert np.array_equal(rows, tensor[:num_rows].numpy())


def test_ranks_that_disagree_or_lack_a_part_are_found_out() -> None:
    ranks = two_ranks(torch.randn(6, 4), 0)
    ranks[1]["both"].pieces[0].storage[1] = 9.0
    with pytest.raises(ValueError, match="rank 1 and another hold different values of both"):
        join_checksums([piece_checksums(weights) for weights in ranks], ranks[0])
    with pytest.raises(ValueError, match="cut: 12 of 24 values are held"):
        join_checksums([piece_checksums(ranks[0])], ranks[0])
