"""The folder of a run: sockets, FIFOs and configuration files; gone when the run is."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

ENGINE_CONFIG = "engine.json"
OUTPUT_PROCESSOR_CONFIG = "output_processor.json"
ROLLOUT_OPTIONS = "rollout.json"
SERVE_OPTIONS = "serve.json"
ADDRESSES = "addresses.json"


def make_run_dir() -> str:
    """A new folder under the system's temporary one, open to its owner alone."""
    return tempfile.mkdtemp(prefix="waybill-")


def remove_run_dir(path: str) -> None:
    """Remove it; may be called by whoever notices first that the run is over."""
    shutil.rmtree(path, ignore_errors=True)


def write_struct(run_dir: str, name: str, value: msgspec.Struct) -> Path:
    file = Path(run_dir) / name
    file.write_bytes(msgspec.json.encode(value))
    return file


def read_struct(run_dir: str, name: str, struct_type: type[T]) -> T:
    return msgspec.json.decode((Path(run_dir) / name).read_bytes(), type=struct_type)
