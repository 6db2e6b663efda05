"""What the leaders of all dp ranks agree on before a step: pure decisions, apart from the collective that carries them.

Each leader brings a `Proposal`; all see all of them, in dp order, and draw the same conclusions from them. The frontend
numbers everything it sends, in one sequence, and every leader gets every number. From the numbers seen follows when a
control operation takes effect (once every leader has it, so at one step on all ranks) and when the ranks may sleep: when
nobody has work and all have seen and applied the same number. Only a higher number ends the sleep, and everybody gets that
one too; so no wake-up is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from ...parallel.dp_attention import rows_per_rank


class ForwardMode(IntEnum):
    """What a leader's own part of a step is; a decode is one token of each request, and another one sampled for it. A part
    with tokens of images is no decode, though its prompts may lack one token each."""

    IDLE = 0
    DECODE = 1
    PREFILL = 2
    IMAGES = 3


class Cause(IntEnum):
    """Why a leader came late."""

    OTHER = 0
    RECEIVE = 1
    PREFILL = 2
    DECODE = 3
    RETRACTION = 4
    RING_FULL = 5
    GARBAGE_COLLECTION = 6
    CONTROL = 7
    TRANSFER = 8


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """One leader's state before a step, all integers. The last four say how the time since the last step was spent."""

    num_tokens: int = 0
    mode: int = ForwardMode.IDLE
    # Requests that run or wait, those that hold pages, and whether there is anything to do: requests that may run, steps to
    # commit, records to send.
    num_reqs: int = 0
    num_running: int = 0
    is_pending: int = 0
    # The highest number of a message that it has received, and of one that it has applied.
    seen: int = 0
    applied: int = 0
    # See `sync_stalls`: the largest delay of this leader since the last agreement, and its waits there and in the forward.
    cause: int = Cause.OTHER
    cause_ns: int = 0
    agree_wait_ns: int = 0
    forward_wait_ns: int = 0


class Agreement(msgspec.Struct, frozen=True):
    """All proposals of a step, in dp order, and what follows from them."""

    proposals: tuple[Proposal, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(proposal.num_tokens for proposal in self.proposals)

    @property
    def num_seen(self) -> int:
        """Every leader has all messages up to this number: what they ask for may take effect."""
        return min(proposal.seen for proposal in self.proposals)

    @property
    def num_applied(self) -> int:
        """Every leader has applied all messages up to this number."""
        return min(proposal.applied for proposal in self.proposals)

    @property
    def num_reqs(self) -> int:
        """Requests that run or wait anywhere."""
        return sum(proposal.num_reqs for proposal in self.proposals)

    @property
    def num_running(self) -> int:
        """Requests that hold pages anywhere."""
        return sum(proposal.num_running for proposal in self.proposals)

    @property
    def may_sleep(self) -> bool:
        at_rest = not any(proposal.is_pending for proposal in self.proposals)
        return at_rest and self.num_applied == max(proposal.seen for proposal in self.proposals)

    @property
    def is_decode(self) -> bool:
        """Whether all leaders decode or have nothing to do."""
        return all(proposal.mode <= ForwardMode.DECODE for proposal in self.proposals)

    @property
    def has_images(self) -> bool:
        """Whether any leader has tokens of images."""
        return any(proposal.mode == ForwardMode.IMAGES for proposal in self.proposals)

    def rows_per_rank(self, tp_size: int) -> int:
        """Rows of every rank's layers that this step needs."""
        return rows_per_rank([proposal.num_tokens for proposal in self.proposals], tp_size)

    def allows(self, number: int, *, asks_for_idle: bool) -> bool:
        """Whether the control operation of this number may take effect now. One that depends on whether anybody has
        requests needs an agreement made after everything before it was applied."""
        return number <= self.num_seen and (not asks_for_idle or self.num_applied >= number - 1)


NO_AGREEMENT = Agreement((Proposal(),))


class StepSync(Protocol):
    """Where the leaders meet, once a step."""

    def agree(self, proposal: Proposal) -> Agreement:
        """Waits for all of them."""
        ...


class SingleRankSync:
    """One leader agrees with itself."""

    def agree(self, proposal: Proposal) -> Agreement:
        return Agreement((proposal,))


def to_row(proposal: Proposal) -> list[int]:
    return list(msgspec.structs.astuple(proposal))


def from_rows(rows: Sequence[Sequence[int]]) -> Agreement:
    return Agreement(tuple(Proposal(*row) for row in rows))
