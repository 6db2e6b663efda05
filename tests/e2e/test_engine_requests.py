"""What a program does with an engine, routes or not: streams, stop strings, aborts, other event loops, flushes."""

from __future__ import annotations

import asyncio

from support.engine_answers import DIALOGUE, ask, at_rest, ids, rows_of

from waybill import Engine


def test_stream_ends_with_what_the_plain_answer_has(engine: Engine) -> None:
    plain = engine.generate(DIALOGUE, {"temperature": 0.0, "max_new_tokens": 8}, return_logprob=True)
    chunks = list(
        engine.generate(DIALOGUE, {"temperature": 0.0, "max_new_tokens": 8}, stream=True, return_routed_experts=True)
    )
    assert plain["text"] == "42"
    assert [chunk["text"] for chunk in chunks][-1] == plain["text"]
    assert chunks[-1]["output_ids"] == plain["output_ids"]
    assert len(chunks) == len(plain["output_ids"])
    assert len(rows_of(chunks[-1])) == chunks[-1]["meta_info"]["prompt_tokens"] + len(plain["output_ids"]) - 1


def test_stop_string_and_logprobs(engine: Engine) -> None:
    answer = engine.generate(
        DIALOGUE, {"temperature": 0.0, "stop": ["2"]}, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
    )
    meta = answer["meta_info"]
    assert answer["text"] == "4"
    assert meta["finish_reason"] == {"type": "stop", "matched": "2"}
    assert len(meta["output_token_logprobs"]) == len(answer["output_ids"]) == 2
    assert meta["input_token_logprobs"][0][0] is None
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert all(len(pairs) == 2 for pairs in meta["output_top_logprobs"])
    kept = engine.generate(DIALOGUE, {"temperature": 0.0, "stop": ["2"], "no_stop_trim": True})
    assert kept["text"] == "42"


def test_abort_returns_the_rows_there_are(engine: Engine) -> None:
    prompt = ids("to be aborted while it runs")
    stream = engine.generate(
        input_ids=prompt,
        sampling_params={"max_new_tokens": 2000, "ignore_eos": True},
        stream=True,
        rid="victim-1",
        return_routed_experts=True,
    )
    assert next(stream)["meta_info"]["finish_reason"] is None
    engine.abort_request("victim")
    last = list(stream)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(rows_of(last)) == len(prompt) + len(last["output_ids"]) - 1
    at_rest(engine)


def test_leaving_a_stream_aborts_the_request(engine: Engine) -> None:
    stream = engine.generate(
        input_ids=ids("left alone"), sampling_params={"max_new_tokens": 4000, "ignore_eos": True}, stream=True
    )
    next(stream)
    stream.close()
    at_rest(engine)


def test_async_generate_from_another_loop(engine: Engine) -> None:
    async def run() -> tuple[list[str], str]:
        answers = await asyncio.gather(*(engine.async_generate(DIALOGUE, {"temperature": 0.0}) for _ in range(3)))
        stream = await engine.async_generate(DIALOGUE, {"temperature": 0.0}, stream=True)
        async for chunk in stream:
            last = chunk
        return [answer["text"] for answer in answers], last["text"]

    assert asyncio.run(run()) == (["42", "42", "42"], "42")


def test_flush_empties_the_cache(engine: Engine) -> None:
    prompt = ids("cached and then not")
    ask(engine, prompt)
    assert ask(engine, prompt)["meta_info"]["cached_tokens"] == len(prompt) - 1
    engine.flush_cache()
    assert ask(engine, prompt)["meta_info"]["cached_tokens"] == 0
    info = at_rest(engine)
    assert info["num_free_pages"] + info["num_cached_pages"] == info["num_pages"]
