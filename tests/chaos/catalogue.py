"""What the campaign's clients ask: short questions for the witness, long ones to be in the middle of."""

from __future__ import annotations

import random

from support.serial_run import VOCAB_SIZE, Question, make_catalogue

CATALOGUE_SEED = 12
NUM_SHORT = 16
SHORT = range(NUM_SHORT)
# Some seconds of decoding, and of prefill in chunks.
LONG_DECODES = range(NUM_SHORT, NUM_SHORT + 3)
LONG_PREFILLS = range(NUM_SHORT + 3, NUM_SHORT + 5)


def make_questions(num_decoded: int = 200, num_prefilled: int = 2000) -> list[Question]:
    """Long ones have so many tokens to decode, or to prefill: enough to be in the middle of, and few enough that an answer
    which goes on after a fault comes within the bound on a busy machine, too."""
    choose = random.Random(CATALOGUE_SEED)
    questions = make_catalogue(choose, NUM_SHORT)
    questions += [Question(choose.choices(range(VOCAB_SIZE), k=20), num_decoded) for _ in LONG_DECODES]
    questions += [Question(choose.choices(range(VOCAB_SIZE), k=num_prefilled), 10) for _ in LONG_PREFILLS]
    return questions
