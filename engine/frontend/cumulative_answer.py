"""Streams of the native dialect: every item has the whole answer so far, where an item of the frontend has what is new."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from .answer_logprobs import LOGPROB_FIELDS


class CumulativeAnswer:
    """Joins the chunks of one sample's stream: text, ids and log-probabilities. Everything else of a chunk is the state by
    then, rows too: those of a stream are what is new in either form."""

    def __init__(self) -> None:
        self._text = ""
        self._output_ids: list[int] = []
        self._logprobs: dict[str, list[Any]] = {}
        self._last: dict[str, Any] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        self._last = chunk
        self._text += chunk["text"]
        self._output_ids += chunk["output_ids"]
        meta = chunk["meta_info"]
        for name in LOGPROB_FIELDS:
            if name in meta:
                self._logprobs.setdefault(name, []).extend(meta[name])

    def render(self) -> dict[str, Any]:
        """The answer so far, in the form of a chunk. A copy: what was rendered does not grow."""
        logprobs = {name: list(values) for name, values in self._logprobs.items()}
        meta = self._last["meta_info"] | logprobs
        return {**self._last, "text": self._text, "output_ids": list(self._output_ids), "meta_info": meta}


async def cumulative(chunks: AsyncIterator[Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The stream of one request, each item as its sample's answer so far. Closes `chunks`."""
    answers: defaultdict[int, CumulativeAnswer] = defaultdict(CumulativeAnswer)
    async with aclosing(chunks):  # type: ignore[type-var]
        async for chunk in chunks:
            answer = answers[chunk.get("index", 0)]
            answer.add(chunk)
            yield answer.render()
