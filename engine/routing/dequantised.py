"""A checkpoint in block FP8 as one in float32, for what computes with such numbers alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...parallel.fp8 import E4M3, SCALE_ENDING, dequantise, scale_name

QUANTIZATION = "quantization_config"
INDEX = "model.safetensors.index.json"


@contextmanager
def floating_point(model_path: str) -> Iterator[str]:
    """The folder itself, or, of a checkpoint in FP8, a temporary one with every matrix in float32."""
    folder = Path(model_path)
    config = json.loads((folder / "config.json").read_bytes())
    if (config.get(QUANTIZATION) or {}).get("quant_method") != "fp8":
        yield model_path
        return
    with tempfile.TemporaryDirectory(prefix="waybill-") as out:
        del config[QUANTIZATION]
        (Path(out) / "config.json").write_text(json.dumps(config))
        write_floats(folder, Path(out))
        yield out


def write_floats(folder: Path, out: Path) -> None:
    """Shard by shard; a matrix and its scales need not be in the same one."""
    files = sorted(folder.glob("*.safetensors"))
    place: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            place.update(dict.fromkeys(shard.keys(), file))
    weight_map: dict[str, str] = {}
    for file in files:
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if tensor.dtype == E4M3:
                    with safe_open(place[scale_name(name)], framework="pt") as other:
                        tensor = dequantise(tensor, other.get_tensor(scale_name(name)).float())
                elif name.endswith(SCALE_ENDING):
                    continue
                tensors[name] = tensor
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file.name))
    if (folder / INDEX).is_file():
        (out / INDEX).write_text(json.dumps({"weight_map": weight_map}))
