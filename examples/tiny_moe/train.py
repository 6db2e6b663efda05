"""Train the embedded model: a small Qwen3-MoE on arithmetic dialogues, with stock `transformers` classes, on CPU.

    python examples/tiny_moe/train.py --out /tmp/tiny            # the full run, minutes on two cores
    python examples/tiny_moe/train.py --out /tmp/early --stop-early 0.3
    python examples/tiny_moe/train.py --evaluate examples/tiny_moe/checkpoint

Only assistant tokens carry loss; the router's load-balancing loss keeps every expert in use. The learning rate follows
its full-length schedule even when training stops early, so an early checkpoint is the state a full run passes through.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from waybill.launch.dialogues import Turn, make_dialogue

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_TURNS = 8
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0 .. 255 are the bytes, then the special tokens."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Seven layers, the first one dense; 16 experts of which each token takes four."""
    return Qwen3MoeConfig(
        vocab_size=264,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mlp_only_layers=[0],
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue and its labels: the answers and the token that ends them."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        asked = tokenizer.encode(f"<|user|>{turn.user}<|assistant|>")
        answered = tokenizer.encode(f"{turn.answer}<|end|>")
        ids += asked + answered
        labels += [IGNORED] * len(asked) + answered
    return ids, labels


def make_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] ids, padded on the right, and labels."""
    rows = [encode(tokenizer, make_dialogue(rng, MAX_TURNS, held_out=False)) for _ in range(batch_size)]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((batch_size, width), tokenizer.pad_token_id)
    labels = torch.full((batch_size, width), IGNORED)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = Qwen3MoeForCausalLM._from_config(make_config(tokenizer), experts_implementation=args.experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, args.steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / args.steps) ** 0.7)
    )
    num_steps = int(args.steps * args.stop_early)
    with Progress() as progress:
        task = progress.add_task("training", total=num_steps)
        for step in range(num_steps):
            ids, labels = make_batch(tokenizer, rng, args.batch_size)
            # The mask keeps padding out of the load-balancing loss.
            mask = (ids != tokenizer.pad_token_id).long()
            output = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            targets = labels[:, 1:].reshape(-1)
            answers = targets != IGNORED
            loss = F.cross_entropy(
                output.logits[:, :-1].reshape(-1, output.logits.shape[-1])[answers], targets[answers]
            )
            (loss + model.router_aux_loss_coef * output.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.console.print(f"step {step:5d}  loss {loss.item():.4f}  balance {output.aux_loss.item():.3f}")
            progress.advance(task)
    return model


@torch.inference_mode()
def evaluate(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, num_dialogues: int
) -> tuple[dict[str, tuple[int, int]], torch.Tensor]:
    """Greedy accuracy on held-out dialogues, with the model's own answers as context.

    Returns (right, asked) per operation and the share of choices per MoE layer and expert [layers, experts].
    """
    rng = random.Random(1_000_003)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    usage = torch.zeros(model.config.num_hidden_layers - 1, model.config.num_experts)
    for _ in range(num_dialogues):
        messages: list[dict[str, str]] = []
        for turn in make_dialogue(rng, MAX_TURNS, held_out=True):
            messages.append({"role": "user", "content": turn.user})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
            answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            asked[turn.operation] += 1
            right[turn.operation] += answer == turn.answer
            # Later turns build on the right value, so one slip is counted once.
            messages.append({"role": "assistant", "content": turn.answer})
        routers = model(prompt, output_router_logits=True, use_cache=False).router_logits
        for layer, logits in enumerate(routers):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
            usage[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    return {name: (right[name], asked[name]) for name in asked}, usage / usage.sum(dim=-1, keepdim=True)


def report(accuracy: dict[str, tuple[int, int]], usage: torch.Tensor) -> str:
    lines = ["| operation | right | asked | accuracy |", "| --- | --- | --- | --- |"]
    total = (sum(r for r, _ in accuracy.values()), sum(a for _, a in accuracy.values()))
    for name, (right, asked) in [*sorted(accuracy.items()), ("all", total)]:
        lines.append(f"| {name} | {right} | {asked} | {right / asked:.1%} |")
    lines += ["", "| MoE layer | least used expert | most used expert |", "| --- | --- | --- |"]
    for layer, shares in enumerate(usage):
        lines.append(f"| {layer + 1} | {shares.min():.1%} | {shares.max():.1%} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--evaluate", type=Path, help="evaluate this checkpoint instead of training")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--stop-early", type=float, default=1.0, help="share of the steps to run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", default="grouped_mm", choices=("grouped_mm", "eager"))
    parser.add_argument("--dialogues", type=int, default=100, help="held-out dialogues to evaluate on")
    args = parser.parse_args()
    if (args.out is None) == (args.evaluate is None):
        parser.error("give either --out or --evaluate")
    return args


def main() -> None:
    args = parse_args()
    tokenizer = make_tokenizer()
    if args.evaluate is None:
        began = time.perf_counter()
        model = train(args, tokenizer)
        print(f"trained in {time.perf_counter() - began:.0f} s")
        model.to(torch.bfloat16).save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    model = Qwen3MoeForCausalLM.from_pretrained(args.evaluate or args.out, dtype=torch.float32).eval()
    print(report(*evaluate(model, tokenizer, args.dialogues)))


if __name__ == "__main__":
    main()
