"""How Triton kernels are launched: grid arithmetic, and programs that start while the kernels before them run.

On Hopper and later a kernel may be scheduled before its predecessor is done, if it waits for it on the device
(programmatic dependent launch). Every kernel here first lets its successor be scheduled, may then read what no kernel
writes - weights - and calls `wait_for_previous` before it touches anything else. That wait ends when the kernel ahead is
done, and that one has waited for its own, so the order of effects is that of the stream.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

HOPPER = (9, 0)


@triton.jit
def start_next(PDL: tl.constexpr):
    """From here on the next kernel's programs may be scheduled, where there is room."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Returns when everything that was launched before is done."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel's launch; the kernel has a constant `PDL`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def ceil_div(value: int, by: int) -> int:
    """Triton's own twin is a traced function, whose calls cost as much as a launch."""
    return -(-value // by)


def power_of_2_from(value: int) -> int:
    """The smallest power of two that is not less than `value`."""
    return 1 << (value - 1).bit_length()
