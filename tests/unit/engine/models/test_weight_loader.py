"""A rank's weights from files: the same values as from whole tensors, however they are cut, and no more bytes than that."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from waybill.engine.models import read_plan, weight_loader
from waybill.engine.models.checkpoint import Checkpoint, check_tensors
from waybill.engine.models.read_plan import cut, plan_reads
from waybill.engine.models.weight_loader import Changes, copy_on_host, copy_to_device, load_weights
from waybill.engine.weight_sync.shared_file import shared_safetensors
from waybill.parallel.weights import Piece, ShardedWeight

CPU = torch.device("cpu")
NONE: frozenset[str] = frozenset()
# Experts, rows, columns of a rank, out of tensors [8, 6, 32]; and how they are stored.
PARTS = [
    (slice(0, 8), slice(0, 6), slice(0, 32)),
    (slice(2, 4), slice(0, 6), slice(0, 32)),
    (slice(0, 8), slice(3, 6), slice(0, 32)),
    (slice(1, 8), slice(0, 6), slice(16, 24)),
]
SHAPE = (8, 6, 32)


def weight_of(part: tuple[slice, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ShardedWeight]:
    storage = torch.full([p.stop - p.start for p in part], torch.nan, dtype=dtype)
    return storage, ShardedWeight(SHAPE, (Piece(part, storage),))


def load(weights: dict[str, ShardedWeight], path: Path, ignored: frozenset[str] = NONE) -> None:
    checkpoint = Checkpoint(str(path))
    check_tensors(weights, checkpoint, ignored)
    load_weights(weights, checkpoint, ignored, CPU)


# A limit on a read and on a long row; 192 bytes are a row of an expert and 1.5 of another dtype.
@pytest.mark.parametrize("limits", [(8 << 20, 1 << 20, 128 << 10), (8 << 20, 128, 64), (192, 128, 64), (500, 500, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_parts_are_those_of_the_whole_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: Sequence[int], dtype: torch.dtype, num_threads: int
) -> None:
    for name, limit in zip(("MAX_READ_BYTES", "LONG_ROW_BYTES", "MIN_DIRECT_BYTES"), limits, strict=True):
        monkeypatch.setattr(read_plan, name, limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    tensors = {f"t{i}": torch.randn(SHAPE).to(torch.float32 if i % 2 else torch.bfloat16) for i in range(8)}
    save_file(tensors | {"unused": torch.ones(3)}, tmp_path / "model.safetensors")
    kept = {name: weight_of(PARTS[i % len(PARTS)], dtype) for i, name in enumerate(tensors)}
    load({name: weight for name, (_, weight) in kept.items()}, tmp_path, frozenset({"unused"}))
    for i, (name, tensor) in enumerate(tensors.items()):
        assert torch.equal(kept[name][0], tensor[PARTS[i % len(PARTS)]].to(dtype)), name


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.randn(4, 6), torch.float32),
        (torch.randn(4, 6), torch.bfloat16),
        (torch.randn(4, 9)[:, 2:8], torch.float32),
    ],
)
def test_what_is_copied_to_a_device_is_what_is_copied_on_the_host(
    monkeypatch: pytest.MonkeyPatch, values: torch.Tensor, dtype: torch.dtype
) -> None:
    """The two ways of `Staging`; here, without memory that is pinned."""
    empty = torch.empty
    expected, actual = empty(4, 6, dtype=dtype), empty(4, 6, dtype=dtype)
    copy_on_host(values, expected)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    copy_to_device(values, actual)
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(read_plan, "MAX_READ_BYTES", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    device = torch.device("cuda", 0)
    tensors = {f"t{i}": torch.randn(SHAPE).bfloat16() for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    kept = {}
    for i, name in enumerate(tensors):
        storage = weight_of(PARTS[i % len(PARTS)], dtype)[0].to(device)
        kept[name] = ShardedWeight(SHAPE, (Piece(PARTS[i % len(PARTS)], storage),))
    for _ in range(2):
        load_weights(kept, Checkpoint(str(tmp_path)), NONE, device)
        for name, tensor in tensors.items():
            (piece,) = kept[name].pieces
            assert torch.equal(piece.storage.cpu(), tensor[piece.index].to(dtype)), name
            piece.storage.zero_()


def test_a_tensor_without_dims_and_one_that_nobody_keeps(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.0), "other": torch.ones(5)}, tmp_path / "model.safetensors")
    scalar = torch.zeros(())
    load({"scalar": ShardedWeight((), (Piece((), scalar),)), "other": ShardedWeight((5,), ())}, tmp_path)
    assert scalar == 3


def test_tensors_that_are_not_aligned() -> None:
    """The format allows it, and the frontend's files in memory have it."""
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.randn(2).double()}
    storages = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with shared_safetensors(tensors) as path:
        load({name: ShardedWeight.of(tuple(s.shape), s) for name, s in storages.items()}, Path(path))
    assert all(torch.equal(storages[name], tensor) for name, tensor in tensors.items())


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for file_name, tensors in shards.items():
        save_file(tensors, folder / file_name)
    names = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_a_rank_reads_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors of other ranks are passed over, a whole file of them, too; rows of another rank's as well."""
    size = 1 << 18
    names = ["a", "b", "c", "d"]
    write_shards(tmp_path, {f"{name}.safetensors": {name: torch.randn(4, size // 4)} for name in names})
    mine = torch.zeros(2, size // 4)
    weights = {name: ShardedWeight((4, size // 4), ()) for name in names}
    weights["c"] = ShardedWeight.of((4, size // 4), mine, first=2)
    num_bytes = []

    def count(descriptor: int, buffers: Any, offset: int) -> int:
        num_bytes.append(preadv(descriptor, buffers, offset))
        return num_bytes[-1]

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", count)
    load(weights, tmp_path)
    assert sum(num_bytes) == mine.nbytes and mine.all()


def test_small_neighbours_are_read_together() -> None:
    blocks = []
    for i in range(1000):
        _, weight = weight_of(PARTS[1], torch.bfloat16)
        blocks.extend(cut(1000 + i * 3072, torch.bfloat16, SHAPE, weight.pieces[0]))
    (read,) = plan_reads(blocks[::-1])
    assert (read.begin, read.end) == (1000 + 2 * 384, 1000 + 999 * 3072 + 4 * 384) and len(read.blocks) == 1000
    large = torch.zeros(3 << 20, dtype=torch.uint8).view(torch.bfloat16)
    piece = Piece((slice(0, len(large)),), large)
    assert [read.in_place for read in plan_reads(cut(0, torch.bfloat16, tuple(large.shape), piece))] == [True]


def test_reads_that_come_in_parts_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, storage = torch.randn(1000), torch.zeros(1000)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:300]], offset))
    load({"a": ShardedWeight.of((1000,), storage)}, tmp_path)
    assert torch.equal(storage, tensor)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_one_thread_that_fails_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(read_plan, "MAX_READ_BYTES", 64)
    save_file({"a": torch.randn(100, 16)}, tmp_path / "model.safetensors")
    reads: list[int] = []

    def fail(*arguments: Any) -> None:
        reads.append(1)
        raise OSError("input/output error")

    monkeypatch.setattr(weight_loader, "read_exactly", fail)
    changes = Changes()
    weights = {"a": ShardedWeight.of((100, 16), torch.zeros(100, 16))}
    with pytest.raises(OSError, match="input/output error"):
        load_weights(weights, Checkpoint(str(tmp_path)), NONE, CPU, changes)
    assert len(reads) <= num_threads and not changes.any


def test_an_index_that_promises_more_than_a_shard_has(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"a": torch.ones(3)}})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"shard a\.safetensors has no tensor b"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.ones(3)}, "lacks 1 tensors: b"),
        ({"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}, "has unknown 1 tensors: c"),
        ({"a": torch.ones(3), "b": torch.ones(4)}, r"tensor b: shape \(4,\): must be \(3,\)"),
        ({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.int32)}, "tensor b: dtype I32: must be one of BF16"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        load({name: ShardedWeight.of((3,), torch.zeros(3)) for name in "ab"}, tmp_path)
