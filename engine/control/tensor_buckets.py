"""Where the tensors of a colocated trainer are, as plain data: many of them one behind the other in one piece of memory of
the ranks' host or device. Without torch.

A bucket travels as JSON text in `serialized_named_tensors`, where the field's trainers put what they pickle;
`weight_sync/colocated.py` makes it of what they hold.
"""

from __future__ import annotations

import base64
import binascii
import math

import msgspec

FORMAT = "waybill.bucket"
CUDA_HANDLE_BYTES = 64
ADAPTER = "waybill.engine.weight_sync.colocated"


class PickledError(ValueError):
    """Something else than plain data."""

    def __init__(self) -> None:
        super().__init__(
            "pickled tensors are not taken, because whoever unpickles runs what is sent; serialise them with "
            f"{ADAPTER}, which says where they are in plain data, or send path (a safetensors file on the ranks' host) or "
            "safetensors (its bytes, base64), or broadcast them with /update_weights_from_distributed"
        )


class HostMemory(msgspec.Struct, frozen=True, tag="host"):
    """A file that this user's processes on this host can open: `path` of one in memory (memfd, /dev/shm), or `shm_name`, as
    `shm_open` has it."""

    path: str | None = None
    shm_name: str | None = None

    @property
    def place(self) -> str:
        return self.path if self.path is not None else f"/dev/shm/{(self.shm_name or '').removeprefix('/')}"

    def check(self) -> None:
        """
        Raises:
            ValueError: it names no file, or two.
        """
        if (self.path is None) == (self.shm_name is None):
            raise ValueError("path, shm_name: give exactly one of them")
        name = (self.shm_name or "x").removeprefix("/")
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"shm_name={self.shm_name!r}: must be a name as shm_open takes it")
        if "\0" in self.place:
            raise ValueError("path: must have no null character")


class CudaIpcMemory(msgspec.Struct, frozen=True, tag="cuda_ipc"):
    """Device memory of another process: its handle (cudaIpcMemHandle, base64), where in that allocation the bucket begins,
    and which device it is on."""

    handle: str
    offset: int
    device_uuid: str

    @property
    def handle_bytes(self) -> bytes:
        try:
            return base64.b64decode(self.handle, validate=True)
        except binascii.Error:
            return b""

    def check(self) -> None:
        """
        Raises:
            ValueError: it is no handle.
        """
        if len(self.handle_bytes) != CUDA_HANDLE_BYTES:
            raise ValueError(f"handle: must be {CUDA_HANDLE_BYTES} bytes in base64")
        if self.offset < 0:
            raise ValueError(f"offset={self.offset}: must be at least 0")


class BucketTensor(msgspec.Struct, frozen=True, array_like=True):
    """An unsharded tensor; `offset` of its first byte in the bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorBucket(msgspec.Struct, frozen=True, tag_field="format", tag=FORMAT):
    """`num_bytes` of memory and what is in it."""

    memory: HostMemory | CudaIpcMemory
    num_bytes: int
    tensors: list[BucketTensor]

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    def check(self, dtype_bytes: dict[str, int]) -> None:
        """
        Raises:
            ValueError: it contradicts itself.
        """
        self.memory.check()
        for tensor in self.tensors:
            if tensor.dtype not in dtype_bytes:
                raise ValueError(f"{tensor.name}: dtype {tensor.dtype!r}: must be one of {', '.join(dtype_bytes)}")
            if any(size < 0 for size in tensor.shape):
                raise ValueError(f"{tensor.name}: shape {list(tensor.shape)} has a negative size")
            end = tensor.offset + math.prod(tensor.shape) * dtype_bytes[tensor.dtype]
            if tensor.offset < 0 or end > self.num_bytes:
                raise ValueError(
                    f"{tensor.name}: bytes {tensor.offset} .. {end} do not lie in a bucket of {self.num_bytes}"
                )


def parse_bucket(text: str) -> TensorBucket:
    """JSON, or JSON in base64, as verl sends what it has serialised.

    Raises:
        PickledError: it looks like neither.
        ValueError: it is no bucket.
    """
    data = text.encode()
    if not data.startswith(b"{"):
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error:
            data = b""
        if not data.startswith(b"{"):
            raise PickledError
    try:
        return msgspec.json.decode(data, type=TensorBucket)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"must be a bucket in JSON, as {ADAPTER} makes it: {error}") from None
