"""Weights from a checkpoint's files: each rank reads what it keeps, some threads at once.

On the CPU large blocks are read into the weights themselves. All else passes through memory of a bounded size, which is
pinned for a CUDA device, so that copies to it run while other threads read.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import torch

from ...parallel.fp8 import E4M3, QuantisedWeight
from ...parallel.weights import ShardedWeight
from .mxfp4 import PackedTensor
from .read_plan import ALIGNMENT, MAX_READ_BYTES, Block, Read, cut, plan_reads
from .safetensors_file import DTYPES, StoredTensor, dtype_of

# Of one rank; some more would wait for the same disk or bus.
MAX_THREADS = 8

# Reads that are still to be done, and the files' descriptors.
Jobs = deque[tuple[int, Read]]


class TensorFile(Protocol):
    """A file, or memory that can be read as one, and where its tensors are."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def open(self) -> BinaryIO:
        """
        Raises:
            OSError, ValueError: it is gone, or another one.
        """
        ...


class TensorFiles(Protocol):
    """What is loaded: a checkpoint, say. `packed` are those that are dequantised."""

    @property
    def files(self) -> Sequence[tuple[TensorFile, Sequence[str]]]: ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    @property
    def packed(self) -> Mapping[str, PackedTensor]: ...


@dataclass
class Changes:
    """Whether a load has begun to overwrite weights; what breaks off before has changed nothing."""

    any: bool = False


class Staging:
    """One thread's memory for what it has read, and its way to the weights."""

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._bytes = torch.empty(ALIGNMENT + MAX_READ_BYTES, dtype=torch.uint8, pin_memory=on_cuda)
        self._typed = {dtype: self._bytes.view(dtype) for dtype in DTYPES.values()}
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._copy: Callable[[torch.Tensor, torch.Tensor], object] = copy_to_device if on_cuda else copy_on_host

    def fetch(self, descriptor: int, read: Read, changes: Changes) -> None:
        """
        Raises:
            OSError, ValueError: the file cannot be read, or ends too early.
        """
        if read.in_place:
            changes.any = True
            read_exactly(descriptor, read.begin, read.blocks[0].storage)
            return
        begin = read.begin - read.begin % ALIGNMENT
        read_exactly(descriptor, read.begin, self._bytes[read.begin - begin : read.end - begin])
        changes.any = True
        with torch.cuda.stream(self._stream):
            for block in read.blocks:
                self._copy(self._values_of(block, block.begin - begin), block.storage)
        if self._stream is not None:
            self._stream.synchronize()

    def _values_of(self, block: Block, place: int) -> torch.Tensor:
        """What is kept of a block that stands at `place`."""
        if place % block.dtype.itemsize:
            # The format lets tensors of several dtypes follow each other without a gap.
            values = self._bytes[place : place + block.num_bytes].clone().view(block.dtype)
            return values.as_strided(block.storage.shape, block.strides, block.first)
        first = place // block.dtype.itemsize + block.first
        return self._typed[block.dtype].as_strided(block.storage.shape, block.strides, first)


def copy_on_host(values: torch.Tensor, storage: torch.Tensor) -> None:
    storage.copy_(values)


def copy_to_device(values: torch.Tensor, storage: torch.Tensor) -> None:
    """`copy_on_host` for weights on a CUDA device and values in pinned memory; it ends when the stream gets there."""
    if values.dtype != storage.dtype or not values.is_contiguous():
        # Made ready here: on the device that would take memory, which the KV pool has.
        ready = torch.empty(values.shape, dtype=storage.dtype, pin_memory=True)
        values = ready.copy_(values)
    storage.copy_(values, non_blocking=True)


def read_exactly(descriptor: int, begin: int, target: torch.Tensor) -> None:
    """Fill contiguous memory of the host from a file. Other threads run meanwhile.

    Raises:
        OSError: it cannot be read.
        ValueError: it ends too early.
    """
    # Not by way of numpy: storage that it has seen can no longer be released.
    left = memoryview((ctypes.c_char * target.nbytes).from_address(target.data_ptr())).cast("B")
    while left:
        num_read = os.preadv(descriptor, [left], begin)
        if num_read == 0:
            raise ValueError("a file ends before its last tensor does")
        begin, left = begin + num_read, left[num_read:]


