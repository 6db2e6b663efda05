"""A checkpoint folder in Hugging Face format, read tensor by tensor.

Each parameter asks its source for the slice that its rank keeps, so a rank's peak memory is its own shard plus a tensor
and a bounded part of a mapped file. The same entry serves start-up and later weight updates: `load_weights` may run
again on a live model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import msgspec
from safetensors import safe_open

from ...parallel.weights import SafetensorsSource, ShardedWeight

NUM_NAMES_SHOWN = 5
# What was read of a mapped file counts as resident memory until it is closed.
MAX_MAPPED_BYTES = 256 << 20
MAX_INDEX_BYTES = 64 << 20
# An upper bound; only how often a file is opened again depends on it.
BYTES_PER_ELEMENT = 4
# As safetensors names them.
DTYPES = ("BF16", "F16", "F32", "F64")


class CheckpointIndex(msgspec.Struct):
    """`model.safetensors.index.json`, as far as it is read."""

    weight_map: dict[str, str]


class Checkpoint:
    """One safetensors file, or those of a folder: `model.safetensors`, or the shards that its index names.

    Raises:
        ValueError: the folder has neither, or the index names a file that is not there.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file_of = dict(self._read_names())

    def _read_names(self) -> Iterator[tuple[str, Path]]:
        index = self._path / "model.safetensors.index.json"
        single = self._path / "model.safetensors"
        if self._path.is_file():
            single = self._path
        if index.is_file():
            for name, file_name in read_index(index).items():
                if Path(file_name).name != file_name:
                    raise ValueError(f"model_path={str(self._path)!r}: shard of tensor {name} is not in this folder")
                file = self._path / file_name
                if not file.is_file():
                    raise ValueError(f"model_path={str(self._path)!r}: shard {file_name} of tensor {name} is missing")
                yield name, file
        elif single.is_file():
            with safe_open(single, framework="pt") as handle:
                yield from ((name, single) for name in list(handle.keys()))
        else:
            raise ValueError(f"model_path={str(self._path)!r}: must hold model.safetensors or its shards and index")

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def tensors(self) -> Iterator[tuple[str, SafetensorsSource]]:
        """Every tensor with its name, file by file; a source is valid until the next one is asked for."""
        for file, names in groupby(sorted(self._file_of, key=self._file_of.__getitem__), key=self._file_of.__getitem__):
            remaining = list(names)
            while remaining:
                yield from self._some_tensors(file, remaining)

    @staticmethod
    def _some_tensors(file: Path, remaining: list[str]) -> Iterator[tuple[str, SafetensorsSource]]:
        """Take tensors off the list until a bounded part of the file is mapped."""
        num_bytes = 0
        with safe_open(file, framework="pt") as handle:
            while remaining and num_bytes < MAX_MAPPED_BYTES:
                name = remaining.pop()
                source = SafetensorsSource(handle.get_slice(name))
                num_bytes += math.prod(source.shape) * BYTES_PER_ELEMENT
                yield name, source


def read_index(file: Path) -> dict[str, str]:
    """File names by tensor.

    Raises:
        ValueError: it is no index.
    """
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"model_path={str(file.parent)!r}: {file.name}: must have at most {MAX_INDEX_BYTES} bytes")
    try:
        return msgspec.json.decode(file.read_bytes(), type=CheckpointIndex).weight_map
    except msgspec.DecodeError as error:
        raise ValueError(f"model_path={str(file.parent)!r}: {file.name}: {error}") from None


def check_dtypes(sources: Iterable[tuple[str, SafetensorsSource]]) -> None:
    """
    Raises:
        ValueError: a tensor does not hold floating-point numbers as they are.
    """
    for name, source in sources:
        if source.dtype not in DTYPES:
            raise ValueError(f"tensor {name}: dtype {source.dtype}: must be one of {', '.join(DTYPES)}")


def check_tensors(weights: Mapping[str, ShardedWeight], checkpoint: Checkpoint, ignored: frozenset[str]) -> None:
    """Compare names and shapes with what the model needs, without reading a tensor.

    Args:
        weights: one entry per tensor that the model needs, by its name in the checkpoint.
        ignored: names that may stand in the checkpoint without being used (a tied head).

    Raises:
        ValueError: tensors are missing, unknown, or of the wrong shape; the message names them.
    """
    present = set(checkpoint.names)
    missing = sorted(weights.keys() - present)
    unknown = sorted(present - weights.keys() - ignored)
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            shown = ", ".join(names[:NUM_NAMES_SHOWN])
            raise ValueError(
                f"the checkpoint {what} {len(names)} tensors: {shown}{' ...' if names[NUM_NAMES_SHOWN:] else ''}"
            )
    check_dtypes(checkpoint.tensors())
    for name, source in checkpoint.tensors():
        if name not in ignored:
            try:
                weights[name].check(tuple(source.shape))
            except ValueError as error:
                raise ValueError(f"tensor {name}: {error}") from error


def load_weights(weights: Mapping[str, ShardedWeight], checkpoint: Checkpoint, ignored: frozenset[str]) -> None:
    """Fill every parameter from a checkpoint that `check_tensors` has passed."""
    for name, source in checkpoint.tensors():
        if name not in ignored:
            weights[name].load(source)
