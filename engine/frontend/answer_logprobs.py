"""The log-probabilities of a caller's answer as it grows, and their rendering in the API's form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..io_struct import Logprobs, OutputOptions

# Log-probability, token id and, where it is asked for, the token as text.
LogprobTriple = tuple[float | None, int, str | None]
TokenText = Callable[[int], str]


class AnswerLogprobs:
    """Collects those of one sample. Triples are made once: a stream renders all that came so far with every event."""

    def __init__(self, options: OutputOptions, token_text: TokenText | None) -> None:
        self._options = options
        self._token_text = token_text if options.return_text_in_logprobs else None
        self._output: list[LogprobTriple] = []
        self._output_top: list[list[LogprobTriple]] = []
        self._input: list[LogprobTriple] = []
        self._input_top: list[list[LogprobTriple] | None] = []

    def add(self, new: Logprobs, token_ids: Sequence[int]) -> None:
        """`token_ids` are those that the outputs of `new` belong to."""
        self._output += self._triples(zip(new.output, token_ids, strict=True))
        self._output_top += [self._triples(pairs) for pairs in new.output_top]
        self._input += self._triples(new.input)
        self._input_top += [None if pairs is None else self._triples(pairs) for pairs in new.input_top]

    def render(self) -> dict[str, Any]:
        """All of them so far, as far as they were asked for."""
        fields: dict[str, Any] = {"output_token_logprobs": list(self._output)}
        if self._options.returns_prompt_logprobs:
            fields["input_token_logprobs"] = list(self._input)
        if self._options.top_logprobs_num:
            fields["output_top_logprobs"] = list(self._output_top)
            if self._options.returns_prompt_logprobs:
                fields["input_top_logprobs"] = list(self._input_top)
        return fields

    def _triples(self, pairs: Iterable[tuple[float | None, int]]) -> list[LogprobTriple]:
        text = self._token_text
        return [(value, token, None if text is None else text(token)) for value, token in pairs]
