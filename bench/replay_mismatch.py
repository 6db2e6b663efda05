"""How far a trainer's probabilities are from the engine's, without and with replay: the table of the R3 paper, here.

The engine samples in bfloat16 on two ranks; the trainer, `transformers` in float32 with the same weights, scores the
sampled tokens, once with its own routing and once on the recorded routes. Then it takes a few policy-gradient mini-steps
on the same rollouts, as an off-policy trainer does, and scores them again.

    python bench/replay_mismatch.py [--models embedded deep routing30b] [--tokens 2500] [--mini-steps 4] [--write]

`embedded` is the model of this repository, on its dialogues. `deep` has 24 layers of 64 experts, from make_models.py,
trained on the same dialogues on first use and kept in models/: minutes on a GPU, far longer on two cores. `routing30b` has
the routing of Qwen3-30B-A3B and random weights.

With r = trainer's / engine's probability of a sampled token: KL is the mean of r - 1 - log r, a token is extreme if r or
1 / r is above 2.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe, write_result
from make_models import MODELS_FOLDER, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from waybill import Engine
from waybill.engine.routing.replay import RoutedExpertsBatch, replay_routing, routes_from_answer
from waybill.engine.routing.wire import RoutedExperts
from waybill.rollout.dialogues import Turn, make_dialogue

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "checkpoint"
NUM_TURNS = 8
FREE_TOKENS = 64
BATCH = 16
EXTREME = 2.0
TRAINING = {"steps": 400, "batch": 16, "lr": 2e-3, "balance": 0.01}
MODELS = ("embedded", "deep", "routing30b")
# A file in a checkpoint: how it was trained.
TRAINED = "trained.txt"


@dataclass
class Rollout:
    """Tokens, the parts of their routes, and the engine's log-probability of every sampled token by position."""

    tokens: list[int] = field(default_factory=list)
    routes: list[RoutedExperts] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)

    def take(self, prompt: list[int], answer: dict[str, Any]) -> None:
        info = answer["meta_info"]
        triples = info["output_token_logprobs"]
        self.logprobs |= {len(prompt) + i: logprob for i, (logprob, _, _) in enumerate(triples)}
        self.tokens = prompt + answer["output_ids"]
        routes = routes_from_answer(info)
        assert routes is not None
        self.routes.append(routes)


@dataclass(frozen=True)
class Mismatch:
    """Of one scoring of the rollouts."""

    kl: float
    extreme: float
    largest: float


