"""Giving the memory of weights and KV cache back to the device, and taking it again, for a trainer that shares it.

`release_memory_occupation` and `resume_memory_occupation` (vLLM: sleep and wake_up) come to this. The tensors stay; their
storage shrinks to nothing and grows again. What was in it is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...parallel.cpu_ops.scratch import SCRATCH
from ...parallel.huge_pages import prefer_huge_pages
from ..control.blocked import Blocked, BlockedKind
from ..control.operations import MEMORY_TAGS
from ..kv_cache.kv_store import KVStore
from ..models.causal_lm import CausalLM


def check_tags(tags: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one is none of `MEMORY_TAGS`.
    """
    unknown = [tag for tag in tags if tag not in MEMORY_TAGS]
    if unknown:
        raise ValueError(f"tags: {unknown[0]!r} must be one of {', '.join(MEMORY_TAGS)}")


class MemoryOccupation:
    """The two large owners of one rank's memory."""

    def __init__(self, model: CausalLM, kv_store: KVStore) -> None:
        self._weights = [parameter.data for parameter in model.parameters()]
        self._num_bytes = [weight.untyped_storage().nbytes() for weight in self._weights]
        self._kv_store = kv_store
        self.released: set[str] = set()

    def release(self, tags: Iterable[str]) -> None:
        """Releasing what is released changes nothing."""
        for tag in tags:
            if tag == "kv_cache":
                self._kv_store.release()
            else:
                for weight in self._weights:
                    weight.untyped_storage().resize_(0)
            self.released.add(tag)
        SCRATCH.release()
        if self._kv_store.memory.is_cuda:
            torch.cuda.empty_cache()

    def resume(self, tags: Iterable[str]) -> set[str]:
        """Take memory again, filled with zeros; returns the tags that had been released."""
        resumed = self.released.intersection(tags)
        for tag in resumed:
            if tag == "kv_cache":
                self._kv_store.resume()
                continue
            for weight, num_bytes in zip(self._weights, self._num_bytes, strict=True):
                weight.untyped_storage().resize_(num_bytes)
                prefer_huge_pages(weight)
                weight.zero_()
        self.released -= resumed
        return resumed

    @property
    def blocked(self) -> Blocked | None:
        """Why nobody may generate; None if all is there."""
        if not self.released:
            return None
        what = ", ".join(sorted(self.released))
        return Blocked(BlockedKind.RELEASED, f"memory: {what} is released; resume_memory_occupation first")
