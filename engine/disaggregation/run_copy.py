"""Runs of slots of one pool into another: each is a piece of memory in every layer, on either side."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..weight_sync.cuda_ipc import check_status
from .page_copy import Heads
from .slot_runs import SlotRun

# (source, target, runs, stream): all heads of both, [layers, slots, (heads,) width]; the handle of a stream of the current
# device.
CopyRuns = Callable[[torch.Tensor, torch.Tensor, Sequence[SlotRun], int], None]

# Of a driver's strided copy, in bytes from one piece to the next.
MAX_PITCH = 2**31 - 1
DEVICE_MEMORY = 2
SIDE = (
    ("x", ctypes.c_size_t),
    ("y", ctypes.c_size_t),
    ("kind", ctypes.c_int),
    ("host", ctypes.c_void_p),
    ("device", ctypes.c_uint64),
    ("array", ctypes.c_void_p),
    ("pitch", ctypes.c_size_t),
)


class StridedCopy(ctypes.Structure):
    """CUDA_MEMCPY2D: `num_pieces` of `piece_bytes`, each `pitch` bytes after the one before."""

    _fields_ = (
        *((f"source_{name}", kind) for name, kind in SIDE),
        *((f"target_{name}", kind) for name, kind in SIDE),
        ("piece_bytes", ctypes.c_size_t),
        ("num_pieces", ctypes.c_size_t),
    )


def is_whole(stack: torch.Tensor, heads: Heads) -> bool:
    """Whether these are all heads, so that slots lie beside each other, and layers are not too far from each other."""
    has_all = heads is None or stack.dim() == 3 or heads == (0, stack.shape[2])
    return has_all and stack.stride(0) * stack.itemsize <= MAX_PITCH


def copy_runs_torch(source: torch.Tensor, target: torch.Tensor, runs: Sequence[SlotRun], stream: int) -> None:
    for there, here, num_slots in runs:
        target[:, here : here + num_slots] = source[:, there : there + num_slots]


def copy_runs_cuda(source: torch.Tensor, target: torch.Tensor, runs: Sequence[SlotRun], stream: int) -> None:
    """Twin of `copy_runs_torch`, by a copy engine of the device: it reads a peer at the rate of the link, and no step has
    to share a processor with it. No tensor is made: each view would cost as much as the copy of a position.

    Raises:
        RuntimeError: the driver refuses.
    """
    row_bytes, queue = source.stride(1) * source.itemsize, ctypes.c_void_p(stream)
    copy = StridedCopy(num_pieces=source.shape[0])
    copy.source_kind = copy.target_kind = DEVICE_MEMORY
    copy.source_pitch, copy.target_pitch = (stack.stride(0) * stack.itemsize for stack in (source, target))
    for there, here, num_slots in runs:
        copy.source_device = source.data_ptr() + there * row_bytes
        copy.target_device = target.data_ptr() + here * row_bytes
        copy.piece_bytes = num_slots * row_bytes
        check_status("cuMemcpy2DAsync", enqueuer().cuMemcpy2DAsync_v2(ctypes.byref(copy), queue))


@cache
def enqueuer() -> Any:
    """The driver, for calls that do not wait: the interpreter is kept, which the step thread may not give back for long."""
    return ctypes.PyDLL("libcuda.so.1")


def select_copy_runs(device: torch.device) -> CopyRuns:
    """The fastest for the device."""
    return copy_runs_torch if device.type == "cpu" else copy_runs_cuda
