"""The client against a fake server whose routes are a function of position and token: what is wrong is never handed on."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from support.fake_routes_server import (
    GEOMETRY,
    KINDS,
    PROMPT,
    FakeServer,
    ask,
    more_tokens,
    no_rows,
    route_table,
    sample,
)

from waybill.client import RoutesError
from waybill.engine.routing import wire


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delivery", ["inline", "reference"])
@pytest.mark.parametrize("start", [0, 2, len(PROMPT)])
def test_generate(kind: str, delivery: str, start: int, server: FakeServer) -> None:
    params = {"max_new_tokens": 3, "temperature": 0.5}
    got = ask(kind, server, PROMPT, params, start_len=start, delivery=delivery, rid="mine")
    expected = sample(PROMPT, 3)
    assert got.output_ids == expected and got.text == "3 ids"
    assert got.finish_reason == server.finish and (got.prompt_tokens, got.cached_tokens) == (4, 1)
    assert got.raw["id"] == "mine" and server.bodies[0]["sampling_params"] == params
    assert got.routes is not None and got.meta is not None
    assert got.routes.dtype == np.uint8
    np.testing.assert_array_equal(got.routes, route_table(PROMPT + expected)[start:-1])
    assert (got.meta.start, got.meta.rows, got.meta.weight_versions) == (start, 6 - start, [("v0", start, 6)])
    assert len(server.claims) == (delivery == "reference")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_from_text_and_without_routes(kind: str, server: FakeServer) -> None:
    got = ask(kind, server, text="abc", routed_experts=False)
    assert got.output_ids == sample([97, 98, 99], 3)
    assert got.routes is None and got.meta is None
    assert "input_ids" not in server.bodies[0]


def test_ids_of_numpy_are_sent_as_they_are(server: FakeServer) -> None:
    ask("sync", server, np.array(PROMPT))
    assert server.bodies[0]["input_ids"] == PROMPT


@pytest.mark.parametrize("start", [0, 3, 4])
@pytest.mark.parametrize("delivery", ["inline", "reference"])
def test_prefill_only_has_the_row_of_every_token(start: int, delivery: str, server: FakeServer) -> None:
    got = ask("sync", server, PROMPT, {"max_new_tokens": 0}, start_len=start, delivery=delivery)
    assert got.routes is not None and got.meta is not None
    np.testing.assert_array_equal(got.routes, route_table(PROMPT)[start:])
    assert (got.meta.start, got.meta.rows) == (start, 4 - start)
    server.num_missing = 1
    with pytest.raises(RoutesError, match="expected rows"):
        ask("sync", server, PROMPT, {"max_new_tokens": 0}, start_len=0, delivery=delivery)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": PROMPT, "text": "abc"}, "exactly one"),
        ({"input_ids": "abc"}, "text by its name"),
        ({"input_ids": PROMPT, "sampling_params": {"n": 2}}, "n=2"),
        ({"input_ids": PROMPT, "stream": True}, "stream"),
        ({"input_ids": PROMPT, "routed_experts_format": "int32"}, "routed_experts_format"),
    ],
)
def test_what_cannot_be_asked_is_not_sent(arguments: dict[str, Any], message: str, server: FakeServer) -> None:
    with pytest.raises(ValueError, match=message):
        ask("sync", server, **arguments)
    assert server.bodies == []


def wrong_checksum(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["checksum"] = "crc32:00000000"


def flipped_bit(meta_info: dict[str, Any]) -> None:
    raw = bytearray(base64.b64decode(meta_info["routed_experts"]))
    raw[5] ^= 1
    meta_info["routed_experts"] = base64.b64encode(raw).decode()


def cut_short(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts"] = base64.b64encode(base64.b64decode(meta_info["routed_experts"])[:-6]).decode()


def wrong_start(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["start"] += 1


def no_base64(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts"] = "*" + meta_info["routed_experts"]


def unknown_dtype(meta_info: dict[str, Any]) -> None:
    meta_info["routed_experts_meta"]["dtype"] = "float8"


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def remove(meta_info: dict[str, Any]) -> None:
        *folders, name = path
        for folder in folders:
            meta_info = meta_info[folder]
        del meta_info[name]

    return remove


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_checksum, "checksum crc32:[0-9a-f]+, the envelope states crc32:00000000"),
        (flipped_bit, "checksum"),
        (cut_short, "30 bytes arrived, the envelope states 36"),
        (wrong_start, "from position 0 on, they start at 1"),
        (no_base64, "base64"),
        (unknown_dtype, "float8"),
        (no_rows, "2 rows are missing"),
        (without("routed_experts"), "routed_experts in meta_info"),
        (without("routed_experts_meta"), "routed_experts_meta in meta_info"),
        (without("routed_experts_meta", "checksum"), "checksum"),
        (without("prompt_tokens"), "prompt_tokens"),
        (without("completion_tokens"), "completion_tokens"),
        (without("finish_reason"), "finish_reason"),
    ],
)
def test_wrong_answers_raise(
    kind: str, spoil: Callable[[dict[str, Any]], None], message: str, server: FakeServer
) -> None:
    assert ask(kind, server, PROMPT).routes is not None
    server.spoil = spoil
    with pytest.raises(RoutesError, match=message):
        ask(kind, server, PROMPT)


@pytest.mark.parametrize("delivery", ["inline", "reference"])
def test_short_rows_are_for_aborted_requests_only(delivery: str, server: FakeServer) -> None:
    server.num_missing = 2
    with pytest.raises(RoutesError, match=r"expected rows \[1, 6\), \[1, 4\) arrived"):
        ask("sync", server, PROMPT, start_len=1, delivery=delivery)
    server.finish = {"type": "abort", "message": "by the caller"}
    got = ask("sync", server, PROMPT, start_len=1, delivery=delivery)
    assert got.routes is not None and len(got.routes) == 3
    server.num_missing = -1
    server.spoil = more_tokens_than_said
    with pytest.raises(RoutesError, match=r"expected rows \[0, 6\), \[0, 7\) arrived"):
        ask("sync", server, PROMPT)


def more_tokens_than_said(meta_info: dict[str, Any]) -> None:
    more_tokens(meta_info)
    meta_info["completion_tokens"] = 3


def test_what_is_no_single_answer_raises(server: FakeServer) -> None:
    for content in (b"[]", b"{}", b"data: {}", b"\xff"):
        server.refusal = functools.partial(httpx.Response, 200, content=content)
        with pytest.raises(RoutesError, match="the answer"):
            ask("sync", server, PROMPT)


def flip_in_block(routed: wire.RoutedExperts) -> wire.RoutedExperts:
    return wire.RoutedExperts(routed.rows ^ 1, routed.meta)


def block_of_another(routed: wire.RoutedExperts) -> wire.RoutedExperts:
    """Intact and of the same form, but not what the answer announced."""
    return wire.encode(routed.rows ^ 1, routed.meta.start, GEOMETRY, routed.meta.weight_versions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil_block", "message"), [(flip_in_block, "checksum"), (block_of_another, "the answer states .* its claim")]
)
def test_wrong_blocks_raise(kind: str, spoil_block: Any, message: str, server: FakeServer) -> None:
    server.spoil_block = spoil_block
    with pytest.raises(RoutesError, match=message):
        ask(kind, server, PROMPT, delivery="reference")


def test_a_block_needs_its_claim_and_envelope(server: FakeServer) -> None:
    server.spoil = without("routed_experts_claim")
    with pytest.raises(RoutesError, match="routed_experts_claim in meta_info"):
        ask("sync", server, PROMPT, delivery="reference")
    server.spoil = no_rows
    with pytest.raises(RoutesError, match="2 rows are missing"):
        ask("sync", server, PROMPT, delivery="reference")
    server.spoil = lambda meta_info: None
    server._block = lambda claim: httpx.Response(200, content=bytes(server.claims[claim].frame))  # type: ignore[method-assign]
    with pytest.raises(RoutesError, match="X-Routed-Experts-Meta"):
        ask("sync", server, PROMPT, delivery="reference")
