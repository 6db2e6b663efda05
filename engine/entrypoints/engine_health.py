"""Whether the engine makes steps: what `/health_generate` asks.

A busy engine proves it with a step, and nothing is added to what waits; steps are those of all dp ranks together. An idle
one makes a token on every dp rank. A paused one, or one that is busy with a control operation, which has a bound of its
own, makes no steps on purpose: it is well when its leaders answer.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

from ..frontend.admission import OverloadedError
from ..frontend.generate_request import parse_generate_request
from ..frontend.generation_gate import UnavailableError
from ..frontend.tokenizer_manager import TokenizerManager

POLL_S = 0.05
# How long an idle engine's token is waited for before it is looked whether others came first and steps are made.
TOKEN_S = 1.0


class EngineHealth:
    """Lives on one event loop. No check takes longer than `timeout_s`, and callers at the same time share one."""

    def __init__(self, manager: TokenizerManager, timeout_s: float) -> None:
        self._manager = manager
        self._timeout_s = timeout_s
        self._checking: asyncio.Task[str | None] | None = None
        # Of the last check: when it was, what had come from the engine by then, and the steps of the dp ranks.
        self._checked_at = -timeout_s
        self._num_outputs = 0
        self._steps: list[int] | None = None

    async def problem(self) -> str | None:
        """Why the engine is not well; None if it is.

        Raises:
            EngineDeadError: it is gone.
        """
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(), name="health check")
        return await asyncio.shield(self._checking)

    async def _check(self) -> str | None:
        if self._manager.refusal is not None:
            return self._manager.refusal
        now = time.monotonic()
        is_recent, self._checked_at = now - self._checked_at <= self._timeout_s, now
        num_outputs, self._num_outputs = self._num_outputs, self._manager.outputs.num_outputs
        if is_recent and self._num_outputs > num_outputs:
            # Tokens since the last check: all ranks have made the step that they come from.
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._proof(self._steps if is_recent else None)
        except TimeoutError:
            # A rank that takes weights answers when it has them.
            return None if self._manager.controls.is_under_way else f"no step within {self._timeout_s:g} s"

    async def _proof(self, before: list[int] | None) -> str | None:
        """Returns when it is known how the engine is: with the reason if it is not well. `before` are earlier steps."""
        tokens: asyncio.Task[str | None] | None = None
        try:
            while True:
                states = [reply.state for reply in await self._manager.queries.get_leader_states()]
                if self._manager.controls.is_under_way or any(
                    state["is_paused"] or state["is_blocked"] for state in states
                ):
                    return None
                steps = self._steps = [int(state["num_steps"]) for state in states]
                is_idle = not any(state["num_running"] or state["num_waiting"] for state in states)
                has_stepped = before is not None and all(new > old for new, old in zip(steps, before, strict=True))
                if has_stepped and not is_idle:
                    return None
                before = before or steps
                if is_idle and tokens is None:
                    tokens = asyncio.create_task(self._make_tokens(), name="health check: tokens")
                if tokens is None:
                    await asyncio.sleep(POLL_S)
                elif (await asyncio.wait((tokens,), timeout=TOKEN_S))[0]:
                    if (verdict := tokens.result()) is not None:
                        return verdict or None
                    tokens = None
                    await asyncio.sleep(POLL_S)
        finally:
            if tokens is not None:
                tokens.cancel()
                await asyncio.gather(tokens, return_exceptions=True)

    async def _make_tokens(self) -> str | None:
        """One on every dp rank. "": they came. None: somebody ended or refused them, so it is not known how the engine is.
        Else what the engine says why there is none."""
        results = await asyncio.gather(
            *map(self._make_token, range(self._manager.config.dp_size)), return_exceptions=True
        )
        verdict: str | None = ""
        for result in results:
            if isinstance(result, (OverloadedError, UnavailableError)):
                verdict = None
            elif isinstance(result, BaseException):
                raise result
            elif result["type"] == "abort":
                if "status_code" in result:
                    return str(result["message"])
                verdict = None
        return verdict

    async def _make_token(self, dp_rank: int) -> dict[str, Any]:
        """Its finish reason."""
        request = parse_generate_request(
            {
                "input_ids": [0],
                "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
                "routed_dp_rank": dp_rank,
            }
        )
        async with aclosing(self._manager.generate(request, form="json")) as answers:  # type: ignore[type-var]
            answer = await anext(answers)
        assert isinstance(answer, dict)
        reason: dict[str, Any] = answer["meta_info"]["finish_reason"]
        return reason
