"""Multi-turn rollouts by the engine, with the log-probabilities and the routes of what was sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from waybill import Engine
from waybill.engine.io_struct import RoutedExpertsMeta
from waybill.engine.routing.wire import RoutedExperts, raw_bytes
from waybill.rollout.dialogues import Turn, make_dialogue

END_OF_TURN = "<|end|>"
MAX_ANSWER_TOKENS = 5


class Delta(msgspec.Struct):
    """Rows of routing as they came with one turn."""

    rows: bytes
    meta: RoutedExpertsMeta

    def decode(self) -> RoutedExperts:
        meta = self.meta
        flat = np.frombuffer(self.rows, dtype=meta.dtype)
        return RoutedExperts(flat.reshape(meta.rows, meta.num_layers, meta.top_k), meta)


class Rollout(msgspec.Struct):
    """One episode. `logprobs` are the engine's; `turn_of` says in which turn a token was sampled, -1 if it was not."""

    group: int
    tokens: list[int]
    turn_of: list[int]
    logprobs: list[float]
    deltas: list[Delta]
    # 1 for a right answer, by turn.
    rewards: list[float]
    weight_versions: list[str]

    @property
    def num_sampled(self) -> int:
        return sum(turn >= 0 for turn in self.turn_of)

    @property
    def reward(self) -> float:
        """Share of right turns."""
        return sum(self.rewards) / len(self.rewards)


@dataclass
class Episode:
    """A dialogue under way."""

    group: int
    turns: list[Turn]
    tokens: list[int] = field(default_factory=list)
    turn_of: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def ask(self, ids: Sequence[int]) -> None:
        self.tokens += ids
        self.turn_of += [-1] * len(ids)
        self.logprobs += [0.0] * len(ids)

    @property
    def num_rows(self) -> int:
        """Positions whose routing has come."""
        return self.deltas[-1].meta.start + self.deltas[-1].meta.rows if self.deltas else 0

    def take(self, answer: dict[str, Any]) -> None:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise RuntimeError(f"a turn was not answered: {reason['message']}")
        assert "routed_experts_error" not in meta, meta["routed_experts_error"]
        ids = answer["output_ids"]
        self.tokens += ids
        self.turn_of += [len(self.rewards)] * len(ids)
        self.logprobs += [logprob for logprob, _, _ in meta["output_token_logprobs"]]
        envelope = msgspec.convert(meta["routed_experts_meta"], RoutedExpertsMeta)
        self.deltas.append(Delta(bytes(raw_bytes(meta["routed_experts"])), envelope))
        self.versions.append(meta["weight_version"])
        self.rewards.append(float(answer["text"] == self.turns[len(self.rewards)].answer))

    def finish(self) -> Rollout:
        return Rollout(self.group, self.tokens, self.turn_of, self.logprobs, self.deltas, self.rewards, self.versions)


class RolloutMaker:
    """Holds a batch of dialogues with the engine, all episodes of a turn at once."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: Any) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._options = options
        self._end = tokenizer.token_to_id(END_OF_TURN)
        self._rng = random.Random(options.seed)

    def roll_out(self) -> list[Rollout]:
        options = self._options
        episodes = []
        for group in range(options.dialogues):
            turns = make_dialogue(self._rng, options.turns, held_out=False)
            episodes += [Episode(group, turns) for _ in range(options.samples)]
        for turn in range(options.turns):
            self._hold_turn(episodes, turn)
        return [episode.finish() for episode in episodes]

    def _hold_turn(self, episodes: list[Episode], turn: int) -> None:
        for episode in episodes:
            episode.ask(self._encode(episode, f"<|user|>{episode.turns[turn].user}<|assistant|>"))
        seeds = [self._rng.getrandbits(62) for _ in episodes]
        answers = self._engine.generate(
            input_ids=[episode.tokens for episode in episodes],
            sampling_params=[
                {"temperature": 1.0, "max_new_tokens": MAX_ANSWER_TOKENS, "sampling_seed": seed} for seed in seeds
            ],
            return_logprob=True,
            return_routed_experts=True,
            routed_experts_start_len=[episode.num_rows for episode in episodes],
        )
        for episode, answer in zip(episodes, answers, strict=True):
            episode.take(answer)

    def _encode(self, episode: Episode, text: str) -> list[int]:
        """The next question; an answer that was cut off is ended first."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if not episode.tokens or episode.tokens[-1] == self._end else [self._end, *ids]
