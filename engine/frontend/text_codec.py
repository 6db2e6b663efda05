"""Text to token ids and back, for the frontend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from ..text.token_decoder import TextStream, TokenDecoder
from ..text.tokenizer_file import NO_TOKENIZER
from ..validation.field_error import FieldError
from ..validation.request_model import has_surrogate
from ..validation.token_ids import Ids
from .special_text import SpecialTokens
from .text_bound import text_bound

logger = logging.getLogger(__name__)

# `Tokenizer.encode` holds the interpreter's lock from end to end, and so keeps every thread waiting; batches do not, and
# without offsets they are several times faster, but need threads of a pool that others may have taken.
MAX_HELD_CHARS = 2_000
DECODE_COST_US = 2.0


class TextCodec:
    """A checkpoint's tokenizer, or the lack of one, and what to say of that. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer | None, why_none: str = NO_TOKENIZER) -> None:
        if tokenizer is None:
            logger.warning("%s; requests take token ids only", why_none)
        self._why_none = why_none
        self._tokenizer = tokenizer
        self._bound = None if tokenizer is None else text_bound(tokenizer)
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        # Once: a tokenizer may have thousands of them.
        self.special_tokens = frozenset(token.content for token in added.values() if token.special)

    def token_id(self, token: str) -> int | None:
        """Of a token as the tokenizer writes it."""
        return None if self._tokenizer is None else self._tokenizer.token_to_id(token)

    @property
    def is_there(self) -> bool:
        return self._tokenizer is not None

    @cached_property
    def splitting(self) -> SpecialTokens:
        """What tells special tokens from their text; made when it is asked for.

        Raises:
            ValueError: there is no tokenizer.
        """
        return SpecialTokens(self._there())

    def _there(self) -> Tokenizer:
        if self._tokenizer is None:
            raise FieldError(f"text: {self._why_none}; token ids need none", "text")
        return self._tokenizer

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        split_special_tokens: bool = False,
        masked: str | None = None,
    ) -> list[int]:
        """With `split_special_tokens` those in the text are text, or those alone that are hidden in `masked`.

        Raises:
            ValueError: there is no tokenizer, UTF-8 cannot encode the text, or it has more than `max_tokens`. Where its
                length alone says so it is not tokenised.
        """
        tokenizer = self._there()
        if max_tokens is not None and self._bound is not None and self._bound.min_tokens(text) > max_tokens:
            raise FieldError(
                f"the prompt has {len(text)} characters, so at least {self._bound.min_tokens(text)} tokens: must have at "
                f"most {max_tokens}",
                "text",
            )
        if has_surrogate(text):
            raise FieldError("text: must be text that UTF-8 can encode", "text")
        if split_special_tokens and masked is None:
            masked = self.splitting.mask(text).hide(text)
        if masked is not None and masked != text:
            ids = self.splitting.encode(text, masked, add_special_tokens=add_special_tokens)
        elif len(text) <= MAX_HELD_CHARS:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids = encoding.ids
        if max_tokens is not None and len(ids) > max_tokens:
            raise FieldError(f"the prompt has {len(ids)} tokens: must have at most {max_tokens}", "text")
        return ids

    def decode(self, token_ids: Sequence[int] | Ids, *, skip_special_tokens: bool) -> str:
        """Ids of the model's vocabulary; those that the tokenizer does not have are no text.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self._decoder is None:
            raise FieldError(f"tokens: {self._why_none}", "tokens")
        stream = TextStream(self._decoder, skip_special_tokens=skip_special_tokens)
        return stream.push(list(map(int, token_ids))) + stream.close()

    def offsets(self, *, skip_special_tokens: bool, start: int = 0) -> TextOffsets:
        """Positions of tokens in a text that begins at character `start`."""
        stream = None
        if self._decoder is not None:
            stream = TextStream(self._decoder, skip_special_tokens=skip_special_tokens)
        return TextOffsets(stream, start)

    def token_bytes(self, token_id: int) -> bytes | None:
        """One token as bytes, see `TokenDecoder.token_bytes`; None where it has no text, and without a tokenizer."""
        return None if self._decoder is None else self._decoder.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as text, as it stands in the middle of a text; bytes that are no characters are U+FFFD. "" for an id
        that the tokenizer does not have, and without a tokenizer."""
        return (self.token_bytes(token_id) or b"").decode("utf-8", "replace")


class TextOffsets:
    """Where the text of each token of one text begins, in characters; never less than for the token before.

    A token that is part of a character begins where the character does, one that is no text where the next one does.
    """

    def __init__(self, stream: TextStream | None, start: int) -> None:
        self._stream = stream
        self._num_settled = start
        self._offset = start

    def next(self, token_id: int) -> int:
        """The offset of the text's next token."""
        if self._stream is None:
            return self._offset
        self._offset = max(self._offset, self._num_settled + len(self._stream.tail()))
        self._num_settled += len(self._stream.push([token_id]))
        return self._offset
