"""What a session's caller has: never more is assumed than was delivered, and what is forgotten comes again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.client import Generation
from waybill.client.session import SessionHistory
from waybill.engine.frontend.generate_request import GenerateReqInput, expand, parse_generate_request
from waybill.engine.frontend.request_limits import EngineLimits
from waybill.engine.frontend.route_delivery import RouteDelivery
from waybill.engine.frontend.session_routes import EDGE_TOKENS, SessionRoutes, TokenTree
from waybill.engine.io_struct import FinishReason, RequestOutput
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import encode

LIMITS = EngineLimits(
    context_length=1000, kv_cache_tokens=1000, vocab_size=4, dp_size=1, has_tokenizer=False, routed_experts=True
)
GEOMETRY = RouteGeometry(layer_ids=(0, 1), num_layers_total=2, max_tokens=8, top_k=2, num_experts=256)
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


@given(SEQUENCES, SEQUENCES)
def test_a_tree_is_the_set_of_the_beginnings_of_its_sequences(added: list[list[int]], asked: list[list[int]]) -> None:
    tree, beginnings = TokenTree(), {()}
    for tokens in added:
        tree.add(ids(tokens))
        beginnings |= {tuple(tokens[:end]) for end in range(len(tokens) + 1)}
        # Each is one node of a trie, the empty one its root.
        assert tree.num_tokens == len(beginnings) - 1
        # An edge begins at the root, or where sequences part, and no sequence adds more than two.
        assert tree.num_edges <= 2 * len({tuple(one) for one in added})
    for tokens in [*asked, *added]:
        expected = max(end for end in range(len(tokens) + 1) if tuple(tokens[:end]) in beginnings)
        assert tree.common_prefix(ids(tokens)) == expected


def test_a_conversation_that_only_goes_on_is_one_edge() -> None:
    tree = TokenTree()
    for turn in range(1, 50):
        tree.add(np.arange(10 * turn, dtype=np.int32))
    assert (tree.num_edges, tree.num_tokens) == (1, 490)
    tree.add(np.array([0, 1, 2, 9], dtype=np.int32))
    assert tree.num_edges == 3


def test_what_was_not_delivered_from_where_the_caller_was_does_not_count() -> None:
    sessions = SessionRoutes(10, 1000)
    sessions.add("a", ids([1, 2, 3, 4]), 2)
    assert sessions.num_delivered("a", ids([1, 2, 3, 4])) == 0, "nothing says that it has the first two"
    sessions.add("a", ids([1, 2, 3]), 0)
    sessions.add("a", ids([1, 2, 3, 4]), 3)
    assert sessions.num_delivered("a", ids([1, 2, 3, 4, 5])) == 4
    assert sessions.num_delivered("a", ids([1, 2, 9])) == 2 and sessions.num_delivered("b", ids([1, 2])) == 0


def test_the_sessions_used_longest_ago_are_forgotten() -> None:
    sessions = SessionRoutes(2, 1000)
    for name in ("a", "b"):
        sessions.add(name, ids([1, 2, 3]), 0)
    sessions.num_delivered("a", ids([1]))
    sessions.add("c", ids([1]), 0)
    assert [sessions.num_delivered(name, ids([1, 2, 3])) for name in "abc"] == [3, 0, 1]
    assert sessions.counters() == {
        "num_route_sessions": 2,
        "num_route_session_tokens": 4 + 2 * EDGE_TOKENS,
        "num_route_sessions_forgotten": 1,
    }


def test_tokens_are_bounded_also_within_one_session() -> None:
    sessions = SessionRoutes(10, 5 + EDGE_TOKENS)
    sessions.add("a", ids([1, 2, 3]), 0)
    sessions.add("b", ids([1, 2, 3]), 0)
    assert [sessions.num_delivered(name, ids([1, 2, 3])) for name in "ab"] == [0, 3]
    sessions.add("b", ids([1, 2, 3, 1, 2, 3]), 3)
    assert sessions.num_delivered("b", ids([1, 2, 3])) == 0
    assert sessions.counters()["num_route_session_tokens"] == 0
    nothing = SessionRoutes(0, 100)
    nothing.add("a", ids([1]), 0)
    assert nothing.num_delivered("a", ids([1])) == 0


class FakeEngine:
    """Answers requests of one session; row i is a function of the tokens up to i and of a salt, which is another in every
    forward where `is_noisy`."""

    def __init__(self, sessions: SessionRoutes) -> None:
        self.sessions = sessions
        self.num_rows_shipped = 0

    def rows(self, tokens: list[int]) -> np.ndarray:
        each = [hash(tuple(tokens[: end + 1])) % 250 for end in range(len(tokens))]
        return (np.array(each, np.uint8)[:, None, None] + np.arange(4, dtype=np.uint8).reshape(1, 2, 2)).astype(
            np.uint8
        )

    def answer(self, body: GenerateReqInput, outputs: list[list[int]], *, is_delivered: bool) -> list[Generation]:
        (samples,) = expand(body, LIMITS, list, self.sessions.num_delivered)
        delivery = RouteDelivery(self.sessions, "s", samples)
        generations = []
        for sample, output in zip(samples, outputs, strict=True):
            start = sample.output_options.routed_experts_start_len
            tokens = sample.input_ids.tolist() + output
            routed = encode(self.rows(tokens)[start:-1], start, GEOMETRY, [])
            self.num_rows_shipped += routed.meta.rows
            delivery.add(
                RequestOutput(
                    rid=sample.rid,
                    text="",
                    token_ids=output,
                    prompt_tokens=len(sample.input_ids),
                    completion_tokens=len(output),
                    cached_tokens=0,
                    num_retractions=0,
                    weight_version="v",
                    dp_rank=0,
                    finish_reason=FinishReason("length", length=len(output)),
                    routed_experts=routed.meta,
                )
            )
            reason = {"type": "length"}
            generations.append(Generation("", output, reason, len(tokens), 0, routed.rows, routed.meta, {}))
        if is_delivered:
            delivery.delivered()
        return generations


TURNS = st.lists(
    st.tuples(
        st.integers(0, 30),  # which of the earlier turns it continues
        st.integers(0, 12),  # how many of its last tokens are edited away
        st.lists(st.integers(0, 3), min_size=1, max_size=5),  # what is new
        st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3),  # the choices
        st.sampled_from(["delivered", "delivered", "delivered", "lost"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(deadline=None)
@given(TURNS, st.sampled_from([10, 140, 440, 100_000]))
def test_random_trees_of_turns_stitched_equal_the_whole(
    turns: list[tuple[int, int, list[int], list[list[int]], str]], max_tokens: int
) -> None:
    """With branches, edits, answers that get lost, and sessions that are forgotten."""
    engine, history = FakeEngine(SessionRoutes(1, max_tokens)), SessionHistory("s", {})
    known: list[list[int]] = [[]]
    for which, num_edited, new, outputs, fate in turns:
        base = known[which % len(known)]
        prompt = base[: max(len(base) - num_edited, 0)] + new
        body = parse_generate_request(
            {
                "input_ids": prompt,
                "session_id": "s",
                "return_routed_experts": True,
                "routed_experts_start_len": history.next_request(prompt)["start_len"],
                "sampling_params": {"n": len(outputs), "max_new_tokens": 4},
            }
        )
        generations = engine.answer(body, outputs, is_delivered=fate == "delivered")
        if fate == "lost":
            continue
        for turn, output in zip(history.commit(prompt, generations), outputs, strict=True):
            assert turn.tokens == prompt + output
            assert np.array_equal(turn.routes, engine.rows(turn.tokens)[:-1])
            known.append(turn.tokens)


@pytest.mark.parametrize("num_choices", [1, 4])
def test_every_row_of_a_conversation_is_shipped_once(num_choices: int) -> None:
    """But that of a prompt's last token, which is every choice's own."""
    engine, history = FakeEngine(SessionRoutes(10, 100_000)), SessionHistory("s", {})
    tokens: list[int] = []
    for _ in range(10):
        prompt = [*tokens, 1, 2, 3]
        fields = {"n": num_choices, "max_new_tokens": 4}
        body = parse_generate_request({**ASKED, "input_ids": prompt, "sampling_params": fields})
        outputs = [[choice % 4, 1, 2] for choice in range(num_choices)]
        tokens = history.commit(prompt, engine.answer(body, outputs, is_delivered=True))[-1].tokens
    # A turn has three tokens of the prompt, the last of them for each choice, and two of an answer; the answer's third is
    # fed by the next turn.
    assert engine.num_rows_shipped == 10 * (2 + 3 * num_choices) + 9


ASKED = {"session_id": "s", "return_routed_experts": True, "routed_experts_start_len": "auto"}
