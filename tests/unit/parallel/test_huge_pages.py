"""Huge pages: what is asked for lies within the tensor, and the kernel's own account of it."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waybill.parallel import huge_pages
from waybill.parallel.huge_pages import HUGE_PAGE_BYTES, prefer_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


class Library:
    """Remembers what the kernel would be asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def madvise(self, address: Any, num_bytes: Any, advice: int) -> None:
        assert advice == mmap.MADV_HUGEPAGE
        self.asked.append((address.value, num_bytes.value))


def asked_for(tensor: torch.Tensor) -> list[tuple[int, int]]:
    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huge_pages, "c_library", lambda: library)
        prefer_huge_pages(tensor)
    return library.asked


def huge_bytes_of(address: int) -> int:
    """AnonHugePages of the mapping that an address is in."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and ":" not in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            is_here = begin <= address < end
        elif is_here and name == "AnonHugePages:":
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs madvise")
@pytest.mark.skipif(not SWITCH.is_file() or "[never]" in SWITCH.read_text(), reason="the kernel has none")
def test_a_weight_is_on_huge_pages_when_it_is_written() -> None:
    """Larger than what the allocator would take of memory that was in use; and a kernel short of huge pages has fewer."""
    weight = torch.empty(32 * HUGE_PAGE_BYTES, dtype=torch.uint8)
    prefer_huge_pages(weight)
    weight.fill_(1)
    assert huge_bytes_of(weight.data_ptr() + HUGE_PAGE_BYTES) >= 16 * HUGE_PAGE_BYTES


@needs_linux
@given(num_bytes=st.integers(2 * HUGE_PAGE_BYTES, 6 * HUGE_PAGE_BYTES), offset=st.integers(0, 5000))
def test_whole_pages_within_the_memory_are_asked_for(num_bytes: int, offset: int) -> None:
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    ((first, size),) = asked_for(memory[offset:])
    assert first % HUGE_PAGE_BYTES == size % HUGE_PAGE_BYTES == 0
    assert memory.data_ptr() <= first < memory.data_ptr() + HUGE_PAGE_BYTES
    assert 0 <= memory.data_ptr() + num_bytes - (first + size) < HUGE_PAGE_BYTES


@needs_linux
def test_small_tensors_and_those_elsewhere_are_left_alone() -> None:
    tensors = [torch.empty(size, dtype=torch.uint8) for size in (0, 1, HUGE_PAGE_BYTES - 1)]
    tensors.append(torch.empty(4 * HUGE_PAGE_BYTES, dtype=torch.uint8, device="meta"))
    assert all(asked_for(tensor) == [] for tensor in tensors)
