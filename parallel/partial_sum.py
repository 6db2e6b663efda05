"""A sum over an axis that is not made yet: its collective may take what comes next into the same kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .collectives import all_reduce, reduce_scatter
from .mesh import Axis


@dataclass(frozen=True)
class PartialSum:
    """This rank's term, [T, D]. With `scatter` each rank wants its share of the sum's rows, else all of them."""

    term: torch.Tensor
    axis: Axis
    scatter: bool = False

    @staticmethod
    def of_one(x: torch.Tensor) -> PartialSum:
        """A sum that is complete."""
        return PartialSum(x, Axis.single())

    def plus(self, other: PartialSum) -> PartialSum:
        """The sum of both: made as one where it is over the same ranks."""
        if self.axis.ranks == other.axis.ranks and self.scatter == other.scatter:
            return replace(self, term=self.term + other.term)
        return PartialSum.of_one(self.complete() + other.complete())

    def complete_beside(self, other: PartialSum) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sums, each on its own; in one collective where that is to be had."""
        if self.axis.ranks != other.axis.ranks or self.scatter or other.scatter or self.term.dtype != other.term.dtype:
            return self.complete(), other.complete()
        both = all_reduce(torch.cat((self.term, other.term)), self.axis)
        return both[: len(self.term)], both[len(self.term) :]

    def complete(self) -> torch.Tensor:
        return reduce_scatter(self.term, self.axis) if self.scatter else all_reduce(self.term, self.axis)

    def add_rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
        """In the sum's own kernel: the norm of `sum + residual`, and that sum into `residual`. None where that is not to
        be had."""
        symmetric = self.axis.symmetric
        if symmetric is None or not symmetric.sums(self.term, scatter=self.scatter):
            return None
        # Kernels come with torch's CUDA builds alone.
        from .symmetric_triton import AddNorm  # noqa: PLC0415

        return symmetric.sum_rows(self.term, scatter=self.scatter, then=AddNorm(residual, weight, eps))
