"""The judge itself: what is kept of a forward does not change a judgement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from waybill.engine.routing.transformers_reference import Difference, Reference, grouped_choice_gap

CHECKPOINT = Path(__file__).parents[4] / "examples" / "tiny_moe" / "checkpoint"
SEQUENCES = [list(b"add 21"), list(b"start with 12"), list(b"x")]


class CountingReference(Reference):
    """Counts forwards, and tells the routes that it finds."""

    def __init__(self, num_kept: int) -> None:
        super().__init__(str(CHECKPOINT), num_kept=num_kept)
        self.num_forwards = 0
        self._model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_forwards += 1

    def routes(self, tokens: list[int]) -> np.ndarray:
        self._forward(tokens)
        return torch.stack([tap.ids for tap in self._taps], dim=1).numpy()


def test_a_forward_is_kept_as_long_as_there_is_room() -> None:
    plain, keeping = CountingReference(0), CountingReference(2)
    routes = [plain.routes(tokens) for tokens in SEQUENCES]
    before = plain.num_forwards
    for _ in range(2):
        for tokens, own in zip(SEQUENCES[:2], routes[:2], strict=True):
            logits, agreement = keeping.check_routes(tokens, own)
            expected, _ = plain.check_routes(tokens, own)
            assert torch.equal(logits, expected)
            assert (agreement.num_rows, agreement.forced_routes) == (len(tokens), 0)
    assert (keeping.num_forwards, plain.num_forwards - before) == (2, 4)
    keeping.check_routes(SEQUENCES[2], routes[2])
    keeping.check_routes(SEQUENCES[0], routes[0])
    assert keeping.num_forwards == 4, "the oldest had to go"


def test_the_gap_of_a_choice_in_groups() -> None:
    """Four groups of two, of which two compete: by the sums 1.5, 1.4, 1.3, 0.2."""
    scores = torch.tensor([0.9, 0.6, 0.8, 0.6, 1.2, 0.1, 0.1, 0.1])

    def gap(*ids: int) -> float:
        return grouped_choice_gap(scores, torch.tensor(ids), 4, 2)

    assert gap(0, 2, 1) == 0
    assert gap(2, 0, 1) == pytest.approx(0.1), "out of order"
    assert gap(0, 1, 3) == pytest.approx(0.2), "expert 2 is better"
    assert gap(4, 0, 1) == pytest.approx(0.1), "the third group stands in for the second"
    assert gap(4, 2, 3) == pytest.approx(0.2), "the third for the first"
    assert gap(0, 2, 4) == float("inf"), "three groups"


def test_a_wrong_route_is_seen_in_what_was_kept_too() -> None:
    keeping = CountingReference(2)
    routes = keeping.routes(SEQUENCES[0])
    wrong = routes.copy()
    wrong[3, 2] = wrong[3, 2][::-1]
    for _ in range(2):
        with pytest.raises(Difference, match="position 3, MoE layer 2"):
            keeping.check_routes(SEQUENCES[0], wrong)
        keeping.check_routes(SEQUENCES[0], routes)
    assert keeping.num_forwards == 1


def test_weights_that_are_wrong_or_of_another_expert_are_seen() -> None:
    keeping, tokens = CountingReference(2), SEQUENCES[0]
    routes = keeping.routes(tokens)
    weights = torch.stack([tap.weights for tap in keeping._taps], dim=1).numpy()
    assert np.abs(weights.sum(axis=-1) - 1).max() < 1e-6, "the model renormalises"
    keeping.routes(SEQUENCES[1])
    for start in (0, 2):
        keeping.check_routes(tokens, routes[start:], start)
        keeping.check_weights(weights[start:], start)
        for spoilt in (
            np.flip(weights[start:], axis=-1).copy(),
            torch.from_numpy(weights[start:]).bfloat16().float().numpy(),
            np.full_like(weights[start:], np.nan),
        ):
            with pytest.raises(Difference, match="MoE layer 0: weights"):
                keeping.check_weights(spoilt, start)
    with pytest.raises(Difference, match="choices"):
        keeping.check_weights(weights[:-1])