def roll_out(path: str, num_tokens: int, *, dialogues: bool) -> list[Rollout]:
    """Sample at least `num_tokens` tokens at temperature 1: answers in dialogues, or free text after a first question."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rng = random.Random(0)
    rollouts: list[Rollout] = []
    with Engine(path, tp_size=2, dtype="bfloat16", enable_return_routed_experts=True) as engine:
        while sum(len(one.logprobs) for one in rollouts) < num_tokens:
            group = [Rollout() for _ in range(BATCH)]
            turns = [make_dialogue(rng, NUM_TURNS, held_out=True) for _ in group]
            for number in range(NUM_TURNS if dialogues else 1):
                prompts = [
                    one.tokens + tokenizer.encode(f"<|user|>{asked[number].user}<|assistant|>")
                    for one, asked in zip(group, turns, strict=True)
                ]
                params = {"temperature": 1.0, "sampling_seed": len(rollouts)}
                params |= {"max_new_tokens": 6} if dialogues else {"max_new_tokens": FREE_TOKENS, "ignore_eos": True}
                answers = engine.generate(
                    input_ids=prompts,
                    sampling_params=params,
                    return_logprob=True,
                    return_routed_experts=True,
                    routed_experts_start_len=[max(0, len(one.tokens) - 1) for one in group],
                )
                for one, prompt, answer in zip(group, prompts, answers, strict=True):
                    one.take(prompt, answer)
            rollouts += group
    return rollouts


def batches(rollouts: list[Rollout]) -> Iterator[tuple[list[Rollout], torch.Tensor, torch.Tensor, RoutedExpertsBatch]]:
    """Rollouts, ids and mask [B, S], padded right, and their routes."""
    for first in range(0, len(rollouts), BATCH):
        group = rollouts[first : first + BATCH]
        width = max(len(one.tokens) for one in group)
        ids, mask = (torch.zeros(len(group), width, dtype=torch.long) for _ in range(2))
        for row, one in enumerate(group):
            ids[row, : len(one.tokens)] = torch.tensor(one.tokens)
            mask[row, : len(one.tokens)] = 1
        yield group, ids, mask, RoutedExpertsBatch.from_padded([one.routes for one in group], mask)


def sampled_logprobs(
    model: Any, group: list[Rollout], ids: torch.Tensor, mask: torch.Tensor, routes: RoutedExpertsBatch | None
) -> torch.Tensor:
    """[sampled tokens], in the order of `group` and of positions. Call within `replay_routing`."""
    logits = model(ids, attention_mask=mask, use_cache=False, routed_experts=routes).logits
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([logprobs[row, [position - 1 for position in one.logprobs]] for row, one in enumerate(group)])


@torch.no_grad()
def score(model: Any, rollouts: list[Rollout], *, replay: bool) -> Mismatch:
    """Compare the trainer's log-probabilities with the engine's."""
    log_ratios = []
    with replay_routing(model):
        for group, ids, mask, routes in batches(rollouts):
            engine = torch.tensor([logprob for one in group for logprob in one.logprobs.values()])
            log_ratios.append(sampled_logprobs(model, group, ids, mask, routes if replay else None) - engine)
    log_ratio = torch.cat(log_ratios).double()
    extreme = (log_ratio.abs() > np.log(EXTREME)).double().mean()
    kl = (log_ratio.exp() - 1 - log_ratio).mean()
    return Mismatch(float(kl), float(extreme), float(log_ratio.abs().max().exp()))


@torch.no_grad()
def share_of_other_routes(model: Any, rollouts: list[Rollout]) -> tuple[float, float]:
    """Choices (token and layer) that are another set of experts than the engine's, and tokens with at least one."""
    received: list[torch.Tensor] = []
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    handles = [b.experts.register_forward_pre_hook(lambda _, args: received.append(args[1])) for b in blocks]
    differing = []
    for _, ids, mask, routes in batches(rollouts):
        received.clear()
        model(ids, attention_mask=mask, use_cache=False)
        own = torch.stack(received, dim=1).sort(dim=-1).values[routes.has_row]
        differing.append((own != routes.ids.long().sort(dim=-1).values[routes.has_row]).any(dim=-1))
    for handle in handles:
        handle.remove()
    choices = torch.cat(differing).double()
    return float(choices.mean()), float(choices.any(dim=-1).double().mean())


