"""Write checkpoints with random weights, in Hugging Face format, tensor by tensor.

python bench/make_models.py M --out models/M            about 1.7 B parameters, for throughput
python bench/make_models.py routing30b --out models/R   the routing shape of Qwen3-30B-A3B, tiny hidden size
python bench/make_models.py wide --out models/W         two layers of Qwen3-30B-A3B, small vocabulary
python bench/make_models.py deep --out models/D         small and deep; replay_mismatch.py trains one
python bench/make_models.py T --out models/T            a toy, for tests
python bench/make_models.py 30b --no-weights --out ...  Qwen3-30B-A3B, for engines with load_format="dummy"

Of Moonlight-16B-A3B and Kimi-K2 there are `moonlight` and `kimik2`, two layers of them and few tokens (`moonlight2`,
`kimik2_2`), and toys that route as they do (`toymoonlight`, `toykimik2`); so of GLM-4.5-Air (`glm4.5air`, `glm4.5air2`,
`toyglm4.5air`) and gpt-oss-20b (`gptoss20b`, `gptoss20b_2`, `toygptoss20b`).

Weights are written in the hub's naming, one shard of at most `SHARD_BYTES` in memory at a time. Nothing is learnt from
them: a model of random weights has the cost and the routing load of a real one, not its answers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from model_shapes import END_OF_TURN, SHAPES, config_changes, make_config, tensor_shapes
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 1 << 30
BYTES_PER_WEIGHT = 2
MODELS_FOLDER = Path(__file__).resolve().parents[1] / "models"
# Written last.
INDEX = "model.safetensors.index.json"


def make_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones and biases zeros; matrices keep the variance of their input, so that activations stay sane at any
    depth. On the generator's device."""
    if name.endswith(("bias", "sinks")):
        return torch.zeros(shape, dtype=torch.bfloat16, device=generator.device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    # Stacks of matrices are transposed.
    scale = 1.0 if name == "model.embed_tokens.weight" else 1 / math.sqrt(shape[-1] if len(shape) == 2 else shape[-2])
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(torch.bfloat16)


def split_into_shards(config: PreTrainedConfig) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Consecutive tensors, at most `SHARD_BYTES` a shard unless one tensor alone is larger."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    num_bytes = 0
    for name, shape in tensor_shapes(config):
        tensor_bytes = BYTES_PER_WEIGHT * math.prod(shape)
        if shards[-1] and num_bytes + tensor_bytes > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append((name, shape))
        num_bytes += tensor_bytes
    return shards


def write_config(shape: str, out: Path) -> PreTrainedConfig:
    """All that an engine with random weights needs of a checkpoint (`load_format="dummy"`): config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    config = make_config(shape)
    config.save_pretrained(out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config_changes(shape), indent=2))
    GenerationConfig(eos_token_id=END_OF_TURN).save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, out)
    return config


def write_checkpoint(shape: str, out: Path, seed: int) -> int:
    """Write config, tokenizer and shards; returns the number of parameters."""
    config = write_config(shape, out)
    generator = torch.Generator().manual_seed(seed)
    shards = split_into_shards(config)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: make_tensor(name, tensor_shape, generator) for name, tensor_shape in shard}
        save_file(tensors, out / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))
    num_parameters = sum(math.prod(tensor_shape) for shard in shards for _, tensor_shape in shard)
    index = {"metadata": {"total_size": BYTES_PER_WEIGHT * num_parameters}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index))
    return num_parameters


def ensure_checkpoint(shape: str) -> Path:
    """The folder of a named shape under `models`, written if it is not there."""
    out = MODELS_FOLDER / shape
    if not (out / INDEX).is_file():
        write_checkpoint(shape, out, seed=0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", action="store_true", help="config and tokenizer alone")
    args = parser.parse_args()
    if args.no_weights:
        write_config(args.shape, args.out)
        return
    num_parameters = write_checkpoint(args.shape, args.out, args.seed)
    print(f"{args.out}: {num_parameters / 1e9:.3f} B parameters")


if __name__ == "__main__":
    main()
