"""Quantises a checkpoint to block FP8 in the hub's format: `python bench/quantise_fp8.py CHECKPOINT --out FOLDER`.

Matrices become e4m3 with a float32 `weight_scale_inv` for 128 x 128 numbers; embedding, head, norms and routers stay as
they are. Everything else in the folder is copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from waybill.engine.models.quantisation import is_quantised
from waybill.parallel.fp8 import BLOCK, quantise_blocks, scale_name

WEIGHT = ".weight"
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
INDEX = "model.safetensors.index.json"


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and name.endswith(WEIGHT) and is_quantised(name.removesuffix(WEIGHT))


def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if is_matrix(name, tensor):
            found[name], found[scale_name(name)] = quantise_blocks(tensor)
        else:
            found[name] = tensor
    return found


def quantise_checkpoint(source: Path, out: Path) -> None:
    """Shard by shard.

    Raises:
        ValueError: the source is quantised already.
    """
    config = json.loads((source / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(
            f"{source}: quantization_config must be absent, it is a checkpoint in floating point that is wanted"
        )
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                tensors = quantise({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
            save_file(tensors, out / file.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file.name))
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        elif file.is_file() and file.name not in ("config.json", INDEX):
            shutil.copy(file, out / file.name)
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}, indent=2))
    if (source / INDEX).is_file():
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint}: must be a folder with a config.json")
    quantise_checkpoint(options.checkpoint, options.out)
    print(f"{options.out}: block FP8")


if __name__ == "__main__":
    main()
