"""A delta at a rank: taken where it was made for these weights, whatever the split; refused, with nothing changed, where
not."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from waybill.engine.control.operations import (
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
)
from waybill.engine.weight_sync import receiver as receiver_module
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.delta_file import shared_delta, write_delta
from waybill.engine.weight_sync.delta_maker import DeltaBucket, DeltaMaker
from waybill.engine.weight_sync.delta_part import BoundPart
from waybill.engine.weight_sync.delta_source import StagedPayload
from waybill.engine.weight_sync.delta_transfer import KnownSums
from waybill.engine.weight_sync.inspection import join_checksums, piece_checksums
from waybill.engine.weight_sync.report import Outcome

from .test_receiver import Tensors, Trainer, sums_of
from .test_shards import LAYOUTS, make_ranks

NORM = "model.norm.weight"
Damage = Callable[[DeltaBucket], DeltaBucket]


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    yield trainer
    trainer.pool.shutdown()


def stepped(tensors: Tensors, seed: int = 5) -> Tensors:
    """Some values of each moved a little, as a step of an optimiser moves them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(t.shape, generator=generator) < 0.2, t * (1 + 2**-7), t)
        for name, t in tensors.items()
    }


def load(trainer: Trainer, tensors: Tensors) -> DeltaMaker:
    for name, weight in trainer.receiver.weights.items():
        weight.load(tensors[name])
    maker = DeltaMaker(chunk_values=50)
    dict(maker.remember(tensors.items()))
    return maker


def one(maker: DeltaMaker, tensors: Tensors) -> DeltaBucket:
    (bucket,) = maker.deltas(tensors.items())
    return bucket


def by_file(trainer: Trainer, bucket: DeltaBucket, version: str = "v2", *, is_last: bool = False) -> Outcome:
    with shared_delta(bucket) as path:
        op = UpdateWeightsFromTensor(
            path=path, load_format="delta", base_version="v1", weight_version=version, is_last=is_last
        )
        return trainer.receiver.update_weights(op)


def by_group(trainer: Trainer, bucket: DeltaBucket) -> Outcome:
    assert trainer.group is not None
    specs = [part.spec for part in bucket.manifest.parts]
    op = UpdateWeightsFromDistributed(
        [spec.name for spec in specs],
        [spec.dtype for spec in specs],
        [list(spec.shape) for spec in specs],
        "g",
        "delta",
        bucket.manifest.encode(),
        base_version="v1",
        weight_version="v2",
    )
    sending = trainer.pool.submit(trainer.group.send_bucket, [bucket.payload])
    outcome = trainer.receiver.update_weights(op)
    concurrent.futures.wait([sending])
    return outcome


def by_folder(trainer: Trainer, bucket: DeltaBucket, folder: Path) -> Outcome:
    write_delta(bucket, folder / "delta-1.safetensors")
    op = UpdateWeightsFromDisk(str(folder), "delta", base_version="v1", weight_version="v2")
    return trainer.receiver.update_weights(op)


@pytest.mark.parametrize("way", ["file", "group", "folder"])
def test_every_way_gives_the_trainers_bytes(trainer: Trainer, way: str, tmp_path: Path) -> None:
    first = trainer.tensors(1)
    second = stepped(first)
    bucket = one(load(trainer, first), second)
    assert 0 < bucket.manifest.num_bytes < 0.6 * bucket.num_full_bytes
    if way == "group":
        trainer.join()
    ways = {"file": by_file, "group": by_group, "folder": lambda t, b: by_folder(t, b, tmp_path)}
    outcome = ways[way](trainer, bucket)
    assert outcome.success and outcome.weight_version == "v2", outcome.message
    assert trainer.sums() == sums_of(second) and trainer.receiver.progress.blocked is None


def test_one_delta_after_the_other_and_after_a_full_update(trainer: Trainer, tmp_path: Path) -> None:
    """What was summed up for one delta serves the next, and no longer when something else has written weights."""
    tensors = trainer.tensors(1)
    maker = load(trainer, tensors)
    for seed in range(3):
        tensors = stepped(tensors, seed)
        assert by_file(trainer, one(maker, tensors)).success
        assert trainer.sums() == sums_of(tensors)
    other = trainer.tensors(2)
    save_file(other, tmp_path / "full.safetensors")
    assert trainer.receiver.update_weights(UpdateWeightsFromTensor(path=str(tmp_path / "full.safetensors"))).success
    refused = by_file(trainer, one(maker, stepped(tensors)))
    assert not refused.success and "; send a full update; nothing was changed" in refused.message
    assert trainer.sums() == sums_of(other)


