"""Write Qwen3-MoE checkpoints with random weights, in Hugging Face format, tensor by tensor.

python bench/make_models.py M --out models/M            about 1.7 B parameters, for throughput
python bench/make_models.py routing30b --out models/R   the routing shape of Qwen3-30B-A3B, tiny hidden size
python bench/make_models.py wide --out models/W         two layers of Qwen3-30B-A3B, small vocabulary
python bench/make_models.py deep --out models/D         small and deep; replay_mismatch.py trains one
python bench/make_models.py T --out models/T            a toy, for tests
python bench/make_models.py 30b --no-weights --out ...  Qwen3-30B-A3B, for engines with load_format="dummy"

Weights are written in the hub's naming, one shard of at most `SHARD_BYTES` in memory at a time. Nothing is learnt from
them: a model of random weights has the cost and the routing load of a real one, not its answers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen3MoeConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "checkpoint"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
END_OF_TURN = 260
SHARD_BYTES = 1 << 30
BYTES_PER_WEIGHT = 2
MODELS_FOLDER = Path(__file__).resolve().parents[1] / "models"
# Written last.
INDEX = "model.safetensors.index.json"

QWEN3_30B: dict[str, object] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
SHAPES: dict[str, dict[str, object]] = {
    "30b": QWEN3_30B,
    # 10 GB in bfloat16.
    "wide8": QWEN3_30B | {"num_hidden_layers": 8, "vocab_size": 8192, "max_position_embeddings": 8192},
    "wide": QWEN3_30B | {"num_hidden_layers": 2, "vocab_size": 8192, "max_position_embeddings": 8192},
    "toy30b": QWEN3_30B
    | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    | {"num_experts": 16, "moe_intermediate_size": 32, "vocab_size": 512},
    "M": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "routing30b": {
        "hidden_size": 32,
        "num_hidden_layers": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8,
        "intermediate_size": 64,
        "vocab_size": 512,
        "max_position_embeddings": 40960,
    },
    "deep": {
        "hidden_size": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 192,
        "vocab_size": 264,
        "max_position_embeddings": 2048,
    },
    "T": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "mlp_only_layers": [0],
    },
}


def make_config(shape: str) -> Qwen3MoeConfig:
    """The configuration of a named shape: untied, renormalised top-k, bfloat16."""
    return Qwen3MoeConfig(
        **SHAPES[shape],
        architectures=["Qwen3MoeForCausalLM"],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=END_OF_TURN,
        dtype="bfloat16",
    )


def tensor_shapes(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint by its name on the hub."""
    hidden, width = config.hidden_size, config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (heads * width, hidden)
            yield f"{prefix}.self_attn.{name}_norm.weight", (width,)
        yield f"{prefix}.self_attn.v_proj.weight", (config.num_key_value_heads * width, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, config.num_attention_heads * width)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer in config.mlp_only_layers:
            yield from mlp_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
        else:
            yield f"{prefix}.mlp.gate.weight", (config.num_experts, hidden)
            for expert in range(config.num_experts):
                yield from mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def mlp_shapes(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The three matrices of one expert, or of a dense layer."""
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def make_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones; matrices keep the variance of their input, so that activations stay sane at any depth. On the
    generator's device."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    scale = 1.0 if name == "model.embed_tokens.weight" else 1 / math.sqrt(shape[-1])
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(torch.bfloat16)


def fuse_experts(tensors: dict[str, torch.Tensor], config: Qwen3MoeConfig) -> dict[str, torch.Tensor]:
    """The same tensors as `transformers` has them in memory: the experts of a layer in two."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.down_proj.weight" in tensors:
            parts = {
                part: torch.stack([tensors[f"{prefix}.{i}.{part}_proj.weight"] for i in range(config.num_experts)])
                for part in ("gate", "up", "down")
            }
            fused[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            fused[f"{prefix}.down_proj"] = parts["down"]
    return fused


def split_into_shards(config: Qwen3MoeConfig) -> list[list[tuple[str, tuple[int, ...]]]]:
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


def write_config(shape: str, out: Path) -> Qwen3MoeConfig:
    """All that an engine with random weights needs of a checkpoint (`load_format="dummy"`): config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    config = make_config(shape)
    config.save_pretrained(out)
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
