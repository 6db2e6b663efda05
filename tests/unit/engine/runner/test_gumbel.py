"""The noise that tokens are chosen by, and the choice."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.plan import Draw
from waybill.engine.runner.gumbel import choose_tokens_numpy, noise
from waybill.engine.runner.sampler import uniform
from waybill.parallel.best_choice import best_choice
from waybill.parallel.mesh import Axis

MASK = 2**64 - 1


def philox(counter: list[int], seed: int) -> list[int]:
    """Philox-4x64-10 by the paper (Salmon et al. 2011), key (seed, 0)."""
    c, k = list(counter), [seed, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


@given(seed=st.integers(0, MASK), position=st.integers(0, 2**40), token=st.integers(0, 2**20))
def test_noise_is_that_of_the_generator(seed: int, position: int, token: int) -> None:
    """A function of seed, position and token alone, as a kernel on another device must make it."""
    words = philox([token // 8 + 1, position, 1, 0], seed)
    bits = words[token % 8 // 2] >> 32 * (token % 2) & 0xFFFFFFFF
    value = np.float32(min((np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-32), 1 - 2.0**-24))
    found = noise(seed, position, token, 1)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found[0], -np.log(-np.log1p(-value)), rtol=1e-6)


@given(first=st.integers(0, 40), count=st.integers(1, 50), cut=st.integers(0, 50))
def test_parts_have_the_noise_of_the_whole(first: int, count: int, cut: int) -> None:
    whole = noise(3, 7, 0, 100)
    assert (noise(3, 7, first, count) == whole[first : first + count]).all()


def test_noise_is_gumbels_and_independent_of_position_and_seed() -> None:
    drawn = [noise(seed, position, 0, 200_000) for seed, position in ((1, 0), (1, 1), (2, 0))]
    for each in drawn:
        assert abs(each.mean() - 0.5772) < 0.01 and abs(each.var() - np.pi**2 / 6) < 0.03
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.01
    # Of the numbers that filters are drawn by.
    assert len({uniform(1, position) for position in range(50)}) == 50


def test_a_choice_is_the_best_of_the_parts_choices() -> None:
    """Whatever the ranks hold; the lowest of equal tokens."""
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    logits[0, [100, 900]] = 9.0
    draws = [Draw(0.0, 0, 0), Draw(1.0, 4, 2), Draw(1e-5, 4, 3)]
    whole = choose_tokens_numpy(logits, 0, draws)
    assert whole.token_ids[0, 0] == 100 and whole.token_ids[2, 0] == logits[2].argmax()
    for cut in (1, 333, 992):
        parts = [choose_tokens_numpy(logits[:, :cut], 0, draws), choose_tokens_numpy(logits[:, cut:], cut, draws)]
        scores, ids = (torch.cat(each, dim=1) for each in zip(*map(astuple, parts), strict=True))
        assert torch.equal(best_choice(scores, ids, Axis.single()), whole.token_ids[:, 0])


def test_what_is_no_number_is_told_and_what_is_banned_stays_so() -> None:
    bans = [[-torch.inf, 1.0, -torch.inf], [-torch.inf] * 3, [0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0]]
    for temperature in (0.0, 1.0, 1e-5, 1e6):
        choice = choose_tokens_numpy(torch.tensor(bans), 0, [Draw(temperature, seed, 0) for seed in range(4)])
        assert choice.token_ids[0] == 1 and choice.scores[0].isfinite()
        assert choice.scores[1] == -torch.inf and choice.scores[2:].isnan().all()
    assert choose_tokens_numpy(torch.tensor([[3e38, -3e38]]), 0, [Draw(1e-5, 0, 0)]).token_ids[0] == 0
