"""Where a server's API keys come from: a file, or the environment. Other users can read a command line, but not these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

API_KEY_VARIABLE = "WAYBILL_API_KEY"
FLAG = "--api-key"
FILE_FLAG = "--api-key-file"


def split_key(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """A command line without its `--api-key`, and the key.

    Raises:
        ValueError: it is empty, given twice, or together with a file.
    """
    rest: list[str] = []
    keys: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == FLAG:
            keys.append(next(arguments, ""))
        elif argument.startswith(f"{FLAG}="):
            keys.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if not keys:
        return rest, None
    if len(keys) > 1 or not keys[0].strip():
        raise ValueError(f"{FLAG}: must be one key that is not empty")
    if any(argument.partition("=")[0] == FILE_FLAG for argument in rest):
        raise ValueError(f"{FLAG}, {FILE_FLAG}: give one of them")
    return rest, keys[0]


def read_api_keys(file: str | None) -> tuple[str, ...]:
    """The keys of `file`, one a line, any of which opens the server, or that of the environment.

    Raises:
        ValueError: the file cannot be read or holds none.
    """
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if file is None:
        return (key,) if key else ()
    if key:
        raise ValueError(f"{API_KEY_VARIABLE}, {FILE_FLAG}: give one of them")
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "must be UTF-8"
        raise ValueError(f"{FILE_FLAG} {file}: {reason}") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError(f"{FILE_FLAG} {file}: must hold a key, one a line")
    return keys
