"""Rollouts of the engine, replayed by a trainer: the same weights give the same log-probabilities on the same experts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from waybill import Engine
from waybill.engine.routing.replay import RoutedExpertsBatch, replay_routing, routes_from_answer
from waybill.engine.routing.wire import RoutedExperts

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny_moe" / "checkpoint"
DOCUMENT = ROOT / "docs" / "rl.md"
TOLERANCE = 1e-4
TURNS = ("start with {}", "add 21", "add 28")
NUM_CONVERSATIONS = 24


class Rollout:
    """A conversation: tokens, the deltas of its routes, and the log-probability of every token that was sampled."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.routes: list[RoutedExperts] = []
        self.logprobs: dict[int, float] = {}

    def take(self, prompt: list[int], answer: dict[str, Any]) -> None:
        info = answer["meta_info"]
        for offset, (logprob, _, _) in enumerate(info["output_token_logprobs"]):
            self.logprobs[len(prompt) + offset] = logprob
        self.tokens = prompt + answer["output_ids"]
        delta = routes_from_answer(info)
        assert delta is not None
        self.routes.append(delta)

    def rows(self) -> np.ndarray:
        return np.concatenate([delta.rows for delta in self.routes])


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """Sampled multi-turn conversations in float32 on two ranks."""
    options = {"dtype": "float32", "enable_return_routed_experts": True, "kv_cache_tokens": 8192}
    with Engine(str(CHECKPOINT), tp_size=2, **options) as engine:
        conversations = [Rollout() for _ in range(NUM_CONVERSATIONS)]
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
        for turn in TURNS:
            prompts = [
                one.tokens + tokenizer.encode(f"<|user|>{turn.format(10 + number)}<|assistant|>")
                for number, one in enumerate(conversations)
            ]
            answers = engine.generate(
                input_ids=prompts,
                sampling_params={"temperature": 1.0, "max_new_tokens": 12, "sampling_seed": 7},
                return_logprob=True,
                return_routed_experts=True,
                routed_experts_start_len=[max(0, len(one.tokens) - 1) for one in conversations],
            )
            for one, prompt, answer in zip(conversations, prompts, answers, strict=True):
                one.take(prompt, answer)
    return conversations


def test_the_documentation_s_program_runs() -> None:
    """docs/rl.md, whose assertions compare log-probabilities with the engine's."""
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE))
    assert program.count("assert ") == 2
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "missing=0, last=2" in done.stdout


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).train()


def forward(model: Any, rollouts: list[Rollout], side: str) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """Log-probabilities [B, S - 1] of the tokens after the first, the ids [B, S, K] that each layer's experts received, and
    the mask [B, S]."""
    length = max(len(one.tokens) for one in rollouts)
    ids, mask = (
        torch.zeros(len(rollouts), length, dtype=torch.long),
        torch.zeros(len(rollouts), length, dtype=torch.long),
    )
    for row, one in enumerate(rollouts):
        begin = length - len(one.tokens) if side == "left" else 0
        ids[row, begin : begin + len(one.tokens)] = torch.tensor(one.tokens)
        mask[row, begin : begin + len(one.tokens)] = 1
    batch = RoutedExpertsBatch.from_padded([one.routes for one in rollouts], mask)
    received: list[torch.Tensor] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args: received.append(args[1].reshape(*ids.shape, -1).clone())
        )
        for layer in model.model.layers
        if hasattr(layer.mlp, "experts")
    ]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with replay_routing(model) as replay, torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position_ids, routed_experts=batch).logits
    for handle in handles:
        handle.remove()
    assert replay.counts.missing == 0
    assert replay.counts.replayed == sum(len(one.tokens) - 1 for one in rollouts)
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return logprobs, received, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_replayed_log_probabilities_equal_the_engine_s(model: Any, rollouts: list[Rollout], side: str) -> None:
    logprobs, received, mask = forward(model, rollouts, side)
    assert len(received) == rollouts[0].rows().shape[1] > 0
    num_tokens = 0
    for row, one in enumerate(rollouts):
        positions = mask[row].nonzero().flatten()
        for column, ids in enumerate(received):
            assert np.array_equal(ids[row, positions[:-1]].numpy(), one.rows()[:, column])
        for position, logprob in one.logprobs.items():
            found = float(logprobs[row, positions[position] - 1])
            assert abs(found - logprob) <= TOLERANCE, (row, position, found, logprob)
            num_tokens += 1
    assert num_tokens >= 8 * NUM_CONVERSATIONS


def test_other_routes_would_be_noticed(model: Any, rollouts: list[Rollout]) -> None:
    """The comparison can fail: with rows shifted by one position, log-probabilities differ."""
    shifted = []
    for one in rollouts:
        other = Rollout()
        other.tokens = one.tokens
        first, *rest = one.routes
        other.routes = [RoutedExperts(np.roll(first.rows, 1, axis=0), first.meta), *rest]
        shifted.append(other)
    right, _, mask = forward(model, rollouts, "right")
    wrong, _, _ = forward(model, shifted, "right")
    assert float((right - wrong)[mask[:, 1:].bool()].abs().max()) > 100 * TOLERANCE
