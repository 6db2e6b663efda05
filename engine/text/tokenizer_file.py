"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from .token_decoder import TokenDecoder


def load_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None where it has none, and then there is no text.

    Raises:
        ValueError: its `tokenizer.json` cannot be read.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # The library has no narrower class.
        raise ValueError(f"{file}: no tokenizer can be made of it: {error}") from error


def load_token_decoder(path: str) -> TokenDecoder | None:
    """The way back to text of that tokenizer, if there is one.

    Raises:
        ValueError: its `tokenizer.json` cannot be read.
    """
    tokenizer = load_tokenizer(path)
    return None if tokenizer is None else TokenDecoder(tokenizer)
