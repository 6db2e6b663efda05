"""What vLLM adds to a request and to its answer: log-probabilities of the prompt, words that may not be said, routes as a
numpy file."""

from __future__ import annotations

from typing import Any

from ...frontend.sampling_params import MAX_LOGIT_BIAS_VALUE
from ...frontend.text_codec import TextCodec
from ...validation.field_error import FieldError
from .logprobs import Answer, Triple
from .protocol import OpenAIRequest


def prompt_logprobs(answer: Answer, num_top: int) -> list[dict[str, Any] | None]:
    """For each token of the prompt those of the token itself and of the `num_top` best, by id; None for the first one."""
    meta = answer["meta_info"]
    tops: list[list[Triple] | None] = meta.get("input_top_logprobs", [])
    own_ranks: list[int | None] = meta["input_token_ranks"]
    entries: list[dict[str, Any] | None] = []
    for position, own in enumerate(meta["input_token_logprobs"]):
        if own[0] is None:
            entries.append(None)
            continue
        best = (tops[position] or [])[:num_top] if position < len(tops) else []
        ranks = {own[1]: own_ranks[position]} | {token: rank for rank, (_, token, _) in enumerate(best, 1)}
        entries.append(
            {
                str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": text}
                for value, token, text in (own, *best)
            }
        )
    return entries


def cut_tops(answer: Answer, num_top: int) -> None:
    """Keep the best that were asked for: the engine has made as many for the output as for the prompt."""
    meta = answer["meta_info"]
    for name in ("output_top_logprobs", "input_top_logprobs"):
        if not num_top:
            meta.pop(name, None)
        elif name in meta:
            meta[name] = [None if top is None else top[:num_top] for top in meta[name]]


def add_extras(
    body: OpenAIRequest, answer: Answer, num_top: int, choice: dict[str, Any], place: dict[str, Any]
) -> None:
    """What was asked for in vLLM's words: in the choice, and in `place` what is of its prompt."""
    if body.prompt_logprobs is not None:
        place["prompt_logprobs"] = prompt_logprobs(answer, body.prompt_logprobs)
        cut_tops(answer, num_top)
    if body.return_token_ids:
        choice["token_ids"] = answer["output_ids"]
    if body.routed_experts_prompt_start is not None:
        choice |= routes(answer)


def routes(answer: Answer) -> dict[str, Any]:
    """As vLLM has them: base64 of a numpy file, or null where there are none."""
    meta = answer["meta_info"]
    error = {"routed_experts_error": meta["routed_experts_error"]} if "routed_experts_error" in meta else {}
    return {"routed_experts": meta.get("routed_experts"), **error}


def ban(words: list[str], params: dict[str, Any], text: TextCodec) -> None:
    """`bad_words`, in the bias of `sampling_params`.

    Raises:
        ValueError: as `ban_words`.
    """
    params["logit_bias"] = {**params.get("logit_bias", {}), **ban_words(words, text)}


def ban_words(words: list[str], text: TextCodec) -> dict[int, float]:
    """A bias that leaves no chance to words of one token, in the middle of a text and at its beginning.

    Raises:
        ValueError: there is no tokenizer, or a word has more tokens.
    """
    banned: dict[int, float] = {}
    for index, word in enumerate(words):
        name = f"bad_words.{index}"
        if not word:
            raise FieldError(f"{name}: must not be empty", name)
        try:
            ways = [text.encode(form, add_special_tokens=False) for form in (word, " " + word)]
        except FieldError as error:
            raise error.renamed({"text": name}) from None
        single = [ids[0] for ids in ways if len(ids) == 1]
        if not single:
            raise FieldError(f"{name}: has more than one token, must have one; see logit_bias", name)
        banned |= dict.fromkeys(single, -MAX_LOGIT_BIAS_VALUE)
    return banned
