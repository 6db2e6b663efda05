"""Token ids to text, as they come: what one tokenizer knows of its tokens, and one text that grows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from .byte_stages import BYTE_TOKEN, ByteRuns, Bytes, make_to_bytes
from .decoder_stages import Stage, Whole, make_stages

logger = logging.getLogger(__name__)

# In front of a token whose text in the middle of a text is asked for.
CONTEXT = "a"


class TokenDecoder:
    """A tokenizer's way back to text; shared by all texts of a process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._makers = make_stages(None if decoder is None else json.loads(decoder.__getstate__()))
        stages = self.make_stages()
        if any(isinstance(stage, Whole) for stage in stages):
            logger.warning("%s: text comes at the end only, and stop strings are not found", decoder)
        self._is_byte_level = any(isinstance(stage, Bytes) for stage in stages)
        self._has_byte_tokens = any(isinstance(stage, ByteRuns) for stage in stages)
        self._to_bytes = make_to_bytes()
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._tokens: dict[int, str | None] = {}
        self._token_bytes: dict[int, bytes | None] = {}

    def make_stages(self) -> list[Stage]:
        return [make() for make in self._makers]

    def tokens(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> list[str]:
        """The tokens that are text: without those that the tokenizer does not have, and without special ones."""
        known = self._tokens
        found = []
        for token_id in token_ids:
            if token_id not in known:
                known[token_id] = self._tokenizer.id_to_token(token_id)
            token = known[token_id]
            if token is not None and not (skip_special_tokens and token in self._special):
                found.append(token)
        return found

    def token_bytes(self, token_id: int) -> bytes | None:
        """A token's own bytes: what it adds in the middle of a text, so with the space that a word begins with, and part of
        a character where it is one. None for an id that the tokenizer does not have."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = self._make_bytes(self._tokenizer.id_to_token(token_id))
        return self._token_bytes[token_id]

    def _make_bytes(self, token: str | None) -> bytes | None:
        if token is None:
            return None
        if self._is_byte_level:
            return self._to_bytes(token)
        byte = BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return join_all(self.make_stages(), [CONTEXT, token]).removeprefix(CONTEXT).encode()


class TextStream:
    """One text. The pieces that `push` and `close` return, joined, are what the tokenizer's `decode` makes of all ids."""

    def __init__(self, decoder: TokenDecoder, *, skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._stages = decoder.make_stages()

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that they settle, which no later token changes."""
        elements = self._decoder.tokens(token_ids, skip_special_tokens=self._skip_special_tokens)
        if not elements:
            return ""
        for stage in self._stages:
            elements = stage.push(elements)
        return "".join(elements)

    def tail(self) -> str:
        """What would follow if the text ended here, without a character whose bytes are not complete."""
        if not any(stage.holds for stage in self._stages):
            return ""
        return join_all([stage.fork() for stage in self._stages], [], incomplete=False)

    def close(self) -> str:
        """The rest, at the end."""
        return join_all(self._stages, [])


def join_all(stages: Sequence[Stage], elements: list[str], *, incomplete: bool = True) -> str:
    """Elements through stages, to the end."""
    for stage in stages:
        elements = stage.push(elements) + stage.close(incomplete=incomplete)
    return "".join(elements)
