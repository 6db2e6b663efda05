"""One leader in lockstep with the others: the step that all have agreed on."""

from __future__ import annotations

import time

from .agreement import NO_AGREEMENT, Agreement, Proposal, StepSync
from .sync_stalls import SyncStalls


class Lockstep:
    """Knows the last `agreement`, whether all leaders rest since, how long this one waited there, and who makes whom
    wait."""

    def __init__(self, sync: StepSync, dp_rank: int) -> None:
        self._sync = sync
        self.stalls = SyncStalls(dp_rank)
        self.agreement = NO_AGREEMENT
        self.is_asleep = False
        self.wait_s = 0.0

    def agree(self, proposal: Proposal) -> Agreement:
        """Waits for the other leaders."""
        began = time.perf_counter()
        agreement = self._sync.agree(proposal)
        self.wait_s = time.perf_counter() - began
        return agreement

    def adopt(self, agreement: Agreement) -> None:
        """It holds until the next one."""
        self.agreement = agreement
        self.is_asleep = agreement.may_sleep
        self.stalls.observe(agreement.proposals)
