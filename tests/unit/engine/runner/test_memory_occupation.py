"""What a rank gives back when a trainer wants its memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from waybill.engine.runner.memory_occupation import MemoryOccupation
from waybill.parallel.cpu_ops.scratch import SCRATCH


def test_weights_and_what_operators_keep_are_given_back() -> None:
    model: Any = nn.Linear(4, 4)
    memory = MemoryOccupation(model, cast(Any, SimpleNamespace(memory=torch.empty(0))))
    (kept,) = SCRATCH.tensors(((1 << 20,), torch.float32))
    assert kept.untyped_storage().nbytes() >= 4 << 20
    memory.release(["weights"])
    assert all(weight.untyped_storage().nbytes() == 0 for weight in model.parameters())
    (anew,) = SCRATCH.tensors(((4,), torch.float32))
    assert anew.untyped_storage().nbytes() < 1 << 20
