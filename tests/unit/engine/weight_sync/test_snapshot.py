"""Checks of weights against a snapshot of their checksums."""

from __future__ import annotations

import msgspec
import pytest

from waybill.engine.control.operations import CheckWeights
from waybill.engine.weight_sync.snapshot import WeightSnapshot

SUMS = {"model.a": "1", "model.b": "2", "lm_head": "3"}


def test_a_comparison_is_with_the_last_snapshot() -> None:
    snapshot = WeightSnapshot()
    with pytest.raises(ValueError, match=r"^action='compare': needs a snapshot"):
        snapshot.check(CheckWeights("compare"), SUMS)
    assert snapshot.check(CheckWeights("snapshot"), SUMS).success
    assert snapshot.check(CheckWeights("compare"), SUMS).success
    outcome = snapshot.check(CheckWeights("compare"), {**SUMS, "model.b": "9"})
    assert not outcome.success and outcome.message == "weights: 1 of 3 tensors have changed: model.b"
    assert snapshot.check(CheckWeights("compare", ["model."]), {**SUMS, "model.b": "9"}).success
    assert snapshot.check(CheckWeights("snapshot", ["model."]), {**SUMS, "model.b": "9"}).success
    assert snapshot.check(CheckWeights("compare"), {**SUMS, "model.b": "9"}).success, "a snapshot is of all tensors"


def test_checksums_are_of_what_is_not_skipped() -> None:
    outcome = WeightSnapshot().check(CheckWeights(skip_tensor_list=["lm_head"]), SUMS)
    assert outcome.success and msgspec.json.decode(outcome.payload) == {"model.a": "1", "model.b": "2"}


def test_few_names_are_shown() -> None:
    snapshot = WeightSnapshot()
    snapshot.check(CheckWeights("snapshot"), dict.fromkeys("abcde", "1"))
    outcome = snapshot.check(CheckWeights("compare"), dict.fromkeys("abcde", "2"))
    assert outcome.message.endswith("5 of 5 tensors have changed: a, b, c ...")
