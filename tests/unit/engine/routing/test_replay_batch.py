"""Rows find their positions: padding on any side, packing, parts, missing rows; what does not fit is refused."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support.replay_models import make_model, make_routes, native_rows, random_rows, random_tokens, received_by_experts

from waybill.engine.routing.replay import RoutedExpertsBatch, RowCounts, replay_routing, routes_from_answer
from waybill.engine.routing.wire import RoutedExperts

LENGTHS = (5, 8, 2)
S = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("qwen3_moe")


def sequences(model: Any) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Tokens [length] and rows [length - 1, M, K] of each sequence, as an engine gives them."""
    return [
        (random_tokens(1, length, seed=length)[0], random_rows(model, length - 1, seed=length)) for length in LENGTHS
    ]


def pad(model: Any, side: str) -> tuple[torch.Tensor, torch.Tensor, list[RoutedExperts]]:
    """Token ids and mask [B, S], and routes."""
    ids, mask = torch.zeros(len(LENGTHS), S, dtype=torch.long), torch.zeros(len(LENGTHS), S, dtype=torch.long)
    routes = []
    for index, (tokens, rows) in enumerate(sequences(model)):
        begin = {"left": S - len(tokens), "right": 0, "both": (S - len(tokens)) // 2}[side]
        ids[index, begin : begin + len(tokens)] = tokens
        mask[index, begin : begin + len(tokens)] = 1
        routes.append(make_routes(model, rows))
    return ids, mask, routes


def alone(model: Any, tokens: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Logits [length, V] of one sequence without padding."""
    batch = RoutedExpertsBatch.from_padded([make_routes(model, rows)], torch.ones(1, len(tokens)))
    with replay_routing(model), torch.no_grad():
        return model(tokens[None], routed_experts=batch).logits[0]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_reach_their_tokens(model: Any, side: str) -> None:
    ids, mask, routes = pad(model, side)
    batch = RoutedExpertsBatch.from_padded(routes, mask)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with replay_routing(model) as replay, received_by_experts(model) as received, torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position_ids, routed_experts=batch).logits
    for index, (tokens, rows) in enumerate(sequences(model)):
        where = mask[index].nonzero().flatten()
        for column, calls in enumerate(received):
            at = calls[0].reshape(len(LENGTHS), S, -1)[index, where[:-1]]
            assert np.array_equal(at.numpy(), rows[:, column])
        torch.testing.assert_close(logits[index, where], alone(model, tokens, rows), rtol=1e-5, atol=1e-5)
    expected = RowCounts(replayed=sum(LENGTHS) - 3, missing=0, last=3, padding=3 * S - sum(LENGTHS))
    assert replay.counts == batch.counts == expected


@pytest.mark.parametrize("form", ["position_ids", "cu_seqlens", "padded_cu_seqlens"])
def test_packed_rows_reach_their_tokens(model: Any, form: str) -> None:
    packed = sequences(model)
    tail = 3 if form == "padded_cu_seqlens" else 0
    ids = torch.cat([tokens for tokens, _ in packed] + [torch.zeros(tail, dtype=torch.long)])[None]
    position_ids = torch.cat([torch.arange(len(tokens)) for tokens, _ in packed] + [torch.arange(tail)])[None]
    routes = [make_routes(model, rows) for _, rows in packed]
    if form == "position_ids":
        batch = RoutedExpertsBatch.from_packed(routes, position_ids=position_ids)
    else:
        bounds = torch.tensor([0, *np.cumsum(LENGTHS)])
        batch = RoutedExpertsBatch.from_packed(routes, cu_seqlens=bounds, num_positions=ids.shape[1])
    with replay_routing(model), received_by_experts(model) as received, torch.no_grad():
        # Without a cache, transformers keeps packed sequences apart by their positions.
        logits = model(ids, position_ids=position_ids, use_cache=False, routed_experts=batch).logits[0]
    begin = 0
    for tokens, rows in packed:
        for column, calls in enumerate(received):
            assert np.array_equal(calls[0][begin : begin + len(rows)].numpy(), rows[:, column])
        expected = alone(model, tokens, rows)
        torch.testing.assert_close(logits[begin : begin + len(tokens)], expected, rtol=1e-5, atol=1e-5)
        begin += len(tokens)
    assert batch.counts == RowCounts(sum(LENGTHS) - 3, 0, 3, tail)


def test_missing_rows_take_the_model_s_own_routing(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A sequence without rows, one whose rows begin late, and a hole between two parts."""
    tokens = random_tokens(3, S)
    rows = random_rows(model, S - 1)
    routes = [
        None,
        make_routes(model, rows[4:], start=4),
        [make_routes(model, rows[:2]), make_routes(model, rows[5:], start=5)],
    ]
    batch = RoutedExpertsBatch.from_padded(routes, torch.ones(3, S))
    missing = [S - 1, 4, 3]
    with replay_routing(model) as replay, received_by_experts(model) as received, torch.no_grad():
        model(tokens, routed_experts=batch)
        model(tokens, routed_experts=batch)
    assert replay.counts == batch.counts + batch.counts
    assert batch.counts == RowCounts(3 * (S - 1) - sum(missing), sum(missing), last=3, padding=0)
    assert [record.getMessage() for record in caplog.records if "have no row" in record.getMessage()] == [
        "routed experts: 14 of 21 tokens have no row; the model's own router decides for them (told once, "
        "Replay.counts has the sum)"
    ]
    # The first MoE layer's inputs do not depend on routes, so that its native choice is that of a native forward.
    native = native_rows(model, input_ids=tokens)[:, 0].reshape(3, S, -1)
    found = received[0][0].numpy().reshape(3, S, -1)
    expected = native.copy()
    expected[1, 4:-1], expected[2, :2], expected[2, 5:-1] = rows[4:, 0], rows[:2, 0], rows[5:, 0]
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, native)


def test_a_sequence_cut_on_its_left_is_aligned_by_position(model: Any) -> None:
    rows = random_rows(model, 6)
    batch = RoutedExpertsBatch.from_padded([make_routes(model, rows[2:], 2)], torch.ones(1, 5), first_positions=[2])
    assert np.array_equal(batch.ids[:4].numpy(), rows[2:])
    assert batch.has_row.tolist() == [True] * 4 + [False]


def test_more_than_256_experts_fit(model: Any) -> None:
    routes = make_routes(model, random_rows(model, 3))
    rows = routes.rows.astype("<u2") + 300
    wide = RoutedExperts(rows, msgspec.structs.replace(routes.meta, dtype="uint16"))
    batch = RoutedExpertsBatch.from_padded([wide], torch.ones(1, 4))
    assert batch.max_id == int(rows.max()) > 255
    assert np.array_equal(batch.layer(1, torch.device("cpu"))[0][:3].numpy(), rows[:, 1])
    with pytest.raises(ValueError, match="id 40000 is out of range, must be at most 32767"):
        RoutedExpertsBatch.from_padded(
            [RoutedExperts(rows * 0 + np.array([1, 2, 40000], "<u2"), wide.meta)], torch.ones(1, 4)
        )


def test_to_moves_tensors_and_keeps_the_rest(model: Any) -> None:
    batch = RoutedExpertsBatch.from_padded([make_routes(model, random_rows(model, 3))], torch.ones(1, 4))
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.has_row.device.type == "meta"
    assert (moved.shape, moved.layer_ids, moved.top_k, moved.max_id, moved.counts) == (
        (1, 4),
        batch.layer_ids,
        batch.top_k,
        batch.max_id,
        batch.counts,
    )


def repeated(model: Any) -> RoutedExperts:
    rows = random_rows(model, 3)
    rows[2, 1] = (4, 1, 4)
    return make_routes(model, rows)


def other_layers(model: Any) -> RoutedExperts:
    routes = make_routes(model, random_rows(model, 3))
    return RoutedExperts(routes.rows, msgspec.structs.replace(routes.meta, layer_ids=[0, 1]))


def test_refusals(model: Any) -> None:
    three = make_routes(model, random_rows(model, 3))
    ones, packed = torch.ones(1, 4), RoutedExpertsBatch.from_packed
    padded = RoutedExpertsBatch.from_padded
    position_ids = torch.tensor([[0, 1, 2, 3]])
    cases: list[tuple[str, Any]] = [
        (r"attention_mask: has shape \(1, 4\), must be \(2, length\)", lambda: padded([three, three], ones)),
        ("padding between tokens", lambda: padded([three], torch.tensor([[1, 0, 1, 1]]))),
        (r"first_positions=\[-1\]: must be 1 numbers", lambda: padded([three], ones, [-1])),
        (r"rows of positions \[0, 3\) for a sequence that holds \[0, 2\)", lambda: padded([three], ones[:, :2])),
        (r"for a sequence that holds \[1, 5\)", lambda: padded([three], ones, [1])),
        ("no sequence has rows", lambda: padded([None], ones)),
        (r"row 2, MoE layer 1 is \[4, 1, 4\]: ids must be distinct", lambda: padded([repeated(model)], ones)),
        (r"routes\[1\]: layers, top_k and dtype", lambda: padded([three, other_layers(model)], torch.ones(2, 4))),
        (
            "parts disagree where they overlap",
            lambda: padded([[three, make_routes(model, random_rows(model, 2, seed=9), 1)]], ones),
        ),
        ("give exactly one of them", lambda: packed([three])),
        ("2 items for 1 packed sequences", lambda: packed([three, three], position_ids=position_ids)),
        ("must begin with position 0", lambda: packed([three], position_ids=position_ids + 1)),
        ("must count up by one", lambda: packed([three], position_ids=torch.tensor([[0, 1, 3, 4]]))),
        (
            r"cu_seqlens=\[0, 4\]: must begin with 0",
            lambda: packed([three], cu_seqlens=torch.tensor([0, 4]), num_positions=3),
        ),
        (r"their envelope states", lambda: padded([RoutedExperts(three.rows[:2], three.meta)], ones)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_overlapping_parts_that_agree_are_one(model: Any) -> None:
    rows = random_rows(model, 6)
    parts = [make_routes(model, rows[:4]), make_routes(model, rows[3:], 3)]
    batch = RoutedExpertsBatch.from_padded([parts], torch.ones(1, 7))
    assert np.array_equal(batch.ids[:6].numpy(), rows)


def test_routes_from_answers(model: Any) -> None:
    routes = make_routes(model, random_rows(model, 3))
    meta = msgspec.to_builtins(routes.meta)
    inline = {"routed_experts": base64.b64encode(routes.frame).decode(), "routed_experts_meta": meta}
    for info in (inline, inline | {"routed_experts": routes.rows}):
        found = routes_from_answer(info)
        assert found is not None and found.meta == routes.meta and np.array_equal(found.rows, routes.rows)
    assert routes_from_answer({"routed_experts": None, "routed_experts_error": "row 3 is missing"}) is None
    damaged = bytes(routes.frame)[:-1] + b"\x07"
    for message, info in (
        ("checksum", inline | {"routed_experts": base64.b64encode(damaged).decode()}),
        ("return_routed_experts=True", {}),
        ("routed_experts_format='compact'", inline | {"routed_experts_dtype": "int32"}),
    ):
        with pytest.raises(ValueError, match=message):
            routes_from_answer(info)
