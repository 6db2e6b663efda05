"""Where the tensors of an update come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import SafetensorError

from ...parallel.weights import TensorSource
from ..models.checkpoint import Checkpoint
from .manifest import TensorSpec
from .update_group import UpdateGroup

# A bucket up to this size waits in memory until every rank has it whole.
MAX_STAGED_BYTES = 2 << 30
TRANSFER_ERRORS = (RuntimeError, OSError, SafetensorError)

Tensors = Iterator[tuple[str, TensorSource]]
# Tells the other ranks why this one lacks the bucket (None: it has it); why the bucket must not be used, None if it may.
AllHaveIt = Callable[[str | None], str | None]


class Transfer(Protocol):
    def tensors(self, all_have_it: AllHaveIt) -> Tensors:
        """Each tensor with its name; a source is valid until the next one is asked for.

        Raises:
            RuntimeError, OSError, SafetensorError: it broke off, here or on another rank.
        """
        ...


@dataclass(frozen=True)
class FileTransfer:
    """From safetensors files that every rank reads by itself."""

    checkpoint: Checkpoint

    def tensors(self, all_have_it: AllHaveIt) -> Tensors:
        return self.checkpoint.tensors()


@dataclass(frozen=True)
class BroadcastTransfer:
    """From the trainer: one broadcast a tensor, or (`in_one`) all in one."""

    group: UpdateGroup
    specs: Sequence[TensorSpec]
    in_one: bool

    def tensors(self, all_have_it: AllHaveIt) -> Tensors:
        if not self.in_one and sum(spec.num_bytes for spec in self.specs) > MAX_STAGED_BYTES:
            for spec in self.specs:
                yield spec.name, self.group.receive(spec)
            return
        staged: list[torch.Tensor] = []
        error = None
        try:
            staged = self.group.receive_bucket(self.specs) if self.in_one else [*map(self.group.receive, self.specs)]
        except TRANSFER_ERRORS as problem:
            error = str(problem)
        refusal = all_have_it(error)
        if refusal is not None:
            raise RuntimeError(refusal)
        for spec, tensor in zip(self.specs, staged, strict=True):
            yield spec.name, tensor
