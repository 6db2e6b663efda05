"""One token per row, sampled by the Gumbel-max trick (Gumbel 1954) over the columns of the logits that a rank holds.

A token's noise is a function of the request's seed, the output position and the token's id alone: the same token is chosen
whatever else is in the batch, and by whichever ranks hold the columns. Here as its definition reads; `gumbel_triton.py` has
it as a kernel, with the same signature.

Legend: B requests, C columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..plan import Draw

# Tokens whose noise comes out of one block of the generator: four words of 64 bits, two tokens a word.
TOKENS_A_BLOCK = 8
WORDS_A_BLOCK = 4
# The third word of the generator's counter: the first two are the block and the position. `sampler.uniform` has it 0.
STREAM = 1
MAX_FLOAT32 = torch.finfo(torch.float32).max
LARGEST_BELOW_1 = np.float32(1.0 - 2.0**-24)


@dataclass(frozen=True)
class Choice:
    """Every row's best token among the columns given, [B] int64, and the score that it is the best by, [B] float32: NaN
    where a logit is NaN or infinite, -inf where all are banned. Still on the device."""

    scores: torch.Tensor
    token_ids: torch.Tensor


# (logits [B, C], the first column's token, B draws)
Choose = Callable[[torch.Tensor, int, Sequence[Draw]], Choice]


def noise(seed: int, position: int, first: int, count: int) -> np.ndarray:
    """Gumbel noise [count] float32 of the tokens from `first` on (counter-based: Philox-4x64-10, Salmon et al. 2011)."""
    start, end = first // TOKENS_A_BLOCK, -(-(first + count) // TOKENS_A_BLOCK)
    # numpy counts on before it generates: the block of token 0 has counter 1.
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=[start, position, STREAM, 0])
    bits = generator.random_raw((end - start) * WORDS_A_BLOCK).astype("<u8").view("<u4")
    skipped = first - start * TOKENS_A_BLOCK
    uniform = (bits[skipped : skipped + count].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    # Numbers next to 1 have rounded to it, and would ban their token.
    return -np.log(-np.log1p(-np.minimum(uniform, LARGEST_BELOW_1)))


def choose_torch(logits: torch.Tensor, first: int, draws: Sequence[Draw]) -> Choice:
    """See `Choose`. The lowest of equally good tokens is chosen."""
    scores = logits.float()
    # Also false for NaN.
    is_number = (scores < torch.inf).all(dim=-1)
    random = [index for index, draw in enumerate(draws) if draw.temperature > 0]
    if random:
        scores = scores.clone() if scores is logits else scores
    for index in random:
        draw = draws[index]
        added = torch.from_numpy(noise(draw.seed, draw.position, first, logits.shape[1])).to(logits.device)
        scaled = scores[index] / draw.temperature
        # What is banned stays so.
        scaled = torch.where(scores[index] > -torch.inf, scaled.clamp(-MAX_FLOAT32, MAX_FLOAT32), -torch.inf)
        scores[index] = scaled + added
    best, columns = scores.max(dim=-1)
    return Choice(torch.where(is_number, best, torch.nan), columns + first)


def select_choose(device: torch.device) -> Choose:
    """The fastest for the device."""
    if device.type == "cpu":
        return choose_torch
    # Triton comes with torch's CUDA builds alone.
    from .gumbel_triton import choose_triton  # noqa: PLC0415

    return choose_triton
