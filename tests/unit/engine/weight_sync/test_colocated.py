"""Buckets of a colocated trainer: what slime, miles and verl call, to a rank's weights; no pickle is read."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import pickle
from collections.abc import Iterator
from multiprocessing import shared_memory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from waybill.engine.control.operations import UpdateWeightsFromTensor
from waybill.engine.control.tensor_buckets import (
    BucketTensor,
    CudaIpcMemory,
    HostMemory,
    TensorBucket,
    parse_bucket,
)
from waybill.engine.weight_sync import colocated
from waybill.engine.weight_sync.bucket_source import bucket_of
from waybill.engine.weight_sync.colocated import FlattenedTensorBucket, MultiprocessingSerializer
from waybill.engine.weight_sync.report import Outcome

from .test_receiver import Tensors, Trainer, sums_of


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    yield trainer
    trainer.pool.shutdown()


def update(trainer: Trainer, texts: list[str], **options: Any) -> Outcome:
    op = UpdateWeightsFromTensor(
        serialized_named_tensors=texts, load_format="flattened_bucket", weight_version="7", **options
    )
    op.check()
    return trainer.receiver.update_weights(op)


def as_slime_sends(tensors: Tensors) -> tuple[dict[str, Any], str]:
    """What a rank of slime's or miles' serialises for one bucket; the dict is kept until the engine has answered."""
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    data = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    text = MultiprocessingSerializer.serialize(data, output_str=True)
    assert isinstance(text, str)
    return data, text


def test_slimes_buckets_arrive(trainer: Trainer) -> None:
    """Of several dtypes, in two calls; a number of places that no dtype is aligned at."""
    tensors = trainer.tensors(1)
    names = trainer.names
    tensors[names[0]] = tensors[names[0]].bfloat16()
    tensors[names[2]] = tensors[names[2]].double()
    kept, first = as_slime_sends({name: tensors[name] for name in names[:9]})
    outcome = update(trainer, [first])
    assert outcome.success and "still to come" in outcome.message
    kept_too, second = as_slime_sends({name: tensors[name] for name in names[9:]})
    outcome = update(trainer, [second])
    assert outcome.success and outcome.weight_version == "7", outcome.message
    assert trainer.sums() == sums_of({name: tensor.float() for name, tensor in tensors.items()})
    del kept, kept_too


def test_sglangs_own_bucket_of_one_dtype_arrives(trainer: Trainer) -> None:
    """Its places count values, not bytes."""
    tensors = trainer.tensors(2)
    metadata, begin = [], 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel()
        one = SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=begin, end_idx=end)
        metadata.append(one)
        begin = end
    data = {"flattened_tensor": torch.cat([t.flatten() for t in tensors.values()]), "metadata": metadata}
    text = MultiprocessingSerializer.serialize(data, output_str=True)
    assert update(trainer, [text]).success
    assert trainer.sums() == sums_of(tensors)


def test_verls_update_arrives(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter of a server puts what was serialised into base64."""
    tensors = trainer.tensors(3)
    outcomes: list[Outcome] = []

    class Adapter:
        async def update_weights_from_tensor(self, req: Any) -> str:
            texts = [base64.b64encode(one).decode() for one in req.serialized_named_tensors]
            assert (req.load_format, req.flush_cache, req.abort_all_requests) == ("flattened_bucket", True, False)
            outcomes.append(update(trainer, texts))
            return "answer"

    def gather(obj: bytes, gathered: list[bytes], dst: int, group: str) -> None:
        assert (dst, group) == (4, "group")
        gathered[:] = [obj]

    mesh = SimpleNamespace(size=lambda: (1,), tolist=lambda: [4])
    axis = SimpleNamespace(get_local_rank=lambda: 0, mesh=mesh, get_group=lambda: "group")
    monkeypatch.setattr(colocated.dist, "gather_object", gather)
    monkeypatch.setattr(colocated.dist, "barrier", lambda group: None)
    answer = asyncio.run(
        colocated.update_weights(
            engine=Adapter(),
            params_batch=list(tensors.items()),
            device_mesh_key="infer_tp",
            device_mesh={"infer_tp": axis},
        )
    )
    assert answer == "answer" and outcomes[0].success
    assert trainer.sums() == sums_of(tensors)


