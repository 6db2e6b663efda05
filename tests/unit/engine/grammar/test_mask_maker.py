"""Masks that cannot be made fail their requests, and nothing else."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from waybill.engine.grammar import mask_maker
from waybill.engine.grammar.constraint import Constraint
from waybill.engine.grammar.mask_maker import MaskMaker

VOCAB_SIZE = 70


def waiting(error: Exception | None) -> Constraint:
    """A request whose mask raised an error, or never comes."""
    constraint = Constraint(Future())
    constraint.pending = Future()
    if error is not None:
        constraint.pending.set_exception(error)
    return constraint


@pytest.mark.parametrize("error", [RuntimeError("the library"), None])
def test_a_mask_that_cannot_be_made_fails_its_request_alone(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_maker, "MASK_TIMEOUT_S", 0.01)
    maker = MaskMaker("/nowhere", VOCAB_SIZE, [1])
    bad, good = waiting(error), Constraint(Future(), begins_after=5)
    good.pending = Future()
    good.pending.set_result(None)
    good.num_tokens = 2
    banned, free = maker.masks([bad, good], [3, 2])
    assert banned is not None and not banned.any() and free is None
    assert "its mask cannot be made" in bad.failure and not good.failure
    # What was sampled meanwhile changes nothing.
    maker.advance([(bad, 7)])
    maker.masks([bad], [4])
