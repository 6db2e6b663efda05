"""Rows of one prompt from two forwards, compared under the near-tie rule."""

from __future__ import annotations

import numpy as np

from waybill.engine.routing.transformers_reference import Reference


def check_same_rows(
    reference: Reference, tokens: list[int], first: np.ndarray, second: np.ndarray, start: int = 0
) -> None:
    """Rows [R, M, K] of `tokens[start : start + R]` are equal, as long as both go; or sums of other lengths rounded
    otherwise, in another batch, and both are what the reference finds, near-ties apart. Needs an engine in float32.

    Raises:
        Difference: they differ by more.
    """
    num_rows = min(len(first), len(second))
    if first[:num_rows].tobytes() != second[:num_rows].tobytes():
        reference.check_routes(tokens, first, start)
        reference.check_routes(tokens, second, start)
