"""How Triton kernels are launched: at little cost for the host, and before the kernels ahead of them are done.

On Hopper and later a kernel may be scheduled before its predecessor is done, if it waits for it on the device
(programmatic dependent launch). Every kernel here first lets its successor be scheduled, may then read what no kernel
writes - weights - and calls `wait_for_previous` before it touches anything else. That wait ends when the kernel ahead is
done, and that one has waited for its own, so the order of effects is that of the stream.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

HOPPER = (9, 0)
MAX_INT32 = 2**31 - 1


class Kernel:
    """A decorator over `triton.jit`: `kernel[grid](*args, **constants)` as Triton has it, at a fraction of the cost.

    Triton binds, describes and looks up every argument at every launch. Here the compiled kernel is found by what it was
    specialised for: dtypes, alignment, and whether an integer is 1 or a multiple of 16. Arguments come by position,
    constants and options by name.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = (args[0].device, *map(_specialised_for, args), *constants.items())
        compiled = self._compiled.get(key)
        if compiled is None:
            # The interpreter compiles nothing.
            self._compiled[key] = self._function[grid](*args, **constants)
            return
        # It ignores the values of constants, but not their places.
        compiled[(*grid, 1, 1)](*args, *(None,) * (len(self._function.params) - len(args)))


def _specialised_for(arg: Any) -> Any:
    """What of an argument is compiled into a kernel."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() & 15 == 0
    if isinstance(arg, int):
        return arg == 1, arg & 15 == 0, arg > MAX_INT32
    return None


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


@triton.jit
def fetch(where, num_bytes, PDL: tl.constexpr):
    """Has the second-level cache read so many bytes from each of some places on, multiples of 16: of weights, that need not
    wait for the kernel ahead."""
    if PDL:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [where.to(tl.int64), tl.zeros(where.shape, tl.int32) + num_bytes], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


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