def plan(weights: Mapping[str, ShardedWeight], file: TensorFile, names: Iterable[str]) -> list[Read]:
    """What this rank reads of a file for these tensors."""
    blocks: list[Block] = []
    for name in names:
        stored = file.tensors[name]
        for piece in weights[name].stored_pieces(stored.shape):
            blocks.extend(cut(stored.begin, dtype_of(stored), stored.shape, piece))
    return plan_reads(blocks)


def load_weights(
    weights: Mapping[str, ShardedWeight],
    checkpoint: TensorFiles,
    ignored: Container[str],
    device: torch.device,
    changes: Changes | None = None,
) -> None:
    """Fill every parameter from a checkpoint whose tensors have been checked. It may run again on a live model, between
    two steps.

    Raises:
        OSError, ValueError: a file cannot be read, or is not any more what it was when it was checked. `changes` says
            whether weights were overwritten; nothing is at work any more.
    """
    with ExitStack() as files:
        jobs: Jobs = deque()
        to_quantise: list[tuple[BinaryIO, str]] = []
        for file, names in checkpoint.files:
            opened = files.enter_context(file.open())
            as_they_are: list[str] = []
            for name in names:
                if name in ignored:
                    continue
                if is_quantised_here(weights[name], file.tensors[name]):
                    to_quantise.append((opened, name))
                else:
                    as_they_are.append(name)
            jobs.extend((opened.fileno(), read) for read in plan(weights, file, as_they_are))
        if device.type == "cuda":
            # Kernels of the last step may still read the weights.
            torch.cuda.synchronize(device)
        changes = changes or Changes()
        run_all(jobs, device, changes)
        for opened, name in to_quantise:
            changes.any = True
            weights[name].load(StoredSource(opened.fileno(), checkpoint.tensors[name]))
    for name, packed in checkpoint.packed.items():
        for piece in weights[name].pieces if name not in ignored else ():
            changes.any = True
            packed.load(piece)


@dataclass(frozen=True)
class StoredSource:
    """A matrix of a file, or a stack of them, of which slices are read as they are asked for: of one matrix at a time."""

    descriptor: int
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """
        Raises:
            OSError, ValueError: it cannot be read, or the file ends before it does.
        """
        *stack, rows, columns = index
        dtype, (num_rows, num_columns) = dtype_of(self.tensor), self.shape[-2:]
        assert all(part.stop - part.start == 1 for part in stack) and len(stack) <= 1
        first = sum(part.start for part in stack) * num_rows + rows.start
        values = torch.empty(rows.stop - rows.start, num_columns, dtype=dtype)
        read_exactly(self.descriptor, self.tensor.begin + first * num_columns * dtype.itemsize, values)
        return values[(None,) * len(stack)][..., columns]


def is_quantised_here(weight: ShardedWeight, stored: StoredTensor) -> bool:
    return isinstance(weight, QuantisedWeight) and dtype_of(stored) != E4M3


def run_all(jobs: Jobs, device: torch.device, changes: Changes) -> None:
    """As many threads as this rank has cores, each with memory of its own."""
    num_threads = min(MAX_THREADS, torch.get_num_threads(), len(jobs))
    if num_threads <= 1:
        run(jobs, Staging(device), changes)
        return
    with ThreadPoolExecutor(num_threads, "weights") as pool:
        running = [pool.submit(run, jobs, Staging(device), changes) for _ in range(num_threads)]
    for done in running:
        done.result()


def run(jobs: Jobs, staging: Staging, changes: Changes) -> None:
    """One thread's part. One that fails leaves nothing for the others to do."""
    try:
        while jobs:
            try:
                descriptor, read = jobs.popleft()
            except IndexError:
                return
            staging.fetch(descriptor, read, changes)
    except BaseException:
        jobs.clear()
        raise
