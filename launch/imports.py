"""Imports of many modules at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """torch alone makes hundreds of thousands of objects, all of which stay: Python's collector, which would look through
    them again and again while they come, rests, and later collections leave them alone, too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
