"""Small host values on their way to the device.

On CUDA they go through pinned memory: a copy from pageable memory waits for what the device still has to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(
    values: Sequence[int] | Sequence[float] | np.ndarray | torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A tensor of `values`, which the device gets in the order of its stream. On CPU it shares the memory of an array or
    tensor; these keep their dtype."""
    if isinstance(values, torch.Tensor):
        host = values
    else:
        host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def copy_to(target: torch.Tensor, values: np.ndarray) -> None:
    """The same into a tensor that is there, of the same dtype."""
    host = torch.from_numpy(values)
    target.copy_(host if target.device.type == "cpu" else host.pin_memory(), non_blocking=True)
