"""Train the embedded model: a small Qwen3-MoE on arithmetic dialogues, with stock `transformers` classes, on CPU.

    python examples/tiny_moe/train.py --out models/tiny                       # the full run, minutes on two cores
    python examples/tiny_moe/train.py --out models/early --stop-early 0.3
    python examples/tiny_moe/train.py --evaluate examples/tiny_moe/checkpoint
    python examples/tiny_moe/train.py --out models/tiny --readme              # also write the report into README.md

Only assistant tokens carry loss; a load-balancing loss in every layer keeps its experts in use. The learning rate follows
its full-length schedule even when training stops early, so an early checkpoint is the state a full run passes through.
Knows nothing of the engine: stock `transformers` and the dialogues.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from waybill.rollout.dialogues import Turn, make_dialogue

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Calls of tools were no part of the training; the comment tells a server how they would be written.
CHAT_TEMPLATE = (
    "{# Calls: <tool_call>{...}</tool_call> #}{% if tools %}<|system|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_DENSE_LAYERS = 1
MAX_TURNS = 8
MAX_ANSWER_TOKENS = 5
IGNORED = -100
README = Path(__file__).with_name("README.md")
REPORT_HEADING = "## Report"


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
        mlp_only_layers=list(range(NUM_DENSE_LAYERS)),
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        # The usual 0.02 suits models ten times as wide; here it leaves training stuck for its first third.
        initializer_range=0.06,
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


def balance_loss(router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor, config: Qwen3MoeConfig) -> torch.Tensor:
    """Mean of each layer's load-balancing loss. The model's own pools all layers first, which a layer with idle experts
    passes unseen as long as another one uses those indices."""
    losses = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok, mask)
        for logits in router_logits
    ]
    return torch.stack(losses).mean()


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
            balance = balance_loss(output.router_logits, mask, model.config)
            targets = labels[:, 1:].reshape(-1)
            answers = targets != IGNORED
            loss = F.cross_entropy(
                output.logits[:, :-1].reshape(-1, output.logits.shape[-1])[answers], targets[answers]
            )
            (loss + model.config.router_aux_loss_coef * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.console.print(f"step {step:5d}  loss {loss.item():.4f}  balance {balance.item():.3f}")
            progress.advance(task)
    return model


@dataclass
class Evaluation:
    """(right, asked) by operation and by turn number, and the share of choices per MoE layer and expert."""

    by_operation: dict[str, tuple[int, int]]
    by_turn: dict[str, tuple[int, int]]
    usage: torch.Tensor  # [MoE layers, experts], rows sum to 1


@dataclass
class Tally:
    """Counts answers under one key."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, is_right: bool) -> None:
        self.asked[key] += 1
        self.right[key] += is_right

    def counts(self) -> dict[str, tuple[int, int]]:
        return {key: (self.right[key], self.asked[key]) for key in sorted(self.asked)}


