"""Text to token ids and back, for the frontend."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from .sampling_input import has_surrogate


class TextCodec:
    """A checkpoint's tokenizer, or the lack of one."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}

    @property
    def is_there(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """
        Raises:
            ValueError: there is no tokenizer, or UTF-8 cannot encode the text.
        """
        if self._tokenizer is None:
            raise ValueError("text: the checkpoint has no tokenizer; give input_ids")
        if has_surrogate(text):
            raise ValueError("text: must be text that UTF-8 can encode")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Ids of the model's vocabulary; those that the tokenizer does not have are no text.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError("tokens: the checkpoint has no tokenizer")
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text; "" where the checkpoint has no tokenizer."""
        if self._tokenizer is None:
            return ""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text
