"""The log-probabilities of an output in the API's form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ..io_struct import Logprobs, OutputOptions

# Log-probability, token id and, where it is asked for, the token as text.
LogprobTriple = tuple[float | None, int, str | None]
TokenText = Callable[[int], str]

# Lists that grow with an answer, as they are named in its `meta_info`.
LOGPROB_FIELDS = (
    *("output_token_logprobs", "input_token_logprobs", "input_token_ranks"),
    *("output_top_logprobs", "input_top_logprobs"),
)


class AnswerLogprobs:
    """Renders those of one sample, as far as they were asked for; without `has_prompt` those of the prompt are empty lists,
    for another engine's answer has them."""

    def __init__(self, options: OutputOptions, token_text: TokenText | None, *, has_prompt: bool = True) -> None:
        self._options = options
        self._has_prompt = has_prompt
        self._token_text = token_text if options.return_text_in_logprobs else None

    def render(self, new: Logprobs, token_ids: Sequence[int]) -> dict[str, Any]:
        """`token_ids` are those that the outputs of `new` belong to. Those of the prompt are an empty list where they were
        not asked for, as the dialect has it."""
        if not self._has_prompt:
            new = msgspec.structs.replace(new, input=[], input_ranks=[], input_top=[])
        fields: dict[str, Any] = {
            "output_token_logprobs": self._triples(zip(new.output, token_ids, strict=True)),
            "input_token_logprobs": self._triples(new.input) if self._options.returns_prompt_logprobs else [],
        }
        if self._options.returns_prompt_logprobs:
            fields["input_token_ranks"] = list(new.input_ranks)
        if self._options.top_logprobs_num:
            fields["output_top_logprobs"] = [self._triples(pairs) for pairs in new.output_top]
            if self._options.returns_prompt_logprobs:
                fields["input_top_logprobs"] = [
                    None if pairs is None else self._triples(pairs) for pairs in new.input_top
                ]
        return fields

    def _triples(self, pairs: Iterable[tuple[float | None, int]]) -> list[LogprobTriple]:
        text = self._token_text
        return [(value, token, None if text is None else text(token)) for value, token in pairs]
