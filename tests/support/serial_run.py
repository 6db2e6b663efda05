"""What a service must answer: a catalogue of greedy questions, and the tokens and rows of a run that took one at a time.

In float32 every layout must give the serial run's tokens and rows. Where they differ, the first difference must be a
near-tie by the scores of the reference, which is then forced to it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from waybill import Engine
from waybill.engine.routing.transformers_reference import NEAR_TIE, Difference, Reference

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_moe" / "checkpoint"
PROMPT_TOKENS = (1, 160)
NEW_TOKENS = (1, 40)
PREFIX_TOKENS = 40
# Ids that are characters: no special tokens.
VOCAB_SIZE = 256


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    num_new: int


@dataclass(frozen=True)
class SerialAnswer:
    output: list[int]
    # [prompt + output - 1, moe_layers, top_k]
    rows: np.ndarray


def make_catalogue(choose: random.Random, num_prompts: int) -> list[Question]:
    """Half of the prompts share one of four prefixes."""
    prefixes = [choose.choices(range(VOCAB_SIZE), k=PREFIX_TOKENS) for _ in range(4)]
    questions = []
    for index in range(num_prompts):
        prompt = choose.choices(range(VOCAB_SIZE), k=choose.randint(*PROMPT_TOKENS))
        questions.append(
            Question(choose.choice(prefixes) + prompt if index % 2 else prompt, choose.randint(*NEW_TOKENS))
        )
    return questions


def greedy(question: Question) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": question.num_new, "ignore_eos": True}


def answer_serially(catalogue: list[Question], device: str) -> list[SerialAnswer]:
    answers = []
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 8192, "enable_return_routed_experts": True}
    with Engine(str(CHECKPOINT), tp_size=1, device=device, **options) as engine:
        for question in catalogue:
            answer = engine.generate(
                input_ids=question.prompt, sampling_params=greedy(question), return_routed_experts=True
            )
            answers.append(SerialAnswer(answer["output_ids"], answer["meta_info"]["routed_experts"]))
    return answers


class SerialRun:
    """Compares answers with the serial run's, as far as they go: an answer that was aborted is a beginning."""

    def __init__(self, catalogue: list[Question], answers: list[SerialAnswer], checkpoint: Path = CHECKPOINT) -> None:
        self.catalogue = catalogue
        self._answers = answers
        self.checkpoint = checkpoint

    @staticmethod
    def of(catalogue: list[Question], device: str = "auto") -> SerialRun:
        return SerialRun(catalogue, answer_serially(catalogue, device))

    @cached_property
    def reference(self) -> Reference:
        return Reference(str(self.checkpoint))

    def is_same(self, index: int, output: Sequence[int], rows: np.ndarray | None, start: int) -> bool:
        """Whether tokens, and rows from position `start` on where there are any, are those of the serial run."""
        serial = self._answers[index]
        same_rows = rows is None or np.array_equal(rows, serial.rows[start : start + len(rows)])
        return list(output) == serial.output[: len(output)] and same_rows

    def beyond_near_ties(self, index: int, output: Sequence[int], rows: np.ndarray, start: int) -> str | None:
        """For an answer that is not the same: why the reference cannot explain it, or None where it does."""
        question = self.catalogue[index]
        tokens = question.prompt + list(output)
        try:
            logits, _ = self.reference.check_routes(tokens, rows, start)
        except Difference as difference:
            return f"question {index}: {difference}"
        for offset, token in enumerate(output):
            position = len(question.prompt) - 1 + offset
            if position < len(logits):
                gap = float(torch.max(logits[position]) - logits[position][token])
                if gap >= NEAR_TIE:
                    return f"question {index}, output token {offset}: gap {gap:.3e}"
        return None
