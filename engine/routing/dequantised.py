"""A checkpoint in block FP8 as one in float32, for what computes with such numbers alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    weight_map: dict[str, str] = {}
    with ExitStack() as opened:
        # Each once: a file's header names all its tensors, and there may be a hundred thousand.
        shards = {
            file: opened.enter_context(safe_open(file, framework="pt")) for file in sorted(folder.glob("*.safetensors"))
        }
        holder = {name: shard for shard in shards.values() for name in shard.keys()}  # noqa: SIM118
        for file, shard in shards.items():
            tensors: dict[str, torch.Tensor] = {}
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                if tensor.dtype == E4M3:
                    tensor = dequantise(tensor, holder[scale_name(name)].get_tensor(scale_name(name)).float())
                elif name.endswith(SCALE_ENDING):
                    continue
                tensors[name] = tensor
            save_file(tensors, out / file.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file.name))
    if (folder / INDEX).is_file():
        (out / INDEX).write_text(json.dumps({"weight_map": weight_map}))
