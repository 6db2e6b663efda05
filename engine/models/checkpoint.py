"""A checkpoint in Hugging Face format: which tensors it holds and where, checked before a byte of them is read.

`load_weights` of `weight_loader.py` reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import msgspec

from ...parallel.fp8 import SCALE_ENDING, scale_names
from ...parallel.weights import ShardedWeight
from .causal_lm import FusedWeight
from .mxfp4 import BLOCKS, MXFP4, SCALES, find_packed
from .safetensors_file import SafetensorsFile, StoredTensor, dtype_of

NUM_NAMES_SHOWN = 5
STORED_FP8 = "F8_E4M3"
MAX_INDEX_BYTES = 64 << 20


class CheckpointIndex(msgspec.Struct):
    """`model.safetensors.index.json`, as far as it is read."""

    weight_map: dict[str, str]


class Checkpoint:
    """One safetensors file, or those of a folder: `model.safetensors`, or the shards that its index names. Headers are read
    here, and once. `packed` are those of its tensors that are dequantised when they are loaded.

    Raises:
        ValueError: the folder has neither, or the index names a file or a tensor that is not there.
        SafetensorError, OSError: a file is none of the kind, or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.files: list[tuple[SafetensorsFile, list[str]]] = []
        self.tensors: dict[str, StoredTensor] = {}
        found: dict[str, SafetensorsFile] = {}
        for file_path, names in self._find_files():
            file = SafetensorsFile(file_path)
            names = list(file.tensors) if names is None else names
            for name in names:
                if name not in file.tensors:
                    raise ValueError(f"model_path={path!r}: shard {file_path.name} has no tensor {name}")
                self.tensors[name] = file.tensors[name]
                found[name] = file
            self.files.append((file, names))
        self.packed = dict(find_packed(found))
        self._replace_packed()

    def _replace_packed(self) -> None:
        """Quantised tensors stand under the name of what they are dequantised to, with its shape."""
        parts = {f"{name}{ending}" for name in self.packed for ending in (BLOCKS, SCALES)}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in parts}
        self.files = [(file, [name for name in names if name not in parts]) for file, names in self.files]
        for name, packed in self.packed.items():
            self.tensors[name] = StoredTensor(MXFP4, packed.shape, 0, 0)

    def _find_files(self) -> Iterator[tuple[Path, list[str] | None]]:
        """Each with its tensors' names; None: all."""
        index = self._path / "model.safetensors.index.json"
        single = self._path / "model.safetensors"
        if self._path.is_file():
            single = self._path
        if index.is_file():
            names_of: dict[str, list[str]] = {}
            for name, file_name in read_index(index).items():
                names_of.setdefault(file_name, []).append(name)
            for file_name, names in names_of.items():
                if Path(file_name).name != file_name:
                    raise ValueError(
                        f"model_path={str(self._path)!r}: shard of tensor {names[0]} is not in this folder"
                    )
                if not (self._path / file_name).is_file():
                    raise ValueError(
                        f"model_path={str(self._path)!r}: shard {file_name} of tensor {names[0]} is missing"
                    )
                yield self._path / file_name, names
        elif single.is_file():
            yield single, None
        else:
            raise ValueError(f"model_path={str(self._path)!r}: must hold model.safetensors or its shards and index")


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


def check_dtypes(weights: Mapping[str, ShardedWeight], checkpoint: Checkpoint) -> None:
    """Of the tensors that the model has a place for.

    Raises:
        ValueError: one does not hold numbers that the model can take as they are.
    """
    for name, tensor in checkpoint.tensors.items():
        if name in checkpoint.packed or name not in weights:
            continue
        try:
            weights[name].check_dtype(dtype_of(tensor))
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error


def check_tensors(
    weights: Mapping[str, ShardedWeight],
    checkpoint: Checkpoint,
    ignored: Container[str],
    fused: Mapping[str, FusedWeight] | None = None,
) -> None:
    """Compare names and shapes with what the model needs, without reading a tensor.

    Args:
        weights: one entry per tensor that the model needs, by its name in the checkpoint.
        ignored: names that may stand in the checkpoint without being used (a tied head).
        fused: names under which several of the tensors may stand as one.

    Raises:
        ValueError: tensors are missing, unknown, there twice, or of the wrong shape; the message names them.
    """
    fused = fused or {}
    present = checkpoint.tensors.keys()
    brought = Counter(tensor for name in present for tensor in (fused[name].names if name in fused else (name,)))
    # Those that come in floating point bring their scales along.
    in_fp8 = {name for name in present if checkpoint.tensors[name].dtype == STORED_FP8}
    brought.update(scale for name, scale in scale_names(weights).items() if name in brought and name not in in_fp8)
    missing = sorted(weights.keys() - brought.keys())
    twice = sorted(name for name, count in brought.items() if count > 1)
    unknown = sorted(name for name in present if not (name in weights or name in fused or name in ignored))
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has, alone and fused,", twice)):
        if names:
            shown = ", ".join(names[:NUM_NAMES_SHOWN])
            is_scale = what == "has unknown" and names[0].endswith(SCALE_ENDING)
            hint = (
                "; scales mean FP8, which the config.json that the engine started with does not name"
                if is_scale
                else ""
            )
            raise ValueError(
                f"the checkpoint {what} {len(names)} tensors: {shown}{' ...' if names[NUM_NAMES_SHOWN:] else ''}{hint}"
            )
    known = {**weights, **{name: each.weight for name, each in fused.items()}}
    check_dtypes(known, checkpoint)
    for name, tensor in checkpoint.tensors.items():
        if name not in ignored:
            try:
                known[name].check_stored(tensor.shape)
            except ValueError as error:
                raise ValueError(f"tensor {name}: {error}") from error
