"""A stream of the native dialect: chunks joined, by sample; what an item had stays as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from copy import deepcopy
from typing import Any

from waybill.engine.frontend.cumulative_answer import cumulative


def chunk(text: str, ids: list[int], **meta: Any) -> dict[str, Any]:
    return {"text": text, "output_ids": ids, "meta_info": {"id": "r", **meta}}


class Source:
    """A stream that tells whether it was closed."""

    def __init__(self, *chunks: dict[str, Any]) -> None:
        self._chunks = chunks
        self.is_closed = False

    async def run(self) -> AsyncIterator[dict[str, Any]]:
        try:
            for one in self._chunks:
                yield one
        finally:
            self.is_closed = True


def joined(*chunks: dict[str, Any]) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        items, copies = [], []
        async for item in cumulative(Source(*chunks).run()):
            items.append(item)
            copies.append(deepcopy(item))
        assert items == copies, "what a reader was given does not grow"
        return items

    return asyncio.run(run())


def test_text_and_ids_grow_and_the_rest_is_the_last_chunks() -> None:
    first = chunk("a", [1], finish_reason=None, routed_experts="rows 0, 1")
    last = chunk("bc", [2, 3], finish_reason={"type": "length", "length": 3}, routed_experts="row 2")
    assert joined(first, last) == [first, last | {"text": "abc", "output_ids": [1, 2, 3]}]


def test_log_probabilities_grow_where_they_stand() -> None:
    first = chunk("a", [1], input_token_logprobs=[(None, 9, None)], output_token_logprobs=[(-1.0, 1, None)], dp_rank=0)
    last = chunk("b", [2], input_token_logprobs=[], output_token_logprobs=[(-2.0, 2, None)], dp_rank=0)
    items = joined(first, last)
    assert items[1]["meta_info"]["input_token_logprobs"] == [(None, 9, None)]
    assert items[1]["meta_info"]["output_token_logprobs"] == [(-1.0, 1, None), (-2.0, 2, None)]
    assert [list(item["meta_info"]) for item in items] == [list(first["meta_info"])] * 2


def test_a_stream_that_fails_keeps_what_it_had() -> None:
    items = joined(chunk("a", [1]), chunk("", [], finish_reason={"type": "abort"}))
    assert (items[1]["text"], items[1]["output_ids"]) == ("a", [1])


def test_samples_grow_apart() -> None:
    chunks = [{"index": index, **chunk(text, [])} for index, text in ((1, "x"), (0, "a"), (1, "y"), (0, "b"))]
    assert [(item["index"], item["text"]) for item in joined(*chunks)] == [(1, "x"), (0, "a"), (1, "xy"), (0, "ab")]


def test_who_leaves_early_ends_the_source() -> None:
    async def run() -> bool:
        source = Source(chunk("a", [1]), chunk("b", [2]))
        stream = cumulative(source.run())
        await anext(stream)
        await stream.aclose()
        return source.is_closed

    assert asyncio.run(run())