def test_buckets_and_tensors_that_keep_their_values(trainer: Trainer) -> None:
    first = trainer.tensors(1)
    maker = load(trainer, first)
    second = {**first, **stepped({NORM: first[NORM]})}
    names = [name for name in trainer.names if name != NORM]
    half = one(maker, {name: second[name] for name in names[:5]})
    outcome = by_file(trainer, half)
    assert outcome.success and outcome.weight_version is None and "still to come" in outcome.message
    last = one(maker, {NORM: second[NORM]})
    assert by_file(trainer, last, is_last=True).weight_version == "v2"
    assert trainer.sums() == sums_of(second)


def replaced(bucket: DeltaBucket, tensor: str, /, **changes: object) -> DeltaBucket:
    parts = [
        msgspec.structs.replace(part, **changes) if part.name == tensor else part for part in bucket.manifest.parts
    ]
    return DeltaBucket(msgspec.structs.replace(bucket.manifest, parts=parts), bucket.payload)


def flipped(bucket: DeltaBucket) -> DeltaBucket:
    """A bit of the last tensor's last new value."""
    payload = bucket.payload.clone()
    payload[-1] ^= 1
    return DeltaBucket(bucket.manifest, payload)


@pytest.mark.parametrize("way", ["file", "group"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda b: replaced(b, NORM, base="0" * 16),
            f"delta: {NORM}: its checksum here is .*made for 0000000000000000",
        ),
        (
            lambda b: replaced(b, NORM, checksum="1" * 16),
            f"delta: {NORM}: the result would have checksum .* 1111111111",
        ),
        (flipped, "delta: .*: the result would have checksum"),
        (lambda b: replaced(b, NORM, shape=(8, 1)), rf"shapes: {NORM}: shape \(8, 1\): must be \(8,\)"),
        (lambda b: replaced(b, NORM, name="model.colour"), "names: the model has no model.colour"),
    ],
)
def test_a_delta_that_does_not_fit_changes_nothing(trainer: Trainer, way: str, damage: Damage, words: str) -> None:
    first = trainer.tensors(1)
    bucket = damage(one(load(trainer, first), stepped(first)))
    if way == "group":
        trainer.join()
        outcome = by_group(trainer, bucket)
    else:
        outcome = by_file(trainer, bucket)
    assert not outcome.success and outcome.weight_version is None
    assert "nothing was changed" in outcome.message
    assert re.search(words, outcome.message), outcome.message
    assert trainer.sums() == sums_of(first) and trainer.receiver.progress.blocked is None


def test_a_later_bucket_that_does_not_fit_leaves_torn_weights(trainer: Trainer) -> None:
    """The first one is in place; so the engine says what it is and serves nobody, until one full update."""
    first = trainer.tensors(1)
    maker, second = load(trainer, first), stepped(first)
    names = [name for name in trainer.names if name != NORM]
    assert by_file(trainer, one(maker, {name: second[name] for name in names})).success
    rest = one(maker, {NORM: second[NORM]})
    outcome = by_file(trainer, replaced(rest, NORM, base="0" * 16))
    assert not outcome.success and outcome.weight_version is None
    assert f"a transfer was torn (the transfer broke off: delta: {NORM}" in outcome.message
    assert trainer.receiver.progress.blocked is not None


def test_values_that_are_kept_in_another_dtype_come_whole_or_not_at_all(trainer: Trainer) -> None:
    first = {name: tensor.bfloat16() for name, tensor in trainer.tensors(1).items()}
    second = {name: tensor.bfloat16() for name, tensor in stepped(first).items()}
    refused = by_file(trainer, one(load(trainer, first), second))
    assert "the engine keeps it in float32, so its values in bfloat16 cannot change one by one" in refused.message
    maker = DeltaMaker(whole=set(first))
    dict(maker.remember(first.items()))
    bucket = one(maker, second)
    damaged = by_file(trainer, flipped(bucket))
    assert "its values have checksum" in damaged.message and damaged.message.endswith("nothing was changed")
    assert by_file(trainer, bucket).success
    assert trainer.sums() == sums_of({name: tensor.float() for name, tensor in second.items()})