def drift(model: Any, rollouts: list[Rollout], steps: int, lr: float, *, replay: bool) -> Any:
    """A copy of the model after `steps` policy-gradient steps, each on its share of the rollouts. The advantages are
    arbitrary signs, one a rollout: it is how far the weights move that matters here, not where to."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(1)
    with replay_routing(model):
        for step in range(steps):
            for group, ids, mask, routes in batches(rollouts[step::steps]):
                signs = torch.tensor([sign for one in group for sign in [rng.choice((-1.0, 1.0))] * len(one.logprobs)])
                logprobs = sampled_logprobs(model, group, ids, mask, routes if replay else None)
                (-(signs * logprobs).sum() / sum(len(one.logprobs) for one in rollouts[step::steps])).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


def train_briefly(path: Path) -> None:
    """Train a random checkpoint on the dialogues, in place; only the answers carry loss."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["lr"], betas=(0.9, 0.98), weight_decay=0.05)
    rng, began = random.Random(0), time.perf_counter()
    for step in range(TRAINING["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = TRAINING["lr"] * min(1.0, (step + 1) / 20) * (1 - step / TRAINING["steps"]) ** 0.7
        dialogues = [make_dialogue(rng, NUM_TURNS, held_out=False) for _ in range(TRAINING["batch"])]
        rows = [encode(tokenizer, dialogue) for dialogue in dialogues]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for _, row in rows], batch_first=True, padding_value=-100
        )
        output = model(ids.to(device), use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(device))
        (loss + TRAINING["balance"] * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()
    model.to(torch.bfloat16).save_pretrained(path)
    (path / TRAINED).write_text(f"{training_text()}, loss {loss.item():.3f}")


def encode(tokenizer: Any, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue, and its labels."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        asked = tokenizer.encode(f"<|user|>{turn.user}<|assistant|>")
        answered = [*tokenizer.encode(turn.answer), tokenizer.eos_token_id]
        ids += asked + answered
        labels += [-100] * len(asked) + answered
    return ids, labels


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def cells(mismatch: Mismatch) -> tuple[str, str, str]:
    return f"{mismatch.kl:.2e}", f"{mismatch.extreme:.3%}", f"{mismatch.largest:.2f}"


def measure(name: str, path: str, args: argparse.Namespace) -> list[str]:
    """The lines of one model's table."""
    rollouts = roll_out(path, args.tokens, dialogues=name != "routing30b")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    num_tokens = sum(len(one.logprobs) for one in rollouts)
    choices, tokens = share_of_other_routes(model, rollouts)
    lines = [
        f"{num_tokens:,} sampled tokens in {len(rollouts)} rollouts. Without replay {choices:.2%} of the choices (token "
        f"and layer) fall on another set of experts; {tokens:.1%} of the tokens have at least one such layer.",
        "",
        row("weights", "routing", "KL", "extreme tokens", "largest ratio"),
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for replay in (False, True):
        routing = "replayed" if replay else "trainer's own"
        lines.append(row("as sampled", routing, *cells(score(model, rollouts, replay=replay))))
    for replay in (False, True):
        routing = "replayed" if replay else "trainer's own"
        drifted = drift(model, rollouts, args.mini_steps, args.lr, replay=replay)
        mismatch = score(drifted, rollouts, replay=replay)
        lines.append(row(f"after {args.mini_steps} mini-steps", routing, *cells(mismatch)))
    return lines


def prepare(name: str, folder: Path) -> tuple[str, str]:
    """A checkpoint's folder and what it is."""
    if name == "embedded":
        return str(CHECKPOINT), "the embedded model: 7 layers, 16 experts, top-4; dialogues"
    if name == "routing30b":
        write_checkpoint(name, folder / name, seed=0)
        what = "the routing of Qwen3-30B-A3B: 48 layers, 128 experts, top-8; random weights, free text"
        return str(folder / name), what
    path = trained_model(name)
    how = (path / TRAINED).read_text()
    return str(path), f"24 layers, 64 experts, top-4, trained briefly ({how}); dialogues"


def training_text() -> str:
    return f"{TRAINING['steps']} steps of {TRAINING['batch']} dialogues"


def trained_model(name: str) -> Path:
    """The checkpoint of this name in models/, trained if it is not there."""
    path = MODELS_FOLDER / f"{name}-trained"
    how = path / TRAINED
    if not how.is_file() or not how.read_text().startswith(training_text()):
        shutil.rmtree(path, ignore_errors=True)
        write_checkpoint(name, path, seed=0)
        train_briefly(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=2500, help="to sample at least, of each model")
    parser.add_argument("--mini-steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-5, help="of the mini-steps")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    args = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path, what = prepare(name, Path(folder))
            sections.append(
                "\n".join([f"## `{name}`", "", f"{what[0].upper()}{what[1:]}.", "", *measure(name, path, args)])
            )
            print(sections[-1], flush=True)
    if args.write:
        write_result("replay_mismatch.md", result(sections, args))


def result(sections: list[str], args: argparse.Namespace) -> str:
    head = (
        "# Trainer and engine, without and with replay\n\n"
        f"{describe()}. Engine: bfloat16, two ranks, temperature 1. Trainer: `transformers`, float32, the same weights.\n\n"
        "r = trainer's / engine's probability of a sampled token. KL: mean of r - 1 - log r. Extreme: r or 1 / r above 2. "
        f"Mini-steps: AdamW, learning rate {args.lr:g}, one share of the rollouts each.\n\n"
    )
    return head + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main()
