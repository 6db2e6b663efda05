"""Log-probabilities in OpenAI's forms. The parts that a stream tells of a choice, joined, are what a whole answer has."""

from __future__ import annotations

from typing import Any

from ...frontend.text_codec import TextCodec, TextOffsets

Answer = dict[str, Any]
# [logprob, token id, text], of the native API.
Triple = tuple[float | None, int, str | None]


class CompletionLogprobs:
    """Those of one choice of `/v1/completions`: parallel lists, one entry a token.

    Offsets are characters of the choice's text before anything of it was cut off for a stop string, so that tokens whose
    text was cut off lie at its end or behind. With `echo` the prompt stands at the beginning of both.
    """

    def __init__(
        self, text: TextCodec, *, skip_special_tokens: bool, prompt_ids: list[int] | None, as_ids: bool = False
    ) -> None:
        self._text = text
        self._as_ids = as_ids
        self._prompt_offsets: TextOffsets | None = None
        start = 0
        if prompt_ids is not None:
            self._prompt_offsets = text.offsets(skip_special_tokens=False)
            start = len(text.decode(prompt_ids, skip_special_tokens=False)) if text.is_there else 0
        self._offsets = text.offsets(skip_special_tokens=skip_special_tokens, start=start)

    def take(self, answer: Answer) -> dict[str, Any]:
        """Those of a whole answer, or of a stream's next chunk."""
        meta = answer["meta_info"]
        triples: list[Triple] = meta["output_token_logprobs"]
        tops: list[list[Triple] | None] = meta.get("output_top_logprobs", [])
        offsets = [self._offsets.next(token) for _, token, _ in triples]
        if self._prompt_offsets is not None:
            prompt = meta.get("input_token_logprobs", [])
            offsets = [*(self._prompt_offsets.next(token) for _, token, _ in prompt), *offsets]
            triples = [*prompt, *triples]
            tops = [*meta.get("input_top_logprobs", []), *tops]
            self._prompt_offsets = None
        if self._as_ids:
            # As in vLLM the token itself is one of them, also where no others were asked for.
            padded = [*tops, *[[]] * (len(triples) - len(tops))]
            tops = [None if own[0] is None else [own, *(top or [])] for own, top in zip(triples, padded, strict=True)]
        return {
            "tokens": [self._name(token) for _, token, _ in triples],
            "token_logprobs": [logprob for logprob, _, _ in triples],
            "top_logprobs": [None if top is None else self._by_name(top) for top in tops] or None,
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """A token as text, or as OpenAI writes one that is no text by itself: `bytes:\\xe4`."""
        if self._as_ids:
            return f"token_id:{token_id}"
        own = self._text.token_bytes(token_id) or b""
        return own.decode() if is_text(own) else "bytes:" + escaped(own)

    def _by_name(self, top: list[Triple]) -> dict[str, float | None]:
        """The best of those that have the same text."""
        named: dict[str, float | None] = {}
        for logprob, token, _ in sorted(top, key=lambda triple: triple[0] or 0.0, reverse=True):
            named.setdefault(self._name(token), logprob)
        return named


def chat_logprobs(answer: Answer, text: TextCodec, *, as_ids: bool = False) -> dict[str, Any]:
    """Those of the output tokens of an answer or a chunk, as `/v1/chat/completions` has them."""
    meta = answer["meta_info"]
    tops = meta.get("output_top_logprobs", [])
    content = []
    for position, triple in enumerate(meta["output_token_logprobs"]):
        alternatives = tops[position] if position < len(tops) else []
        entry, *others = (_chat_entry(one, text, as_ids) for one in (triple, *alternatives))
        content.append(entry | {"top_logprobs": others})
    return {"content": content}


def _chat_entry(triple: Triple, text: TextCodec, as_ids: bool) -> dict[str, Any]:
    """`token` is text, with bytes that are part of a character as `\\xe4`; `bytes` are the token's own, if it has any."""
    logprob, token, _ = triple
    own = text.token_bytes(token)
    return {
        "token": f"token_id:{token}" if as_ids else escaped(own or b""),
        "logprob": logprob,
        "bytes": None if own is None else list(own),
    }


def is_text(data: bytes) -> bool:
    """Whether these are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def escaped(data: bytes) -> str:
    """Text, with what is no whole character as `\\xe4`."""
    return data.decode("utf-8", "backslashreplace")
