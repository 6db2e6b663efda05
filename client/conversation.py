"""Conversations: token ids that only grow, and the routes of all that were inputs: all but the last of an answer.

Legend: M MoE layers, K experts per token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine.routing import wire
from .answer import Generation, RoutesError


class History:
    """What a conversation holds after every turn: `tokens`, and `routes` [len(tokens) - 1, M, K] of all but the last; of
    all, after a turn that only fed its ids (`max_new_tokens` 0). With `return_router_weights` also their combine `weights`,
    else None.

    Tokens only ever grow: an answer's ids are appended as they came, never tokenised again.
    """

    def __init__(self, generate: Callable[..., Any], given: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.routes: np.ndarray = np.empty((0, 0, 0), dtype=np.uint8)
        self.weights: np.ndarray | None = None
        self._layout: tuple[Any, ...] | None = None
        self._generate = generate
        self._given = given

    def next_request(self, new_token_ids: Sequence[int]) -> dict[str, Any]:
        """Arguments of `generate` for the next turn. The row of the last token appears when this turn feeds it."""
        # Refused here if given, as an argument that is there twice.
        return dict(
            input_ids=self.tokens + [operator.index(token) for token in new_token_ids],
            start_len=len(self.routes),
            routed_experts=True,
            **self._given,
        )

    def commit(self, prompt: list[int], generation: Generation) -> Generation:
        """Take in a turn, or raise and stay as it was.

        Raises:
            RoutesError: the turn was aborted, is not a continuation, or its rows do not fit those there are.
        """
        if generation.finish_reason.get("type") == "abort":
            raise RoutesError(f"the turn was aborted: {generation.finish_reason.get('message')}")
        if prompt[: len(self.tokens)] != self.tokens:
            raise RoutesError("the conversation went on while this turn was under way: take turns one at a time")
        routes, meta = generation.routes, generation.meta
        assert routes is not None and meta is not None, "a turn asks for routes"
        layout = (meta.layer_ids, meta.top_k, meta.dtype)
        if self._layout not in (None, layout):
            raise RoutesError(f"routed experts: layers, top_k and dtype were {self._layout}, now they are {layout}")
        is_first = self._layout is None
        stitched = _stitched(None if is_first else self.routes, meta.start, routes)
        weights = None
        if generation.weights is not None:
            weights = _stitched(None if is_first else self.weights, meta.start, generation.weights)
        tokens = prompt + generation.output_ids
        # The last token of an answer was sampled; it is an input when the next turn feeds it.
        num_inputs = len(tokens) - bool(generation.output_ids)
        if len(stitched) != num_inputs:
            raise RoutesError(f"routed experts: {len(stitched)} rows for {len(tokens)} tokens, must be {num_inputs}")
        self.tokens, self.routes, self.weights, self._layout = tokens, stitched, weights, layout
        return generation


def _stitched(existing: np.ndarray | None, start: int, new: np.ndarray) -> np.ndarray:
    """
    Raises:
        RoutesError: they do not fit each other.
    """
    try:
        return wire.stitch(np.empty((0, *new.shape[1:]), new.dtype) if existing is None else existing, start, new)
    except ValueError as error:
        raise RoutesError(str(error)) from None


class Conversation(History):
    """A conversation that keeps its tokens and routes together."""

    def turn(self, new_token_ids: Sequence[int]) -> Generation:
        """Append the ids, generate, append the answer; the generation has the rows that are new.

        Raises:
            RoutesError, ServerError: as `generate`, or the turn was aborted; the conversation is as before the turn.
        """
        request = self.next_request(new_token_ids)
        return self.commit(request["input_ids"], self._generate(**request))


class AsyncConversation(History):
    """As `Conversation`, with `await`; its turns are taken one at a time."""

    async def turn(self, new_token_ids: Sequence[int]) -> Generation:
        """As `Conversation.turn`."""
        request = self.next_request(new_token_ids)
        return self.commit(request["input_ids"], await self._generate(**request))
