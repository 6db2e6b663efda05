"""Keys and values of some positions, from the pool and into it: host bytes, layer by layer and tensor by tensor.

The bytes of one rank fit another's whatever their page sizes are, for a position is a position. `HostPages` is for pools in
the host's memory, `DevicePages` for others; both may be called from any one thread, beside the steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from ..kv_cache.kv_store import KVStore, StackPlace

Heads = tuple[int, int] | None


class PageCopy(Protocol):
    def gather(self, pages: np.ndarray, start: int, end: int, heads: Heads) -> memoryview:
        """Positions `[start, end)` of a request on these pages."""
        ...

    def scatter(self, pages: np.ndarray, start: int, end: int, heads: Heads, data: memoryview) -> None:
        """The reverse.

        Raises:
            ValueError: it is not as many bytes as that takes.
        """
        ...

    def bytes_per_position(self, heads: Heads) -> int: ...

    def mark(self) -> Callable[[], None]:
        """On the step thread. What it returns waits, on any thread, until all that was launched up to now is done."""
        ...


def slots_of(pages: np.ndarray, start: int, end: int, page_size: int) -> np.ndarray:
    """KV slots [n] int64 of positions `[start, end)` of a request on `pages` [m] int32.

    Raises:
        IndexError: there are fewer pages.
    """
    first, last = start // page_size, -(-end // page_size)
    if last > len(pages):
        raise IndexError(f"{len(pages)} pages for positions {start} .. {end}")
    if page_size == 1:
        return pages[start:end].astype(np.int64)
    slots = pages[first:last, None].astype(np.int64) * page_size + np.arange(page_size)
    return slots.reshape(-1)[start - first * page_size : end - first * page_size]


def entry_bytes(tensor: torch.Tensor, heads: Heads) -> int:
    """Of one position in a tensor of the pool, [slots, heads, width] or [slots, width]."""
    num_heads = 1 if tensor.dim() == 2 else (tensor.shape[1] if heads is None else heads[1] - heads[0])
    return num_heads * tensor.shape[-1] * tensor.element_size()


def byte_counters(num_bytes: Mapping[str, int]) -> dict[str, int]:
    """What is told of bytes that have come or gone, by carrier."""
    named = {f"transferred_{carrier}_bytes": num_bytes[carrier] for carrier in ("shared", "nixl")}
    return {"transferred_bytes": sum(num_bytes.values()), **named}


def check_size(data: memoryview, num_bytes: int) -> None:
    if data.nbytes != num_bytes:
        raise ValueError(f"{data.nbytes} bytes of keys and values arrived in place of {num_bytes}")


def host_bytes(kv_store: KVStore) -> np.ndarray:
    """The pool's memory, to read and write. Made anew each time, as it may have been given back in between; and not by
    torch, whose storages cannot be given back any more once there was an array of them."""
    memory = kv_store.memory
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes).from_address(memory.data_ptr()))


def as_rows(stack: StackPlace, memory: np.ndarray) -> np.ndarray:
    """The stack as bytes [layers, slots, (heads,) bytes]."""
    part = memory[stack.offset : stack.offset + stack.num_bytes]
    return part.reshape(*stack.shape[:-1], stack.shape[-1] * stack.dtype.itemsize)


class HostPages:
    """By numpy, which works on one core and lets the interpreter go on with the step thread."""

    def __init__(self, kv_store: KVStore, page_size: int) -> None:
        self._kv_store = kv_store
        self._tensors = list(kv_store.tensors())
        self._page_size = page_size

    def _arrays(self, heads: Heads) -> Iterator[np.ndarray]:
        memory = host_bytes(self._kv_store)
        stacks = [as_rows(stack, memory) for stack in self._kv_store.stacks]
        for layers in zip(*stacks, strict=True):
            for array in layers:
                yield array if heads is None or array.ndim == 2 else array[:, heads[0] : heads[1]]

    def bytes_per_position(self, heads: Heads) -> int:
        return sum(entry_bytes(tensor, heads) for tensor in self._tensors)

    def gather(self, pages: np.ndarray, start: int, end: int, heads: Heads) -> memoryview:
        slots = slots_of(pages, start, end, self._page_size)
        parts = [array[slots].reshape(-1) for array in self._arrays(heads)]
        return np.concatenate(parts).data

    def scatter(self, pages: np.ndarray, start: int, end: int, heads: Heads, data: memoryview) -> None:
        check_size(data, (end - start) * self.bytes_per_position(heads))
        slots = slots_of(pages, start, end, self._page_size)
        flat, offset = np.frombuffer(data, dtype=np.uint8), 0
        for target in self._arrays(heads):
            size = len(slots) * int(np.prod(target.shape[1:]))
            target[slots] = flat[offset : offset + size].reshape(len(slots), *target.shape[1:])
            offset += size

    def mark(self) -> Callable[[], None]:
        """A step that was launched here is done."""
        return lambda: None


class DevicePages:
    """By torch, on a stream of its own."""

    def __init__(self, kv_store: KVStore, page_size: int) -> None:
        self._tensors = list(kv_store.tensors())
        self._page_size = page_size
        self._device = self._tensors[0].device
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None

    def bytes_per_position(self, heads: Heads) -> int:
        return sum(entry_bytes(tensor, heads) for tensor in self._tensors)

    def mark(self) -> Callable[[], None]:
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        wait: Callable[[], None] = event.synchronize
        return wait

    @torch.inference_mode()
    def gather(self, pages: np.ndarray, start: int, end: int, heads: Heads) -> memoryview:
        with torch.cuda.stream(self._stream):
            slots = torch.from_numpy(slots_of(pages, start, end, self._page_size)).to(self._device)
            parts = [
                self._view(tensor, heads)[slots].contiguous().view(torch.uint8).flatten() for tensor in self._tensors
            ]
            # Waits for the copy: the pages may be given away when this returns.
            return torch.cat(parts).cpu().numpy().data

    @torch.inference_mode()
    def scatter(self, pages: np.ndarray, start: int, end: int, heads: Heads, data: memoryview) -> None:
        check_size(data, (end - start) * self.bytes_per_position(heads))
        with torch.cuda.stream(self._stream):
            slots = torch.from_numpy(slots_of(pages, start, end, self._page_size)).to(self._device)
            flat, offset = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).to(self._device), 0
            for tensor in self._tensors:
                target = self._view(tensor, heads)
                size = len(slots) * entry_bytes(tensor, heads)
                part = flat[offset : offset + size].view(tensor.dtype).view(len(slots), *target.shape[1:])
                target[slots] = part
                offset += size
        if self._stream is not None:
            self._stream.synchronize()

    @staticmethod
    def _view(tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        return tensor if heads is None or tensor.dim() == 2 else tensor[:, heads[0] : heads[1]]


def make_page_copy(kv_store: KVStore, page_size: int, device: torch.device) -> PageCopy:
    """The one for pools on this device."""
    return HostPages(kv_store, page_size) if device.type == "cpu" else DevicePages(kv_store, page_size)
