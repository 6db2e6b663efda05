"""What the contract promises about routed experts, on two tensor-parallel ranks and the embedded model."""

from __future__ import annotations

import base64
import concurrent.futures
import threading
from typing import Any

import numpy as np
import pytest
from support.engine_answers import GREEDY, NUM_EXPERTS, NUM_LAYERS, NUM_MOE_LAYERS, TOP_K, ask, ids, rows_of

from waybill import Engine
from waybill.engine.routing.wire import checksum, stitch
from waybill.parallel.cpu_ops.attention import has_native_attention


def test_rows_are_whole_and_well_formed(engine: Engine) -> None:
    prompt = ids("a prompt of its own")
    answer = ask(engine, prompt)
    rows, meta = rows_of(answer), answer["meta_info"]["routed_experts_meta"]
    assert rows.dtype == np.uint8
    assert rows.shape == (len(prompt) + 6 - 1, NUM_MOE_LAYERS, TOP_K)
    assert rows.max() < NUM_EXPERTS
    assert (np.diff(np.sort(rows, axis=-1), axis=-1) > 0).all(), "the experts of a row are distinct"
    assert meta["start"] == 0
    assert meta["rows"] == len(rows)
    assert meta["layer_ids"] == [1, 2, 3, 4, 5, 6]
    assert meta["weight_versions"] == [["default", 0, len(rows)]] or meta["weight_versions"] == [
        ("default", 0, len(rows))
    ]
    assert meta["checksum"] == checksum(rows.tobytes())


def test_default_is_zero_and_a_slice_is_the_tail(engine: Engine) -> None:
    prompt = ids("slices of one history, all alike")
    full = rows_of(ask(engine, prompt))
    assert rows_of(ask(engine, prompt, routed_experts_start_len=0)).tobytes() == full.tobytes()
    for start in (1, 7, len(prompt) - 1, len(prompt)):
        answer = ask(engine, prompt, routed_experts_start_len=start)
        assert rows_of(answer).tobytes() == full[start:].tobytes()
        assert answer["meta_info"]["routed_experts_start_len"] == start
    assert len(rows_of(ask(engine, prompt, routed_experts_start_len=len(prompt)))) == 6 - 1


def test_zero_rows_are_an_answer(engine: Engine) -> None:
    prompt = ids("x")
    answer = engine.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 1}, return_routed_experts=True, routed_experts_start_len=1
    )
    assert rows_of(answer).shape == (0, NUM_MOE_LAYERS, TOP_K)
    text = engine.generate(
        input_ids=prompt,
        sampling_params={"max_new_tokens": 0},
        return_routed_experts=True,
        routed_experts_format="int32",
    )
    assert text["meta_info"]["routed_experts"] == ""


def test_prefill_only_has_every_row_in_compact_form_and_all_but_the_last_in_the_field_s(engine: Engine) -> None:
    prompt = ids("prefill only, no token")
    only = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}, "return_routed_experts": True}
    answer = engine.generate(**only)
    assert answer["output_ids"] == []
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    rows = rows_of(answer)
    assert len(rows) == answer["meta_info"]["routed_experts_meta"]["rows"] == len(prompt)
    # The last row is that of the token as an input: what an answer of one token more has there.
    longer = engine.generate(input_ids=[*prompt, 1], sampling_params={"max_new_tokens": 1}, return_routed_experts=True)
    assert rows_of(longer)[:-1].tobytes() == rows.tobytes()
    for start in (3, len(prompt) - 1, len(prompt)):
        (tail,) = engine.generate(**only, routed_experts_start_len=start, stream=True, stream_routed_experts=True)
        assert rows_of(tail).tobytes() == rows[start:].tobytes()
        assert tail["meta_info"]["routed_experts_start_len"] == start
        claim = engine.generate(**only, routed_experts_start_len=start, routed_experts_delivery="reference")
        fetched = engine.fetch_routed_experts(claim["meta_info"]["routed_experts_claim"])
        assert fetched.rows.tobytes() == rows[start:].tobytes()
    meta = engine.generate(**only, routed_experts_format="int32")["meta_info"]
    assert meta["routed_experts_meta"]["rows"] == len(prompt) - 1
    wide = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4")
    assert np.array_equal(wide.reshape(len(prompt) - 1, NUM_LAYERS, TOP_K)[:, 1:], rows[:-1])