def test_files_that_are_no_deltas(trainer: Trainer, tmp_path: Path) -> None:
    save_file({"payload": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "delta.safetensors")
    for path, op in (
        (
            "path",
            UpdateWeightsFromTensor(path=str(tmp_path / "delta.safetensors"), load_format="delta", base_version="a"),
        ),
        ("path", UpdateWeightsFromTensor(path=str(tmp_path), load_format="delta", base_version="a")),
        ("model_path", UpdateWeightsFromDisk(str(tmp_path), "delta", base_version="a")),
        ("model_path", UpdateWeightsFromDisk(str(tmp_path / "nowhere"), "delta", base_version="a")),
    ):
        message = trainer.receiver.update_weights(op).message
        assert message.startswith(f"{path}=") and message.endswith("nothing was changed"), message


def test_a_folder_must_bring_all(trainer: Trainer, tmp_path: Path) -> None:
    first = trainer.tensors(1)
    bucket = one(load(trainer, first), {NORM: stepped(first)[NORM]})
    outcome = by_folder(trainer, bucket, tmp_path)
    assert "model_path: the delta lacks" in outcome.message and trainer.sums() == sums_of(first)


def test_a_bucket_that_is_too_large_is_refused_before_it_comes(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer.tensors(1)
    bucket = one(load(trainer, first), stepped(first))
    trainer.join()
    monkeypatch.setattr(receiver_module, "MAX_STAGED_BYTES", 10)
    assert "must be at most 10: send more buckets" in by_group(trainer, bucket).message


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("dp_size", "tp_size", "split"), LAYOUTS)
def test_every_rank_changes_its_share(dp_size: int, tp_size: int, split: str, fused: bool) -> None:
    """Chunks end in the middle of rows; slices of rows, of columns and of the middle of fused experts."""
    ranks = []
    for model in make_ranks(dp_size, tp_size, split):
        alone, together = model.sharded_weights(), model.fused_weights()
        covered = frozenset().union(*(each.names for each in together.values())) if fused else frozenset()
        kept = {name: weight for name, weight in alone.items() if name not in covered}
        ranks.append(kept | ({name: each.weight for name, each in together.items()} if fused else {}))
    generator = torch.Generator().manual_seed(1)
    first = {name: torch.randn(weight.shape, generator=generator).bfloat16() for name, weight in ranks[0].items()}
    second = {name: tensor.bfloat16() for name, tensor in stepped(first).items()}
    maker = DeltaMaker(chunk_values=37)
    dict(maker.remember(first.items()))
    bucket = one(maker, second)
    for weights in ranks:
        for name, weight in weights.items():
            weight.load(first[name])
        for part, begin in bucket.manifest.placed():
            bound = BoundPart(part, weights[part.name], StagedPayload(bucket.payload), begin, 37)
            before = KnownSums().of(part.name, bound.weight)
            moves = bound.walk(write=False)
            assert KnownSums().of(part.name, bound.weight) == before, "only looked at"
            assert bound.walk(write=True) == moves
            after = KnownSums().of(part.name, bound.weight)
            assert all((a + m - b) % 2**64 == 0 for a, m, b in zip(before, moves, after, strict=True))
    joined = join_checksums([piece_checksums(weights) for weights in ranks], ranks[0])
    assert joined == {name: checksum(tensor) for name, tensor in second.items()}


def test_sums_are_lost_under_every_name_of_what_was_written() -> None:
    sums = KnownSums()
    sums.keep("fused", frozenset({"a", "b"}), [1])
    sums.keep("c", frozenset({"c"}), [2])
    sums.keep("a", frozenset({"a"}), [3])
    assert sums.sums == {"c": [2], "a": [3]}
    sums.keep("fused", frozenset({"a", "b"}), [4])
    assert sums.sums == {"c": [2], "fused": [4]}
