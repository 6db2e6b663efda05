"""Requests are checked at the edge: what is refused is refused by name, what is off or changes nothing is accepted."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expanded_requests import LIMITS, take

from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.request_limits import EngineLimits
from waybill.engine.frontend.sample_request import SampleRequest, SharedPrefix
from waybill.engine.frontend.sampling_params import SamplingParamsInput
from waybill.engine.frontend.work_threads import MAX_INLINE_US, MAX_SHORT_US
from waybill.engine.io_struct import OutputOptions

AUTO = {"input_ids": [1], "return_routed_experts": True, "routed_experts_start_len": "auto"}


def take_one(**fields: Any) -> SampleRequest:
    return take(**fields)[0][0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "text, input_ids: give exactly one"),
        ({"text": "a", "input_ids": [1]}, "text, input_ids: give exactly one"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"text": ""}, "the prompt is empty"),
        ({"text": []}, "the batch is empty"),
        ({"input_ids": [1, 100]}, "input_ids: 100 is no token, ids lie in 0 .. 99"),
        ({"input_ids": [-1]}, "input_ids: -1 is no token"),
        ({"input_ids": [1] * 21}, "the prompt has 21 tokens: must have at most 20"),
        ({"input_ids": [1] * 18}, "at most 16 .kv_cache_tokens"),
        ({"input_ids": "no"}, "input_ids"),
        ({"input_ids": [True]}, "input_ids.0: must be an integer"),
        ({"text": "a", "routed_dp_rank": True}, "routed_dp_rank: must be an integer, not true"),
        ({"text": "a", "routed_experts_start_len": False}, "routed_experts_start_len: must be an integer, not false"),
        ({"input_ids": [1], "colour": "red"}, "colour: is no field of this request"),
        ({"input_ids": [1], "rid": ""}, "rid: "),
        ({"input_ids": [1], "video_data": ["x"]}, "video_data is not supported"),
        ({"input_ids": [1], "lora_path": "x"}, "lora_path is not supported"),
        ({"input_ids": [1], "bootstrap_host": "10.0.0.1"}, "bootstrap_host is not supported: must be absent"),
        ({"input_ids": [1], "bootstrap_port": 8998}, "bootstrap_port is not supported: must be absent"),
        ({"input_ids": [1], "bootstrap_room": 0}, "bootstrap_room is not supported: must be absent"),
        ({"input_ids": [1], "modalities": ["image"]}, "modalities is not supported: must be .'text'. or absent"),
        ({"input_ids": [1], "routed_dp_rank": 1}, "routed_dp_rank=1: must lie in 0 .. 0"),
        ({**AUTO}, "routed_experts_start_len='auto': needs session_id"),
        ({**AUTO, "session_id": "s", "routed_experts_delivery": "reference"}, "'auto': needs routed_experts_delivery"),
        ({"input_ids": [1], "routed_experts_start_len": "self"}, "routed_experts_start_len: "),
        ({"input_ids": [1], "top_logprobs_num": 101}, "top_logprobs_num=101: must lie in 0 .. 100"),
        ({"input_ids": [1], "logprob_start_len": 2}, "logprob_start_len=2: must lie in -1"),
        ({"input_ids": [1], "routed_experts_format": "text"}, "routed_experts_format"),
        ({"input_ids": [1], "routed_experts_delivery": "mail"}, "routed_experts_delivery"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid: the entries must differ"),
        ({"input_ids": [[1], [2]], "return_logprob": [True]}, "return_logprob: has 1 entries"),
    ],
)
def test_bad_requests_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take(**fields)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens: must be an integer, not true"),
        ({"max_new_tokens": 19}, "max_new_tokens=19 with 2 prompt tokens: together they must be at most 20"),
        ({"max_new_tokens": 16}, "together they must be at most 17 .kv_cache_tokens"),
        ({"min_new_tokens": 3, "max_new_tokens": 2}, "min_new_tokens=3: must be at most max_new_tokens=2"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature: must be a number, not true"),
        ({"logit_bias": {"1": True}}, "must be a number, not true"),
        ({"sampling_seed": -2}, "sampling_seed"),
        ({"stop": ["a"] * 65}, "stop.*at most 64"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids.*at most 128"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias: must have at most 4096 entries"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop: an empty string"),
        ({"stop": ["a", ""]}, "stop: an empty string"),
        ({"stop_token_ids": [100]}, "stop_token_ids: 100 is no token"),
        ({"logit_bias": {"100": 1.0}}, "logit_bias: 100 is no token"),
        ({"regex": "a+", "ebnf": "start: /a/"}, "ebnf: must be absent beside regex"),
        ({"json_schema": ""}, "json_schema: must be text that"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_bad_sampling_params_are_refused_by_name(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take(input_ids=[1, 2], sampling_params=params)


REALS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
HUGE = 10**5000  # Python refuses to print it
BAD_INTEGERS = [2**63, -(2**63) - 1, pytest.param(HUGE, id="huge"), float("inf"), float("nan"), 1e300, 1.5]
INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "sampling_seed", "n")


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [1e39, -1e39, float("inf"), float("-inf"), float("nan"), 10**400, -(2**63) - 1])
def test_no_number_reaches_the_sampler_that_float32_cannot_hold(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        take(input_ids=[1], sampling_params={name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_no_integer_of_the_sampling_params_leaves_the_range_of_messages(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        take(input_ids=[1], sampling_params={name: value})


@pytest.mark.parametrize("name", ["logprob_start_len", "top_logprobs_num", "priority", "routed_dp_rank"])
@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_no_integer_leaves_the_range_of_messages(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        take(**{"input_ids": [1], name: value})


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {"1": float("inf")}},
        {"logit_bias": {"1": float("nan")}},
        {"logit_bias": {"1": 1e31}},
        pytest.param({"logit_bias": {HUGE: 1.0}}, id="huge key"),
        {"stop_token_ids": [2**63]},
        pytest.param({"stop_token_ids": [HUGE]}, id="huge id"),
    ],
)
def test_neither_do_entries(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        take(input_ids=[1], sampling_params=params)


@pytest.mark.parametrize("temperature", [1e39, 2e6, -1e-9])
def test_the_range_of_temperatures_is_told(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature: must lie in 0 \.\. 1e\+06"):
        take(input_ids=[1], sampling_params={"temperature": temperature})


@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_nor_does_a_start_that_somebody_reads(value: float) -> None:
    with pytest.raises(ValueError, match="routed_experts_start_len"):
        take(input_ids=[1], return_routed_experts=True, routed_experts_start_len=value)


def test_a_seed_of_minus_one_is_none_and_arrays_are_ids() -> None:
    seeds = {take_one(input_ids=[1], sampling_params={"sampling_seed": -1}).sampling_params.sampling_seed for _ in "ab"}
    assert len(seeds) == 2 and min(seeds) >= 0
    assert take_one(input_ids=np.array([1, 2])).input_ids.tolist() == [1, 2]
    groups = take(input_ids=np.array([[1, 2], [3, 4]]))
    assert [group[0].input_ids.tolist() for group in groups] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="item 1: input_ids: 100 is no token"):
        take(input_ids=[np.array([1]), np.array([100])])


def test_known_fields_that_are_off_or_change_nothing_are_accepted() -> None:
    sample = take_one(
        input_ids=[1],
        image_data=None,
        return_hidden_states=False,
        modalities=["text"],
        bootstrap_host=None,
        log_metrics=True,
        sampling_params={"regex": None, "spaces_between_special_tokens": False, "max_new_tokens": 1},
    )
    assert sample.sampling_params.max_new_tokens == 1


OPTIONS: dict[str, Any] = {
    "stream": True,
    "skip_special_tokens": False,
    "no_stop_trim": True,
    "return_logprob": True,
    "logprob_start_len": 1,
    "top_logprobs_num": 2,
    "return_text_in_logprobs": True,
    "return_routed_experts": True,
    "routed_experts_start_len": 1,
    "routed_experts_format": "compact",
    "routed_experts_delivery": "reference",
    "stream_routed_experts": True,
    "return_router_weights": True,
}


@pytest.mark.parametrize("name", OutputOptions.__struct_fields__)
def test_every_option_of_the_output_arrives_and_no_other_changes(name: str) -> None:
    # Those that say something only of routes, or of streams.
    needed = {"stream": True} if name == "stream_routed_experts" else {}
    of_routes = ("routed_experts_start_len", "stream_routed_experts", "return_router_weights")
    needed |= {"return_routed_experts": True} if name in of_routes else {}
    asked = {**needed, name: OPTIONS[name]}
    params = {option: asked[option] for option in asked if option in SamplingParamsInput.model_fields}
    fields = {option: asked[option] for option in asked if option not in params}
    assert take_one(input_ids=[1], sampling_params=params, **fields).output_options == OutputOptions(**asked)


def test_what_says_how_routes_come_goes_no_further_where_nobody_asked_for_routes() -> None:
    sample = take_one(input_ids=[1], stream=True, stream_routed_experts=True, routed_experts_start_len=2**100)
    assert sample.output_options == OutputOptions(stream=True)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (-1, "routed_experts_start_len=-1 is lower than 0"),
        (4, "routed_experts_start_len=4 is higher than the number of input tokens"),
    ],
)
def test_start_len_is_checked_only_for_those_who_opted_in(start: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take(input_ids=[1, 2, 3], return_routed_experts=True, routed_experts_start_len=start)
    take(input_ids=[1, 2, 3], routed_experts_start_len=start)
    assert take_one(input_ids=[1, 2, 3], return_routed_experts=True, routed_experts_start_len=3)


def test_opting_in_without_routing_names_the_flag() -> None:
    limits = EngineLimits(20, 16, 100, 1, True, routed_experts=False)
    with pytest.raises(ValueError, match="--enable-return-routed-experts"):
        take(limits, input_ids=[1], return_routed_experts=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "return_router_weights: needs return_routed_experts=true"),
        (
            {"return_routed_experts": True, "routed_experts_delivery": "reference"},
            "return_router_weights: needs routed_experts_delivery='inline'",
        ),
    ],
)
def test_combine_weights_stand_beside_rows_that_come_with_the_answer(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take(input_ids=[1], return_router_weights=True, **fields)
    asked = {"return_routed_experts": True, "return_router_weights": [True, False]}
    wanted = [group[0].output_options.return_router_weights for group in take(input_ids=[[1], [2]], **asked)]
    assert wanted == [True, False]
    with pytest.raises(ValueError, match="--enable-return-router-weights"):
        take(replace(LIMITS, router_weights=False), input_ids=[1], **{**asked, "return_router_weights": True})


def test_one_bad_item_refuses_the_list_with_its_index() -> None:
    with pytest.raises(ValueError, match="item 1: routed_experts_start_len=9 is higher"):
        take(input_ids=[[1], [2]], return_routed_experts=True, routed_experts_start_len=[0, 9])


def test_lists_give_each_item_its_own() -> None:
    groups = take(
        text=["ab", "c"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2}],
        return_routed_experts=[True, False],
        routed_experts_start_len=[2, 0],
        rid=["x", "y"],
    )
    assert [[sample.rid for sample in group] for group in groups] == [["x"], ["y_0", "y_1"]]
    assert [group[0].sampling_params.max_new_tokens for group in groups] == [1, 2]
    assert [group[0].output_options.return_routed_experts for group in groups] == [True, False]
    assert groups[0][0].output_options.routed_experts_start_len == 2
    # Samples of one prompt differ by seed.
    first, second = groups[1]
    assert first.sampling_params.sampling_seed != second.sampling_params.sampling_seed


def test_the_default_length_is_cut_to_what_fits() -> None:
    assert take_one(input_ids=[1] * 10).sampling_params.max_new_tokens == 7
    assert take_one(input_ids=[1] * 16).sampling_params.max_new_tokens == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
NAMES = ["text", "input_ids", "sampling_params", "rid", "return_routed_experts", "routed_experts_start_len", "stream"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=4))
def test_whatever_arrives_is_taken_or_refused_with_a_value_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        take(**{name or "_": value for name, value in fields.items() if name != "limits"})


def test_older_names_of_the_dialect_mean_the_new_ones() -> None:
    request = parse_generate_request({"input_ids": [1], "data_parallel_rank": 1, "routing_key": "k"})
    assert (request.dp_rank, request.affinity) == (1, "k")
    both = parse_generate_request({"input_ids": [1], "data_parallel_rank": 0, "routed_dp_rank": 0, "session_id": "s"})
    assert (both.dp_rank, both.affinity) == (0, "s")
    for fields, words in (
        ({"data_parallel_rank": 1, "routed_dp_rank": 0}, "data_parallel_rank: must be that of routed_dp_rank"),
        ({"routing_key": "a", "session_id": "b"}, "routing_key: must be that of session_id"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_generate_request({"input_ids": [1], **fields})


def test_no_two_pairs_of_salt_and_key_are_one_partition() -> None:
    pairs = [(None, None), (None, "ab"), ("a", "b"), ("ab", None), ("a", None), ("b", "a")]
    partitions = {
        parse_generate_request({"input_ids": [1], "cache_salt": salt, "extra_key": key}).cache_partition
        for salt, key in pairs
    }
    assert len(partitions) == len(pairs)


def test_rows_begin_where_the_session_has_them_and_never_behind_the_last_token_of_the_prompt() -> None:
    asked = {**AUTO, "input_ids": [1, 2, 3, 4, 5], "session_id": "s"}
    for num_delivered, start in ((0, 0), (3, 3), (4, 4), (5, 4)):
        sample = take(num_delivered=num_delivered, **asked)[0][0]
        assert (sample.output_options.routed_experts_start_len, sample.is_auto) == (start, True)
    explicit = take(num_delivered=3, **{**asked, "routed_experts_start_len": 1})[0][0]
    assert (explicit.output_options.routed_experts_start_len, explicit.is_auto) == (1, False)
    unasked = take(num_delivered=3, **{**asked, "return_routed_experts": False, "session_id": None})[0][0]
    assert (unasked.output_options.routed_experts_start_len, unasked.is_auto) == (0, False)


def test_choices_share_the_rows_of_their_prompt() -> None:
    asked = {**AUTO, "input_ids": [1, 2, 3, 4, 5], "routing_key": "s", "sampling_params": {"n": 3, "max_new_tokens": 2}}
    first, *others = take(num_delivered=2, **asked)[0]
    assert (first.output_options.routed_experts_start_len, first.shared_prefix) == (2, None)
    for other in others:
        assert (other.output_options.routed_experts_start_len, other.shared_prefix) == (4, SharedPrefix(0, 2, 4))


def test_items_of_a_batch_may_leave_their_starts_to_the_session_one_by_one() -> None:
    asked = {**AUTO, "input_ids": [[1, 2, 3], [4, 5, 6]], "routed_experts_start_len": ["auto", 1], "session_id": "s"}
    starts = [group[0].output_options.routed_experts_start_len for group in take(num_delivered=2, **asked)]
    assert starts == [2, 1]


def test_a_grammar_is_made_once_for_all_prompts_that_share_it_and_not_on_the_event_loop() -> None:
    params = {"json_schema": {"type": "object"}}
    request = parse_generate_request({"input_ids": [[1], [2]], "sampling_params": params})
    assert request.cost_us > MAX_INLINE_US, "an object has any length"
    first, second = (group[0].sampling_params.grammar for group in take(input_ids=[[1], [2]], sampling_params=params))
    assert first and first is second
    long = parse_generate_request({"input_ids": [1], "sampling_params": {"ebnf": "root ::= " + "a " * 100_000}})
    assert long.cost_us > MAX_SHORT_US, "must not hold up short work"
