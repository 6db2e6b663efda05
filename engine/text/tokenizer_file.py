"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from .token_decoder import TokenDecoder

NO_TOKENIZER = "the checkpoint has no tokenizer"
NEEDS_CODE = (
    "the checkpoint's tokenizer is code of its own (auto_map in tokenizer_config.json), which is never run; a folder with "
    "a tokenizer.json of the same vocabulary works, as tokenizer_path"
)
# The class that `transformers` would load.
AUTO_TOKENIZER = "AutoTokenizer"


class TokenizerSettings(msgspec.Struct):
    """`tokenizer_config.json`, as far as it is read."""

    auto_map: dict[str, msgspec.Raw] = {}


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


def why_no_tokenizer(path: str) -> str:
    """What to tell those who send text, of a folder without `tokenizer.json`."""
    file = Path(path) / "tokenizer_config.json"
    if not file.is_file():
        return NO_TOKENIZER
    try:
        settings = msgspec.json.decode(file.read_bytes(), type=TokenizerSettings)
    except msgspec.DecodeError:
        return NO_TOKENIZER
    return NEEDS_CODE if AUTO_TOKENIZER in settings.auto_map else NO_TOKENIZER


def load_token_decoder(path: str) -> TokenDecoder | None:
    """The way back to text of that tokenizer, if there is one.

    Raises:
        ValueError: its `tokenizer.json` cannot be read.
    """
    tokenizer = load_tokenizer(path)
    return None if tokenizer is None else TokenDecoder(tokenizer)
