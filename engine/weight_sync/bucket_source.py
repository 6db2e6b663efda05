"""The tensors of a colocated trainer, where they are: in memory of the host, which is read as a file of a checkpoint is, or
in memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ...parallel.mesh import ParallelMesh
from ..control.tensor_buckets import BucketTensor, CudaIpcMemory, HostMemory, TensorBucket, parse_bucket
from ..models.mxfp4 import PackedTensor
from ..models.safetensors_file import DTYPES, StoredTensor
from ..models.weight_loader import load_weights
from .cuda_ipc import device_of, foreign_memory
from .delta_codec import aligned
from .manifest import DTYPE_BYTES, TensorSpec, parse_specs
from .transfer import TRANSFER_ERRORS, AllHaveIt, Target, Transfer
from .update_group import torch_dtype

logger = logging.getLogger(__name__)

FIELD = "serialized_named_tensors"
STORED_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def bucket_of(texts: Sequence[str], mesh: ParallelMesh) -> TensorBucket:
    """This rank's: there is one for all, one for each of a group's tp ranks, or one for each of the world's.

    Raises:
        ValueError: there are as many as neither, or this one contradicts itself.
    """
    place = {1: 0, mesh.tp.size: mesh.tp.rank, mesh.world.size: mesh.world.rank}.get(len(texts))
    if place is None:
        raise ValueError(
            f"{FIELD}: has {len(texts)} entries, must have 1, {mesh.tp.size} (tp) or {mesh.world.size} (all ranks)"
        )
    bucket = parse_bucket(texts[place])
    try:
        bucket.check(DTYPE_BYTES)
    except ValueError as error:
        raise ValueError(f"{FIELD}[{place}]: {error}") from None
    return bucket


class BucketFile:
    """Memory of the host, as a file of tensors.

    Raises:
        ValueError: there is none that this rank can read, or less of it. Why, the log says: a client could look for files
            with it.
    """

    def __init__(self, memory: HostMemory, bucket: TensorBucket) -> None:
        self._path = Path(memory.place)
        self.tensors: dict[str, StoredTensor] = {
            tensor.name: StoredTensor(STORED_NAMES[tensor.dtype], tensor.shape, tensor.offset, num_bytes_of(tensor))
            for tensor in bucket.tensors
        }
        try:
            if not self._path.is_file():
                raise ValueError("not a regular file")
            size = self._path.stat().st_size
            if size < bucket.num_bytes:
                raise ValueError(f"{size} bytes, not {bucket.num_bytes}")
            self.open().close()
        except (ValueError, OSError) as error:
            logger.warning("%s: %s: %s", FIELD, memory.place, error)
            raise ValueError(
                f"{FIELD}: {memory.place!r}: must be memory of {bucket.num_bytes} bytes that every rank can read; the "
                "ranks' log says why"
            ) from None

    def open(self) -> BinaryIO:
        """
        Raises:
            OSError: it is gone.
        """
        return self._path.open("rb")


def num_bytes_of(tensor: BucketTensor) -> int:
    num_bytes = DTYPE_BYTES[tensor.dtype]
    for size in tensor.shape:
        num_bytes *= size
    return num_bytes


@dataclass(frozen=True)
class HostBucketTransfer:
    """From memory of the host; each rank reads what it keeps."""

    file: BucketFile
    device: torch.device

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        load_weights(target.weights, self, target.ignored, self.device, target.changes)

    @property
    def files(self) -> list[tuple[BucketFile, list[str]]]:
        return [(self.file, list(self.file.tensors))]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return self.file.tensors

    @property
    def packed(self) -> dict[str, PackedTensor]:
        return {}


@dataclass(frozen=True)
class DeviceBucketTransfer:
    """From memory of a device of this host, which each rank opens for as long as it reads."""

    memory: CudaIpcMemory
    bucket: TensorBucket

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        with ExitStack() as opened:
            error, data = None, torch.empty(0, dtype=torch.uint8)
            try:
                device = device_of(self.memory.device_uuid)
                data = opened.enter_context(
                    foreign_memory(self.memory.handle_bytes, self.memory.offset, self.bucket.num_bytes, device)
                )
            except TRANSFER_ERRORS as problem:
                error = f"{FIELD}: the device's memory cannot be opened: {problem}"
            refusal = all_have_it(error)
            if refusal is not None:
                raise RuntimeError(refusal)
            for tensor in self.bucket.tensors:
                if tensor.name not in target.ignored:
                    target.changes.any = True
                    part = data[tensor.offset : tensor.offset + num_bytes_of(tensor)]
                    target.weights[tensor.name].load(aligned(part, torch_dtype(tensor.dtype)).view(tensor.shape))


def bucket_transfer(bucket: TensorBucket, device: torch.device) -> Transfer:
    """
    Raises:
        ValueError: its memory cannot be read.
    """
    if isinstance(bucket.memory, HostMemory):
        return HostBucketTransfer(BucketFile(bucket.memory, bucket), device)
    if device.type != "cuda":
        raise ValueError(f"{FIELD}: memory of a CUDA device is for ranks on CUDA devices")
    return DeviceBucketTransfer(bucket.memory, bucket)


def specs_of(bucket: TensorBucket) -> list[TensorSpec]:
    """
    Raises:
        ValueError: a name stands twice.
    """
    if not bucket.tensors:
        return []
    names, dtypes, shapes = zip(*((one.name, one.dtype, one.shape) for one in bucket.tensors), strict=True)
    return parse_specs(names, dtypes, shapes)
