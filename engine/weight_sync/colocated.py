"""For trainers on the engine's host that send tensors as sglang takes them: what they import from sglang, without pickle.

    slime, miles     from waybill.engine.weight_sync.colocated import FlattenedTensorBucket, MultiprocessingSerializer
                     in the module in which they import these from sglang
    verl             from waybill.engine.weight_sync.colocated import update_weights as sgl_update_weights

Names and arguments are sglang's. What is sent is `control/tensor_buckets.py`: where the memory is, on the device (CUDA
IPC) or on the host, and what lies in it. The memory is the trainer's: it keeps the flattened tensor until the engine has
answered, as these trainers do.
"""

from __future__ import annotations

import base64
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..control.tensor_buckets import BucketTensor, CudaIpcMemory, HostMemory, TensorBucket
from .cuda_ipc import export_handle
from .delta_codec import aligned, as_bytes
from .memory_file import write_all

NamedTensors = Sequence[tuple[str, torch.Tensor]]
FLATTENED_BUCKET = "flattened_bucket"


@dataclass
class FlattenedTensorMetadata:
    """Where a tensor lies in a flattened one: from `start_idx` to `end_idx`, of its values."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class FlattenedTensorBucket:
    """Tensors of any dtypes as one of bytes; or one that was flattened before, with what is in it."""

    supports_multi_dtypes = True

    def __init__(
        self,
        named_tensors: NamedTensors | None = None,
        flattened_tensor: torch.Tensor | None = None,
        metadata: list[FlattenedTensorMetadata] | None = None,
    ) -> None:
        if named_tensors is None:
            if flattened_tensor is None or metadata is None:
                raise ValueError("named_tensors: give these, or both flattened_tensor and metadata")
            self.flattened_tensor, self.metadata = flattened_tensor, metadata
            return
        if not named_tensors:
            raise ValueError("named_tensors: must not be empty")
        flat = [as_bytes(tensor.detach()) for _, tensor in named_tensors]
        self.flattened_tensor = torch.cat(flat)
        self.metadata = []
        begin = 0
        for (name, tensor), data in zip(named_tensors, flat, strict=True):
            end = begin + len(data)
            self.metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, begin, end, len(data)))
            begin = end

    def get_flattened_tensor(self) -> torch.Tensor:
        return self.flattened_tensor

    def get_metadata(self) -> list[FlattenedTensorMetadata]:
        return self.metadata

    def reconstruct_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Views, where their places allow it."""
        return [
            (one.name, aligned(self.flattened_tensor[one.start_idx : one.end_idx], one.dtype).reshape(one.shape))
            for one in self.metadata
        ]


class MultiprocessingSerializer:
    """Says where tensors are, as text. They must live until it was read."""

    @staticmethod
    def serialize(obj: Any, output_str: bool = False) -> str | bytes:
        """
        Args:
            obj: a flattened tensor and its metadata, by these names (also sglang's own, of one dtype or of bytes), or named
                tensors, which are copied.

        Raises:
            ValueError: it is neither.
            RuntimeError: the device's memory cannot be shared.
        """
        if isinstance(obj, dict) and obj.keys() >= {"flattened_tensor", "metadata"}:
            flattened, metadata = obj["flattened_tensor"], obj["metadata"]
        elif isinstance(obj, list) and obj and all(isinstance(one, tuple) and len(one) == 2 for one in obj):
            bucket = FlattenedTensorBucket(obj)
            flattened, metadata = bucket.flattened_tensor, bucket.metadata
            # Of the tensors that the caller keeps.
            weakref.finalize(obj[0][1], lambda kept: None, flattened)
        else:
            raise ValueError("obj: must be a dict with flattened_tensor and metadata, or a list of (name, tensor)")
        text = describe(flattened, metadata).encode()
        return text if output_str else text.encode()

    @staticmethod
    def deserialize(data: Any) -> Any:
        """Engines read it, nobody else."""
        raise ValueError("data: what serialize has made is for an engine")


def describe(flattened: torch.Tensor, metadata: Sequence[FlattenedTensorMetadata]) -> TensorBucket:
    """A flattened tensor as plain data; on the host it is copied to a file in memory, which lives as long as the tensor."""
    assert flattened.is_contiguous()
    tensors = [
        BucketTensor(
            one.name,
            str(one.dtype).removeprefix("torch."),
            tuple(one.shape),
            # Places count values of the flattened tensor, which may be bytes.
            one.start_idx * flattened.itemsize,
        )
        for one in metadata
    ]
    share = share_on_device if flattened.is_cuda else share_on_host
    return TensorBucket(share(flattened), flattened.nbytes, tensors)


def share_on_host(tensor: torch.Tensor) -> HostMemory:
    """A copy for this user's processes on this host, until `tensor` is gone."""
    descriptor = os.memfd_create("waybill-bucket", os.MFD_CLOEXEC)
    weakref.finalize(tensor, os.close, descriptor)
    write_all(descriptor, as_bytes(tensor).numpy().data)
    return HostMemory(path=f"/proc/{os.getpid()}/fd/{descriptor}")


def share_on_device(tensor: torch.Tensor) -> CudaIpcMemory:
    """The same for a CUDA tensor, without a copy: `tensor` itself is read."""
    handle, offset = export_handle(tensor)
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return CudaIpcMemory(base64.b64encode(handle).decode(), offset, uuid)


class TensorEngine(Protocol):
    """As verl's adapter of a server is."""

    async def update_weights_from_tensor(self, request: Any) -> Any: ...


@dataclass
class UpdateWeightsFromTensorReqInput:
    """The body of /update_weights_from_tensor as far as verl reads it."""

    serialized_named_tensors: list[bytes]
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


async def update_weights(
    engine: TensorEngine,
    params_batch: NamedTensors,
    device_mesh_key: str,
    device_mesh: Any,
    load_format: str | None = None,
) -> Any:
    """On every rank of the mesh's axis: each says where its tensors are, and the first one tells the engine, whose answer
    it returns. Sharded ones (DTensor) are made whole."""
    axis = device_mesh[device_mesh_key]
    whole = [(name, full_tensor(tensor)) for name, tensor in params_batch]
    bucket = FlattenedTensorBucket(whole)
    # verl's adapter of a server puts bytes into base64.
    text = describe(bucket.flattened_tensor, bucket.metadata).encode().encode()
    is_first = axis.get_local_rank() == 0
    gathered: list[bytes] | None = [b""] * axis.mesh.size()[0] if is_first else None
    dist.gather_object(text, gathered, dst=axis.mesh.tolist()[0], group=axis.get_group())
    answer = None
    if gathered is not None:
        request = UpdateWeightsFromTensorReqInput(gathered, load_format or FLATTENED_BUCKET)
        answer = await engine.update_weights_from_tensor(request)
    # The engine reads the others' memory, too.
    dist.barrier(group=axis.get_group())
    return answer


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