@torch.inference_mode()
def answer_greedily(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> list[str]:
    """The model's next answer in each conversation; one batch, padded on the left."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in conversations]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    output = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in output]


@torch.inference_mode()
def expert_usage(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogues: list[list[Turn]]
) -> torch.Tensor:
    """[MoE layers, experts]: each expert's share of its layer's choices."""
    config = model.config
    usage = torch.zeros(config.num_hidden_layers - len(config.mlp_only_layers), config.num_experts)
    for turns in dialogues:
        ids = torch.tensor([encode(tokenizer, turns)[0]])
        for layer, logits in enumerate(model(ids, output_router_logits=True, use_cache=False).router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            usage[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return usage / usage.sum(dim=-1, keepdim=True)


def evaluate(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, num_dialogues: int) -> Evaluation:
    """Greedy accuracy on held-out dialogues. A later turn builds on the right value, so one slip is counted once."""
    rng = random.Random(1_000_003)
    dialogues = [make_dialogue(rng, MAX_TURNS, held_out=True) for _ in range(num_dialogues)]
    conversations: list[list[dict[str, str]]] = [[] for _ in dialogues]
    by_operation, by_turn = Tally(), Tally()
    for number in range(MAX_TURNS):
        for conversation, turns in zip(conversations, dialogues, strict=True):
            conversation.append({"role": "user", "content": turns[number].user})
        answers = answer_greedily(model, tokenizer, conversations)
        for conversation, turns, answer in zip(conversations, dialogues, answers, strict=True):
            turn = turns[number]
            by_operation.add(turn.operation, answer == turn.answer)
            by_turn.add(str(number + 1), answer == turn.answer)
            conversation.append({"role": "assistant", "content": turn.answer})
    return Evaluation(by_operation.counts(), by_turn.counts(), expert_usage(model, tokenizer, dialogues))


def accuracy_table(heading: str, counts: dict[str, tuple[int, int]]) -> list[str]:
    total = (sum(right for right, _ in counts.values()), sum(asked for _, asked in counts.values()))
    rows = [
        f"| {k} | {right} | {asked} | {right / asked:.1%} |" for k, (right, asked) in [*counts.items(), ("all", total)]
    ]
    return [f"| {heading} | right | asked | accuracy |", "| --- | --- | --- | --- |", *rows, ""]


def report(evaluation: Evaluation, *, training: str | None) -> str:
    """Markdown: accuracy by operation and turn, and every layer's expert usage. `training` says how it was trained."""
    lines = [training, ""] if training is not None else []
    lines += ["Greedy, float32, on dialogues of which no calculation was ever seen in training.", ""]
    lines += accuracy_table("operation", evaluation.by_operation)
    lines += accuracy_table("turn", evaluation.by_turn)
    num_layers, num_experts = evaluation.usage.shape
    lines += [f"Share of choices by expert, in per cent (even would be {100 / num_experts:.1f}):", ""]
    lines += ["| layer | " + " | ".join(f"e{e}" for e in range(num_experts)) + " |", "| --- " * (num_experts + 1) + "|"]
    for layer in range(num_layers):
        shares = " | ".join(f"{100 * share:.0f}" for share in evaluation.usage[layer].tolist())
        lines.append(f"| {NUM_DENSE_LAYERS + layer} | {shares} |")
    return "\n".join(lines)


def write_report(text: str) -> None:
    """Replace everything under the report heading of the README."""
    before, heading, _ = README.read_text().partition(REPORT_HEADING)
    assert heading, f"{README} has no heading {REPORT_HEADING!r}"
    README.write_text(f"{before}{heading}\n\n{text}\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--evaluate", type=Path, help="evaluate this checkpoint instead of training")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stop-early", type=float, default=1.0, help="share of the steps to run")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", default="grouped_mm", choices=("grouped_mm", "eager"))
    parser.add_argument("--dialogues", type=int, default=200, help="held-out dialogues to evaluate on")
    parser.add_argument("--readme", action="store_true", help="write the report into README.md beside this file")
    args = parser.parse_args()
    if (args.out is None) == (args.evaluate is None):
        parser.error("give either --out or --evaluate")
    if not 0.0 < args.stop_early <= 1.0:
        parser.error(f"--stop-early {args.stop_early}: must be above 0 and at most 1")
    if args.readme and args.evaluate is not None:
        parser.error("--readme belongs to a training run: it reports how the checkpoint was trained")
    return args


def processor_name() -> str:
    """The processor's name where the system tells it (Linux), else its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    args = parse_args()
    tokenizer = make_tokenizer()
    training = None
    if args.evaluate is None:
        began = time.perf_counter()
        model = train(args, tokenizer)
        training = (
            f"Trained for {int(args.steps * args.stop_early)} of {args.steps} steps of {args.batch_size} dialogues, seed "
            f"{args.seed}, in {time.perf_counter() - began:.0f} s with {torch.get_num_threads()} CPU threads "
            f"({processor_name()}), float32, `{args.experts}` experts."
        )
        model.to(torch.bfloat16).save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    model = Qwen3MoeForCausalLM.from_pretrained(args.evaluate or args.out, dtype=torch.float32).eval()
    text = report(evaluate(model, tokenizer, args.dialogues), training=training)
    print(text)
    if args.readme:
        write_report(text)


if __name__ == "__main__":
    main()
