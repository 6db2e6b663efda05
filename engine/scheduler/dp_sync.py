"""The leaders' agreement over the dp axis: one small all-gather of integers on the CPU."""

from __future__ import annotations

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import Axis
from .agreement import Agreement, Proposal, from_rows, to_row


class DpSync:
    """A `StepSync` of all leaders of the axis."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def agree(self, proposal: Proposal) -> Agreement:
        own = torch.tensor([to_row(proposal)], dtype=torch.int64)
        return from_rows(all_gather(own, self._axis).tolist())