def test_memory_lives_as_long_as_the_trainers_tensor(trainer: Trainer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept, text = as_slime_sends(trainer.tensors(1))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    refused = update(trainer, [text])
    assert "that every rank can read; the ranks' log says why; nothing was changed" in refused.message


def test_named_tensors_alone_are_serialised_too(trainer: Trainer) -> None:
    tensors = list(trainer.tensors(1).items())
    assert update(trainer, [MultiprocessingSerializer.serialize(tensors, output_str=True)]).success
    assert trainer.sums() == sums_of(dict(tensors))
    assert isinstance(MultiprocessingSerializer.serialize(tensors), bytes)
    for obj in ({}, [], [1], torch.ones(1), {"flattened_tensor": 1}):
        with pytest.raises(ValueError, match="obj: must be a dict"):
            MultiprocessingSerializer.serialize(obj)
    with pytest.raises(ValueError, match="data: "):
        MultiprocessingSerializer.deserialize("x")


def test_a_bucket_of_tensors_gives_them_back() -> None:
    tensors = [("a", torch.ones(3).bfloat16()), ("b", torch.arange(4.0).view(2, 2)), ("c", torch.tensor(2.0))]
    bucket = FlattenedTensorBucket(tensors)
    again = FlattenedTensorBucket(
        flattened_tensor=bucket.get_flattened_tensor(), metadata=bucket.get_metadata()
    ).reconstruct_tensors()
    assert [name for name, _ in again] == ["a", "b", "c"]
    assert all(torch.equal(found, tensor) for (_, found), (_, tensor) in zip(again, tensors, strict=True))
    for options in ({"named_tensors": []}, {}, {"metadata": []}):
        with pytest.raises(ValueError, match="named_tensors: "):
            FlattenedTensorBucket(**options)


def test_posix_shared_memory_by_its_name(trainer: Trainer) -> None:
    tensors = trainer.tensors(4)
    bucket = FlattenedTensorBucket(list(tensors.items()))
    data = bucket.get_flattened_tensor().numpy().tobytes()
    memory = shared_memory.SharedMemory(create=True, size=len(data))
    try:
        memory.buf[: len(data)] = data
        described = TensorBucket(
            HostMemory(shm_name=memory.name),
            len(data),
            [BucketTensor(m.name, str(m.dtype)[6:], tuple(m.shape), m.start_idx) for m in bucket.get_metadata()],
        )
        assert update(trainer, [described.encode()]).success
    finally:
        memory.close()
        memory.unlink()
    assert trainer.sums() == sums_of(tensors)


HOST = HostMemory(path="/proc/self/environ")
ONE = BucketTensor("model.norm.weight", "float32", (8,), 0)


@pytest.mark.parametrize(
    ("bucket", "words"),
    [
        (TensorBucket(HOST, 32, [ONE]), "'/proc/self/environ': must be memory of 32 bytes that every rank can read"),
        (TensorBucket(HostMemory(path="/dev/zero"), 32, [ONE]), "'/dev/zero': must be memory of 32 bytes"),
        (TensorBucket(HostMemory(), 32, [ONE]), "path, shm_name: give exactly one"),
        (TensorBucket(HostMemory("/a", "b"), 32, [ONE]), "path, shm_name: give exactly one"),
        (TensorBucket(HostMemory(shm_name="../etc/passwd"), 32, [ONE]), "shm_name='../etc/passwd': must be a name"),
        (TensorBucket(HostMemory(shm_name=".."), 32, [ONE]), "shm_name='..': must be a name"),
        (TensorBucket(HostMemory(path="a\0b"), 32, [ONE]), "must have no null character"),
        (TensorBucket(HOST, 31, [ONE]), r"bytes 0 \.\. 32 do not lie in a bucket of 31"),
        (TensorBucket(HOST, 32, [msgspec.structs.replace(ONE, offset=-4)]), r"bytes -4 \.\. 28 do not lie"),
        (TensorBucket(HOST, 32, [msgspec.structs.replace(ONE, dtype="int8")]), "dtype 'int8': must be one of"),
        (TensorBucket(HOST, 32, [msgspec.structs.replace(ONE, shape=(-1,))]), "negative size"),
        (TensorBucket(HOST, 32, [ONE, ONE]), "stands twice"),
        (TensorBucket(HOST, 32, [msgspec.structs.replace(ONE, name="x")]), "names: the model has no x"),
        (TensorBucket(HOST, 32, [msgspec.structs.replace(ONE, shape=(2, 4))]), r"must be \(8,\)"),
        (TensorBucket(CudaIpcMemory("AAAA", 0, "u"), 32, [ONE]), "handle: must be 64 bytes in base64"),
        (TensorBucket(CudaIpcMemory("A" * 86 + "==", -1, "u"), 32, [ONE]), "offset=-1: must be at least 0"),
        (TensorBucket(CudaIpcMemory("A" * 86 + "==", 0, "u"), 32, [ONE]), "is for ranks on CUDA devices"),
    ],
)
def test_what_is_no_bucket_of_this_model_changes_nothing(trainer: Trainer, bucket: TensorBucket, words: str) -> None:
    before = trainer.sums()
    outcome = update(trainer, [bucket.encode()])
    assert not outcome.success and outcome.message.endswith("nothing was changed")
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(outcome.message)
    assert trainer.sums() == before


def pickled() -> str:
    return base64.b64encode(pickle.dumps([("a", 1)])).decode()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([pickled()], "pickled tensors are not taken.*serialise them with waybill.engine.weight_sync.colocated"),
        (["gASV"], "pickled tensors are not taken"),
        (["not base64!"], "pickled tensors are not taken"),
        ([], "must not be empty"),
        (["{}"], r"serialized_named_tensors\[0\]: must be a bucket in JSON"),
        (["{"], r"\[0\]: must be a bucket in JSON"),
        ([base64.b64encode(b"{\xff}").decode()], r"\[0\]: must be a bucket in JSON"),
        ([json.dumps({"format": "other"})], r"\[0\]: must be a bucket"),
        ([TensorBucket(HOST, 32, [ONE]).encode(), pickled()], "pickled tensors"),
    ],
)
def test_what_is_no_plain_data_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UpdateWeightsFromTensor(serialized_named_tensors=texts).check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "x"}, "give exactly one of them"),
        ({"load_format": "delta", "base_version": "v"}, "load_format='delta': goes with path or safetensors"),
    ],
)
def test_buckets_come_alone(options: dict[str, Any], words: str) -> None:
    text = TensorBucket(HOST, 32, [ONE]).encode()
    with pytest.raises(ValueError, match=words):
        UpdateWeightsFromTensor(serialized_named_tensors=[text], **options).check()
    with pytest.raises(ValueError, match="goes with serialized_named_tensors"):
        UpdateWeightsFromTensor(path="x", load_format="flattened_bucket").check()


@pytest.mark.parametrize(("num", "place"), [(1, 0), (2, 1), (4, 3), (3, None), (5, None)])
def test_each_rank_takes_its_own(num: int, place: int | None) -> None:
    """One for all, one for each tp rank, or one for each rank of the world: here rank 3 of two groups of two."""
    axis = SimpleNamespace(rank=1, size=2)
    mesh: Any = SimpleNamespace(tp=axis, world=SimpleNamespace(rank=3, size=4))
    texts = [TensorBucket(HOST, number, []).encode() for number in range(num)]
    if place is None:
        with pytest.raises(ValueError, match=rf"has {num} entries, must have 1, 2 \(tp\) or 4"):
            bucket_of(texts, mesh)
    else:
        assert bucket_of(texts, mesh) == parse_bucket(texts[place])


def test_an_empty_bucket_is_none(trainer: Trainer) -> None:
    """A rank of a trainer that has nothing to send says so."""
    data = {"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": []}
    outcome = update(trainer, [MultiprocessingSerializer.serialize(data, output_str=True)])
    assert outcome.success and outcome.weight_version is None
