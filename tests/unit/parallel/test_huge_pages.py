"""Huge pages: what is asked for lies within the tensor, and the kernel's own account of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from waybill.parallel.huge_pages import HUGE_PAGE_BYTES, prefer_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def test_small_tensors_and_those_without_memory_are_left_alone() -> None:
    for size in (0, 1, HUGE_PAGE_BYTES - 1):
        weight = torch.ones(size, dtype=torch.uint8)
        prefer_huge_pages(weight)
        assert bool((weight == 1).all())
    prefer_huge_pages(torch.empty(4 * HUGE_PAGE_BYTES, dtype=torch.uint8, device="meta"))
