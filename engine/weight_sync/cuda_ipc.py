"""Device memory of another process on this host, by a handle of plain bytes, over the driver's API.

torch's own way shares a counter of references besides, which it passes on by pickling. Here whoever made the memory keeps
it until the other one has answered.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1


class Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class ForeignBytes:
    """What torch makes a tensor of without a copy."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


@cache
def driver() -> Any:
    """
    Raises:
        OSError: there is none.
    """
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), Handle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    return library


def call(name: str, *arguments: Any) -> None:
    """
    Raises:
        RuntimeError: the driver refuses.
    """
    check_status(name, getattr(driver(), name)(*arguments))


def check_status(name: str, status: int) -> None:
    """Of a call of the driver.

    Raises:
        RuntimeError: it was refused.
    """
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'').decode() or status}")


def export_handle(tensor: torch.Tensor) -> tuple[bytes, int]:
    """Of a contiguous tensor's memory: the handle of its allocation, and where in it the tensor begins. Work on the current
    stream is waited for, since another process will not.

    Raises:
        RuntimeError: the memory cannot be shared, as that of `expandable_segments` cannot.
    """
    torch.cuda.current_stream(tensor.device).synchronize()
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), Handle()
    pointer = ctypes.c_uint64(tensor.data_ptr())
    with torch.cuda.device(tensor.device):
        call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle), tensor.data_ptr() - base.value


class MappedMemory:
    """An allocation of another process, from now until `close`, as seen by `device`, which need not be the one that has it:
    a peer is read over their link, also where this process does not see it.

    Raises:
        RuntimeError: there is no such memory, or the device cannot reach it.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        self._device = device
        self._pointer = ctypes.c_uint64()
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with torch.cuda.device(device):
            # torch makes the device's context when it is first used, and a thread takes it.
            torch.cuda.synchronize(device)
            foreign = Handle.from_buffer_copy(handle)
            call("cuIpcOpenMemHandle_v2", ctypes.byref(self._pointer), foreign, LAZY_PEER_ACCESS)
            call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), self._pointer)
        self._size = size.value

    def place(self, offset: int, num_bytes: int) -> int:
        """The address of a part.

        Raises:
            RuntimeError: it is not all there.
        """
        if offset < 0 or offset + num_bytes > self._size:
            raise RuntimeError(f"bytes {offset} .. {offset + num_bytes} of an allocation of {self._size}")
        return self._pointer.value + offset

    def tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], called a tensor of this device, whose kernels read it, wherever it is. Gone with `close`."""
        make_storage: Any = torch._C._construct_storage_from_data_pointer
        storage = make_storage(self.place(offset, num_bytes), self._device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage, 0, (num_bytes,), (1,))

    def close(self) -> None:
        """What reads it is waited for."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            call("cuIpcCloseMemHandle", self._pointer)


@contextmanager
def foreign_memory(handle: bytes, offset: int, num_bytes: int, device: torch.device) -> Iterator[torch.Tensor]:
    """uint8 [num_bytes] on the device, as long as the block lasts; what reads it is waited for.

    Raises:
        RuntimeError: there is no such memory, or less of it.
    """
    memory = MappedMemory(handle, device)
    try:
        yield torch.as_tensor(ForeignBytes(memory.place(offset, num_bytes), num_bytes), device=device)
    finally:
        memory.close()


def device_of(uuid: str) -> torch.device:
    """
    Raises:
        RuntimeError: this process sees no such device.
    """
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.device("cuda", index)
    raise RuntimeError(f"device_uuid={uuid!r}: no device of this rank")
