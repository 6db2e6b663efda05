"""A checkpoint's tokenizer as grammars see it: the bytes of every token, and the canonical way to write a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer


def load_token_trie(path: str, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> LLTokenizer:
    """Of a checkpoint folder's `tokenizer.json`; takes about a second for 150,000 tokens, and holds the interpreter.

    Args:
        vocab_size: tokens of the model, some of which the tokenizer may not have.
        eos_token_ids: what ends a text; the tokenizer's own guess if there are none.

    Raises:
        ValueError: there is none, or it is of a kind that the library cannot read.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise ValueError("the checkpoint has no tokenizer (tokenizer.json)")
    try:
        return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"the checkpoint's tokenizer cannot be used with grammars: {str(error)[:200]}") from None
