"""One token per row, sampled by the Gumbel-max trick (Gumbel 1954) over the columns of the logits that a rank holds.

A token's noise is a function of the request's seed, the output position and the token's id alone: the same token is chosen
whatever else is in the batch, and by whichever ranks hold the columns. Here as its definition reads; `gumbel_triton.py` has
it as a kernel, with the same signature.

Legend: B requests, C columns of this rank, M parts of them.
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
MAX_FLOAT32 = np.finfo(np.float32).max
LARGEST_BELOW_1 = np.float32(1.0 - 2.0**-24)


@dataclass(frozen=True)
class TokenChoice:
    """Every row's best tokens in M parts of the columns given, [B, M] int64, and the scores that they are the best by,
    [B, M] float32: NaN where a logit is NaN or infinite, -inf where all are banned. Still on the device."""

    scores: torch.Tensor
    token_ids: torch.Tensor


# (logits [B, C], the first column's token, B draws)
ChooseTokens = Callable[[torch.Tensor, int, Sequence[Draw]], TokenChoice]


def noise(seed: int, position: int, first: int, count: int) -> np.ndarray:
    """Gumbel noise [count] float32 of the tokens from `first` on (counter-based: Philox-4x64-10, Salmon et al. 2011)."""
    start, end = first // TOKENS_A_BLOCK, -(-(first + count) // TOKENS_A_BLOCK)
    # numpy counts on before it generates: the block of token 0 has counter 1.
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=[start, position, STREAM, 0])
    bits = generator.random_raw((end - start) * WORDS_A_BLOCK).astype("<u8").view("<u4")
    skipped = first - start * TOKENS_A_BLOCK
    value = bits[skipped : skipped + count].astype(np.float32)
    value += np.float32(0.5)
    value *= np.float32(2.0**-32)
    # Numbers next to 1 have rounded to it, and would ban their token.
    np.negative(np.minimum(value, LARGEST_BELOW_1, out=value), out=value)
    np.negative(np.log1p(value, out=value), out=value)
    return np.negative(np.log(value, out=value), out=value)


def choose_tokens_numpy(logits: torch.Tensor, first: int, draws: Sequence[Draw]) -> TokenChoice:
    """See `ChooseTokens`, of logits on the CPU, as one part. The lowest of equally good tokens is chosen."""
    scores, token_ids = np.empty(len(draws), np.float32), np.empty(len(draws), np.int64)
    for index, (row, draw) in enumerate(zip(logits.float().numpy(), draws, strict=True)):
        considered = row
        if draw.temperature > 0:
            with np.errstate(over="ignore"):
                considered = row / np.float32(draw.temperature)
            np.clip(considered, -MAX_FLOAT32, MAX_FLOAT32, out=considered)
            # What is banned stays so.
            np.copyto(considered, -np.inf, where=row == -np.inf)
            considered += noise(draw.seed, draw.position, first, len(row))
        token_ids[index] = first + considered.argmax()
        # Also false where a logit is NaN.
        scores[index] = considered.max() if (row < np.inf).all() else np.nan
    return TokenChoice(torch.from_numpy(scores)[:, None], torch.from_numpy(token_ids)[:, None])


def select_choose_tokens(device: torch.device) -> ChooseTokens:
    """The fastest for the device."""
    if device.type == "cpu":
        return choose_tokens_numpy
    # Triton comes with torch's CUDA builds alone.
    from .gumbel_triton import choose_tokens_triton  # noqa: PLC0415

    return choose_tokens_triton
