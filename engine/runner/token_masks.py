"""What ties sampling to grammars on a leader: sampled tokens move the grammars of their requests as soon as the host has
them, and the masks are there when the next step's logits are.

A step is launched before the one before it is committed. Its forward is on its way to the device by then; the host waits
for the tokens of the step before, and has the masks made while the forward runs. So no token is chosen by a mask that has
not seen all tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..grammar.constraint import Mask
from ..grammar.mask_maker import MaskMaker
from .launched_step import HostCopy
from .sampler import SamplingRow


class TokenMasks:
    """Of the requests of one leader's group."""

    def __init__(self, maker: MaskMaker | None) -> None:
        self._maker = maker
        # Sampled tokens that no grammar has seen.
        self._noted: list[HostCopy] = []

    def take(self, rows: Sequence[SamplingRow]) -> list[Mask | None] | None:
        """Masks for the next token of each row, None where anything goes; None in all where there are no grammars."""
        constrained = [(i, row) for i, row in enumerate(rows) if row.constraint is not None]
        if not constrained:
            return None
        assert self._maker is not None
        self.settle()
        made = self._maker.masks(
            [row.constraint for _, row in constrained if row.constraint is not None],
            [row.position for _, row in constrained],
        )
        masks: list[Mask | None] = [None] * len(rows)
        for (i, _), mask in zip(constrained, made, strict=True):
            masks[i] = mask
        return masks

    def note(self, copy: HostCopy) -> None:
        """Tokens were sampled; `copy` has them when it is done."""
        if copy.constraints:
            self._noted.append(copy)
            if copy.is_done:
                self.settle()

    def settle(self) -> None:
        """Wait for what was noted, and have the grammars moved."""
        noted, self._noted = self._noted, []
        for copy in noted:
            copy.wait()
            assert copy.outcomes is not None and self._maker is not None
            token_ids = copy.outcomes.tolist()
            self._maker.advance([(constraint, token_ids[i]) for i, constraint in copy.constraints.items()])
