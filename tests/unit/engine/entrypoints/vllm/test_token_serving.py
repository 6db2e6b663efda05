"""Answers in vLLM's and TRL's forms, from answers in the native one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from waybill.engine.entrypoints.openai import extensions
from waybill.engine.entrypoints.vllm.token_protocol import TokenRequest
from waybill.engine.entrypoints.vllm.token_serving import logprobs_of
from waybill.engine.entrypoints.vllm.trl import TrlGenerateRequest, batch_answer
from waybill.engine.frontend.answer import GenerationError
from waybill.engine.frontend.text_codec import TextCodec
from waybill.engine.validation.field_error import FieldError
from waybill.engine.validation.request_model import validate

OUTPUT = [(-1.0, 3, "c"), (-0.1, 4, "d")]
TOPS = [[(-0.5, 5, "e"), (-1.0, 3, "c")], [(-0.1, 4, "d"), (-3.0, 5, "e")]]


def answer() -> dict[str, Any]:
    return {
        "output_ids": [3, 4],
        "meta_info": {
            "output_token_logprobs": list(OUTPUT),
            "output_top_logprobs": [list(top) for top in TOPS],
            "input_token_logprobs": [(None, 1, "a"), (-2.0, 2, "b")],
            "input_token_ranks": [None, 2],
            "input_top_logprobs": [None, [(-0.2, 7, "g"), (-2.0, 2, "b")]],
            "finish_reason": {"type": "length", "length": 2},
        },
    }


def test_the_sampled_token_stands_before_the_best() -> None:
    first, second = logprobs_of(answer(), 2)["content"]
    assert (first["token_id"], first["logprob"], first["rank"], first["token"]) == (3, -1.0, 2, "token_id:3")
    assert [one["token_id"] for one in first["top_logprobs"]] == [3, 5]
    assert [one["rank"] for one in second["top_logprobs"]] == [1, 2]
    assert logprobs_of(answer(), 0)["content"][0]["top_logprobs"] == []


def test_the_prompts_tokens_by_id() -> None:
    """As SkyRL's `convert_vllm_prompt_logprobs` and prime-rl's `prefill_logprobs` read them: the token itself first."""
    nothing, own = extensions.prompt_logprobs(answer(), 1)
    assert nothing is None and own is not None
    assert list(own) == ["2", "7"] and own["2"]["logprob"] == -2.0 and own["7"]["rank"] == 1
    assert own["2"]["rank"] == 2
    (_, alone) = extensions.prompt_logprobs(answer(), 0)
    assert alone == {"2": {"logprob": -2.0, "rank": 2, "decoded_token": "b"}}


def test_what_was_made_for_the_prompt_alone_is_cut() -> None:
    made = answer()
    extensions.cut_tops(made, 1)
    assert [len(top) for top in made["meta_info"]["output_top_logprobs"]] == [1, 1]
    extensions.cut_tops(made, 0)
    assert "output_top_logprobs" not in made["meta_info"]


def test_a_batch_as_trl_reads_it() -> None:
    prepared: Any = SimpleNamespace(samples=[SimpleNamespace(input_ids=np.array([1, 2]))] * 2)
    batch = batch_answer(prepared, [answer(), answer()], 2)
    assert batch["prompt_ids"] == [[1, 2]] and batch["completion_ids"] == [[3, 4], [3, 4]]
    assert batch["logprobs"][0] == [[-0.5, -1.0], [-0.1, -3.0]] and batch["logprob_token_ids"][1] == [[5, 3], [4, 5]]


def test_a_batch_with_a_sample_that_the_engine_failed_is_no_answer() -> None:
    """TRL's form has no place to say so, and what there is of the sample would be trained on."""
    failed = answer()
    failed["meta_info"]["finish_reason"] = {
        "type": "abort",
        "message": "its scores were no numbers",
        "status_code": 500,
    }
    prepared: Any = SimpleNamespace(samples=[SimpleNamespace(input_ids=np.array([1, 2]))] * 2)
    with pytest.raises(GenerationError, match="its scores were no numbers"):
        batch_answer(prepared, [answer(), failed], 2)


@pytest.mark.parametrize(
    ("kwargs", "native", "message"),
    [
        ({}, "sampling_params.max_new_tokens", "max_tokens: is odd"),
        ({"seed": 1}, "sampling_params.sampling_seed", "generation_kwargs.seed: is odd"),
        ({}, "sampling_params.temperature", "temperature: is odd"),
        ({}, "regex", "structured_outputs_regex: is odd"),
        ({}, "input_ids", "prompts: is odd"),
        ({"bad_words": ["a"]}, "bad_words.0", "generation_kwargs.bad_words.0: is odd"),
    ],
)
def test_a_refusal_has_the_names_of_trl(kwargs: dict[str, Any], native: str, message: str) -> None:
    body = validate(TrlGenerateRequest, {"prompts": ["x"], "generation_kwargs": kwargs})
    assert str(FieldError(f"{native}: is odd", native).renamed(body.names("prompts"))) == message


def test_what_trls_answer_has_no_place_for_is_refused() -> None:
    for name in ("prompt_logprobs", "routed_experts_prompt_start"):
        body = validate(TrlGenerateRequest, {"prompts": ["x"], "generation_kwargs": {name: 1}})
        with pytest.raises(ValueError, match=rf"^generation_kwargs\.{name}: "):
            body.params()


def test_a_refusal_has_the_names_of_the_token_endpoint() -> None:
    names = validate(TokenRequest, {"token_ids": [1]}).names()
    for native in ("sampling_params.top_k", "bad_words"):
        name = "sampling_params." + native.removeprefix("sampling_params.")
        assert FieldError(f"{native}: is odd", native).renamed(names).field == name


def test_generation_kwargs_override_and_are_refused_by_name() -> None:
    fields = {"prompts": ["x"], "temperature": 0.5, "generation_kwargs": {"temperature": 0.0, "seed": 3}}
    params = validate(TrlGenerateRequest, fields).params()
    assert params.temperature == 0.0 and params.native(4)["sampling_seed"] == 3
    with pytest.raises(ValueError, match=r"^generation_kwargs\.colour: is no field"):
        validate(TrlGenerateRequest, {"prompts": ["x"], "generation_kwargs": {"colour": 1}}).params()


def test_words_that_are_one_token_are_banned() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, " a": 1, "?": 2}, unk_token="?"))
    assert set(extensions.ban_words(["a"], TextCodec(tokenizer))) == {0, 1}
    with pytest.raises(ValueError, match=r"^bad_words\.0: "):
        extensions.ban_words(["a"], TextCodec(None))
    with pytest.raises(ValueError, match=r"^bad_words\.1: must not be empty"):
        extensions.ban_words(["a", ""], TextCodec(tokenizer))
