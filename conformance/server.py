"""The server that is looked at: asked greedily, with token ids, one request at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from .answer import Answer, MalformedAnswer
from .row_shape import RowShape


class Refused(Exception):
    """The server answered with a status that is not 2xx."""

    def __init__(self, path: str, response: httpx.Response) -> None:
        super().__init__(f"{path}: HTTP {response.status_code}: {response.text[:300]}")
        self.status = response.status_code


class Server:
    """Every prompt is new, made of `seed`, so that it meets the prefix cache only where a rule wants it to."""

    def __init__(
        self,
        http: httpx.Client,
        shape: RowShape,
        *,
        seed: int,
        token_range: tuple[int, int],
        dp_rank: int | None = None,
    ) -> None:
        self.shape = shape
        self._http = http
        self._random = random.Random(seed)
        self._tokens = range(*token_range)
        self._placement = {} if dp_rank is None else {"routed_dp_rank": dp_rank}

    def fresh_prompt(self, num_tokens: int) -> list[int]:
        return self._random.choices(self._tokens, k=num_tokens)

    def warm_prompt(self, num_tokens: int, new: int = 4) -> list[int]:
        """A new prompt that was answered once: from now on every answer to it is computed in the same way, so that rows
        may be compared byte for byte."""
        prompt = self.fresh_prompt(num_tokens)
        self.ask(prompt, new)
        return prompt

    def fresh_rid(self) -> str:
        return f"conformance-{self._random.getrandbits(64):016x}"

    def body(self, prompt: Sequence[int], new: int, start: int | None = 0, **fields: Any) -> dict[str, Any]:
        """A request for `new` tokens, and rows from `start` on. A field that is None is left out."""
        params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True, **fields.pop("sampling_params", {})}
        own = {
            "input_ids": list(prompt),
            "sampling_params": params,
            "return_routed_experts": True,
            "routed_experts_start_len": start,
        }
        return {name: value for name, value in {**own, **self._placement, **fields}.items() if value is not None}

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._http.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def answers(self, prompt: Sequence[int], new: int, start: int | None = 0, **fields: Any) -> list[Answer]:
        """Whole answers, one a choice.

        Raises:
            Refused, MalformedAnswer.
        """
        response = self.post("/generate", self.body(prompt, new, start, **fields))
        if not response.is_success:
            raise Refused("/generate", response)
        content = parsed(response.text)
        bodies = content if isinstance(content, list) else [content]
        return [Answer(checked(body), self.shape.width) for body in bodies]

    def ask(self, prompt: Sequence[int], new: int, start: int | None = 0, **fields: Any) -> Answer:
        """One whole answer.

        Raises:
            Refused, MalformedAnswer.
        """
        answers = self.answers(prompt, new, start, **fields)
        if len(answers) != 1:
            raise MalformedAnswer(f"{len(answers)} answers came to one prompt")
        return answers[0]

    @contextmanager
    def stream(
        self, prompt: Sequence[int], new: int, start: int | None = 0, **fields: Any
    ) -> Iterator[Iterator[Answer]]:
        """The events of a stream, as they come.

        Raises:
            Refused, MalformedAnswer.
        """
        body = self.body(prompt, new, start, stream=True, **fields)
        with self._http.stream("POST", "/generate", json=body) as response:
            if not response.is_success:
                response.read()
                raise Refused("/generate", response)
            yield self._events(response)

    def _events(self, response: httpx.Response) -> Iterator[Answer]:
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                yield Answer(checked(parsed(data)), self.shape.width)
        raise MalformedAnswer("the stream ended without [DONE]")

    def control(self, path: str, **fields: Any) -> None:
        """
        Raises:
            Refused: the server lacks the operation, or does not do it.
        """
        response = self.post(path, fields)
        if not response.is_success:
            raise Refused(path, response)


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise MalformedAnswer(f"the answer is no JSON: {text[:200]}") from None


def checked(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise MalformedAnswer(f"the answer is {str(body)[:200]}, must be an object")
    return body


class JoinedTokens:
    """The tokens of a stream, whose events have all of them so far or those that are new, as the server was started."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def add(self, event: Answer) -> None:
        total, ids = event.count("completion_tokens"), event.output_ids
        self.ids = list(ids) if len(ids) == total else self.ids + ids