@pytest.mark.parametrize("form", ["int32", "compact"])
def test_aborted_before_the_first_token(engine: Engine, form: str) -> None:
    """Paused before it was admitted: no key in the field's form, no rows in the compact one."""
    engine.pause_generation("in_place")
    stream = engine.generate(
        input_ids=ids("never begun"),
        sampling_params=GREEDY,
        stream=True,
        rid="queued",
        return_routed_experts=True,
        routed_experts_format=form,
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(lambda: list(stream)[-1])
        for _ in range(1000):
            if engine.get_server_info()["num_waiting"]:
                break
        engine.abort_request("queued")
        meta = last.result(60)["meta_info"]
    engine.continue_generation()
    assert meta["finish_reason"]["type"] == "abort" and meta["completion_tokens"] == 0
    if form == "int32":
        assert not [key for key in meta if key.startswith("routed_experts")]
    else:
        assert meta["routed_experts"].shape == (0, NUM_MOE_LAYERS, TOP_K)
        assert meta["routed_experts_meta"]["rows"] == 0


@pytest.mark.parametrize(
    ("offset", "words"), [(1, "is higher than the number of input tokens"), (None, "is lower than 0")]
)
def test_start_out_of_range_is_refused_before_any_prefill(engine: Engine, offset: int | None, words: str) -> None:
    prompt = ids("refused at the edge")
    start = -1 if offset is None else len(prompt) + offset
    neighbour: list[Any] = []
    thread = threading.Thread(target=lambda: neighbour.append(ask(engine, ids("a neighbour in flight"))))
    steps_before = engine.get_server_info()["num_finished"]
    thread.start()
    with pytest.raises(ValueError, match=f"routed_experts_start_len={start} {words}"):
        ask(engine, prompt, routed_experts_start_len=start)
    thread.join()
    assert len(rows_of(neighbour[0])) == len(ids("a neighbour in flight")) + 5
    assert engine.get_server_info()["num_finished"] == steps_before + 1


def test_start_is_not_checked_without_opting_in(engine: Engine) -> None:
    answer = engine.generate(input_ids=ids("plain"), sampling_params=GREEDY, routed_experts_start_len=10_000)
    assert "routed_experts" not in answer["meta_info"]


def test_values_after_a_cache_hit_beyond_the_start(engine: Engine) -> None:
    prompt = ids("the same words, asked for twice in a row")
    first = ask(engine, prompt)
    second = ask(engine, prompt, routed_experts_start_len=5)
    assert second["meta_info"]["cached_tokens"] > 5
    assert rows_of(second)[: len(prompt) - 6].tobytes() == rows_of(first)[5 : len(prompt) - 1].tobytes()


def test_plain_requests_are_filed_but_never_sliced(engine: Engine) -> None:
    prompt = ids("a plain request goes first, and its pages are hit later")
    before = engine.get_server_info()
    engine.generate(input_ids=prompt, sampling_params=GREEDY)
    after = engine.get_server_info()
    assert after["routed_experts_slices"] == before["routed_experts_slices"]
    assert after["routed_experts_rows_shipped"] == before["routed_experts_rows_shipped"]
    assert after["routed_experts_rows_filed"] > before["routed_experts_rows_filed"]
    hit = ask(engine, prompt)
    assert hit["meta_info"]["cached_tokens"] >= len(prompt) - 1
    engine.flush_cache()
    fresh = ask(engine, prompt)
    assert fresh["meta_info"]["cached_tokens"] == 0
    # Two forwards of the same tokens may round differently in bfloat16; the float32 suite compares every row.
    assert (rows_of(hit)[: len(prompt) - 1] == rows_of(fresh)[: len(prompt) - 1]).mean() > 0.5
    assert len(rows_of(hit)) == len(rows_of(fresh))


def test_mixed_batch_keeps_every_item_apart(engine: Engine) -> None:
    prompts = [ids("one"), ids("two is longer"), ids("three")]
    answers = engine.generate(
        input_ids=prompts,
        sampling_params=GREEDY,
        return_routed_experts=[True, False, True],
        routed_experts_start_len=[1, 0, 3],
    )
    assert rows_of(answers[0]).shape[0] == len(prompts[0]) + 5 - 1
    assert "routed_experts" not in answers[1]["meta_info"]
    assert rows_of(answers[2]).shape[0] == len(prompts[2]) + 5 - 3


def test_one_bad_item_refuses_the_list_with_its_index(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"item 1: routed_experts_start_len=9 is higher"):
        engine.generate(
            input_ids=[ids("good"), ids("bad")],
            sampling_params=GREEDY,
            return_routed_experts=True,
            routed_experts_start_len=[0, 9],
        )


@pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler")
def test_in_bfloat16_a_request_has_the_same_bits_alone_and_in_any_batch(engine: Engine) -> None:
    """Tokens, log-probabilities and routes. Prompts differ from the first token on, so that nobody hits another's pages."""
    prompts = [ids(f"{chr(97 + i)} is how number {i} begins" + " and goes on" * (i % 4)) for i in range(12)]
    params = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    alone = []
    for prompt in prompts:
        engine.flush_cache()
        alone += engine.generate(
            input_ids=[prompt], sampling_params=params, return_routed_experts=True, return_logprob=True
        )
    for size in (2, 5, 12):
        engine.flush_cache()
        together = engine.generate(
            input_ids=prompts[:size], sampling_params=params, return_routed_experts=True, return_logprob=True
        )
        for one, other in zip(alone[:size], together, strict=True):
            assert one["output_ids"] == other["output_ids"]
            assert one["meta_info"]["output_token_logprobs"] == other["meta_info"]["output_token_logprobs"]
            assert rows_of(one).tobytes() == rows_of(other).tobytes()


@pytest.mark.skipif(not has_native_attention(), reason="needs AVX2 and a C++ compiler")
def test_in_bfloat16_one_rank_gives_the_same_bits_as_two(engine: Engine, checkpoint: str) -> None:
    """Tokens, log-probabilities and routes; greedy and sampled."""
    prompts = [ids(f"{chr(97 + i)} prompt of some words" + " and more" * i) for i in range(6)]
    with Engine(checkpoint, tp_size=1, enable_return_routed_experts=True, kv_cache_tokens=4096) as single:
        for temperature in (0.0, 1.0):
            params = {"temperature": temperature, "max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 5}
            answers = []
            for each in (single, engine):
                each.flush_cache()
                answers.append(
                    each.generate(
                        input_ids=prompts, sampling_params=params, return_routed_experts=True, return_logprob=True
                    )
                )
            for one, other in zip(*answers, strict=True):
                assert one["output_ids"] == other["output_ids"]
                assert rows_of(one).tobytes() == rows_of(other).tobytes()
                assert one["meta_info"]["output_token_logprobs"] == other["meta_info"]["output_token_logprobs"]


def test_samples_of_one_prompt_share_its_rows(engine: Engine) -> None:
    prompt = ids("three samples of one prompt")
    answers = engine.generate(
        input_ids=prompt,
        sampling_params={"n": 3, "temperature": 1.0, "max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 3},
        return_routed_experts=True,
    )
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1
    shared = [rows_of(answer)[: len(prompt) - 1].tobytes() for answer in answers]
    assert shared[0] == shared[1] == shared[2]
    again = engine.generate(
        input_ids=prompt,
        sampling_params={"n": 3, "temperature": 1.0, "max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 3},
    )
    assert [a["output_ids"] for a in again] == [a["output_ids"] for a in answers]


def test_deltas_of_all_turns_stitch_to_the_full_answer(engine: Engine) -> None:
    tokens: list[int] = []
    routes: np.ndarray | None = None
    for turn in range(5):
        prompt = tokens + ids(f" turn {turn} says something new.")
        start = max(0, len(tokens) - 1)
        answer = ask(engine, prompt, routed_experts_start_len=start)
        delta = rows_of(answer)
        routes = delta if routes is None else stitch(routes, start, delta)
        tokens = prompt + answer["output_ids"]
        assert len(routes) == len(tokens) - 1
    full = engine.generate(input_ids=tokens, sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    assert full["meta_info"]["cached_tokens"] == len(tokens) - 1
    assert routes is not None
    assert rows_of(full)[:-1].tobytes() == routes.tobytes()


def test_rows_of_a_session_begin_where_its_caller_has_them(engine: Engine) -> None:
    """A stream counts when its reader has come to its end, and one that was left does not."""
    asked: dict[str, Any] = {
        "session_id": "in a program",
        "return_routed_experts": True,
        "routed_experts_start_len": "auto",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
    }

    def start_of(answer: Any) -> int:
        return answer["meta_info"]["routed_experts_start_len"]

    prompt = list(b"a session of a program")
    for _ in engine.generate(input_ids=prompt, stream=True, **asked):
        break
    whole = engine.generate(input_ids=prompt, **asked)
    assert start_of(whole) == 0
    tokens = prompt + whole["output_ids"]
    *_, last = engine.generate(input_ids=[*tokens, 65, 66], stream=True, **asked)
    assert start_of(last) == len(tokens) - 1
    tokens += [65, 66, *last["output_ids"]]
    new = engine.generate(input_ids=[*tokens, 67], **asked)
    assert start_of(new) == len(tokens) - 1
    parts = [answer["meta_info"]["routed_experts"] for answer in (whole, last, new)]
    stated = {**asked, "routed_experts_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
    full = engine.generate(input_ids=[*tokens, 67, *new["output_ids"][:-1]], **stated)
    assert full["meta_info"]["routed_experts"].tobytes() == np.concatenate(parts).tobytes()


def test_int32_form_is_the_field_s(engine: Engine) -> None:
    prompt = ids("the dialect's own form")
    compact = rows_of(ask(engine, prompt))
    answer = ask(engine, prompt, routed_experts_format="int32")
    wide = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), dtype="<i4")
    wide = wide.reshape(len(prompt) + 6 - 1, NUM_LAYERS, TOP_K)
    assert (wide[:, 0] == 0).all()
    assert (wide[: len(prompt) - 1, 1:] == compact[: len(prompt) - 1]).all()
    assert answer["meta_info"]["routed_experts_dtype"] == "int32"


def test_reference_delivery_leaves_a_claim(engine: Engine) -> None:
    prompt = ids("rows by reference")
    inline = ask(engine, prompt)
    meta = ask(engine, prompt, routed_experts_delivery="reference")["meta_info"]
    assert "routed_experts" not in meta
    for _ in range(2):
        fetched = engine.fetch_routed_experts(meta["routed_experts_claim"])
        assert fetched.rows[: len(prompt) - 1].tobytes() == rows_of(inline)[: len(prompt) - 1].tobytes()
        assert fetched.meta.checksum == meta["routed_experts_meta"]["checksum"]
    with pytest.raises(ValueError, match="unknown"):
        engine.fetch_routed_experts("no such claim")


def test_without_routing_opting_in_is_refused_with_the_hint(checkpoint: str) -> None:
    with Engine(checkpoint, tp_size=1, kv_cache_tokens=1024) as plain:
        with pytest.raises(ValueError, match="--enable-return-routed-experts"):
            ask(plain, ids("no routing here"))
        assert "routed_experts" not in plain.generate(input_ids=ids("x"), sampling_params=GREEDY)["meta_info"]
