"""The embedded model, its tokenizer and its dialogues: what tests, the rollout command and training rely on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from waybill.rollout.dialogues import MAX_NUMBER, calculations, is_held_out, make_dialogue

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_moe"
CHECKPOINT = FOLDER / "checkpoint"
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
MAX_CHECKPOINT_BYTES = 8_000_000


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_moe_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    loaded, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded.eval()


# --- the checkpoint -------------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MAX_CHECKPOINT_BYTES


def test_weights_are_bfloat16_in_the_hub_naming() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.layers.6.mlp.experts.15.down_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" not in names


def test_the_shape_has_what_the_engine_must_handle() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["mlp_only_layers"] == [0]
    assert config["num_hidden_layers"] >= 7
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (16, 4)
    assert config["norm_topk_prob"] is True
    assert config["max_position_embeddings"] == 4096


def test_an_answer_ends_with_the_token_that_the_configuration_names() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert TOKENIZER.eos_token_id == end
    for name in ("config.json", "generation_config.json"):
        assert json.loads((CHECKPOINT / name).read_text())["eos_token_id"] == end


def test_held_out_dialogues_are_answered_greedily(model: Any, train: ModuleType) -> None:
    result = train.evaluate(model, TOKENIZER, num_dialogues=12)
    right, asked = (sum(column) for column in zip(*result.by_turn.values(), strict=True))
    assert asked == 12 * train.MAX_TURNS
    assert right / asked >= 0.95


@torch.inference_mode()
def test_routing_is_specialised_and_no_expert_is_idle(model: Any, train: ModuleType) -> None:
    rng = random.Random(7)
    usage = train.expert_usage(model, TOKENIZER, [make_dialogue(rng, 8, held_out=False) for _ in range(12)])
    assert usage.shape == (6, 16)
    assert usage.min().item() > 0.002
    # A token's choices depend on the token: those of digits and of letters fall on different experts.
    digits, letters = (choices(model, text) for text in ("start with 12 add 30", "subtract double"))
    distance = (digits - letters).abs().sum(dim=-1) / 2
    assert distance.max().item() > 0.2


def choices(model: Any, text: str) -> torch.Tensor:
    """[layers, experts]: shares of the choices of a text's digits, or of its letters where it has no digit."""
    ids = torch.tensor([TOKENIZER.encode(text)])
    kept = torch.tensor([c.isdigit() for c in text])
    rows = kept if kept.any() else ~kept
    logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    return torch.stack([F.one_hot(x[rows].topk(4).indices, 16).float().mean(dim=(0, 1)) for x in logits])


@torch.inference_mode()
def test_a_prompt_of_1600_tokens_runs(model: Any) -> None:
    output = model(torch.arange(1600).remainder(256)[None], use_cache=False)
    assert torch.isfinite(output.logits).all()


# --- the tokenizer --------------------------------------------------------------------------------------------------


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_any_text_round_trips_byte_for_byte(text: str) -> None:
    # Text that spells a special token is that token, as in every chat tokenizer.
    text = text.replace("<|", "")
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_conversation_is_a_prefix_of_its_continuation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "start with 12"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "add 30"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "double"},
    ]
    whole = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    end = TOKENIZER.eos_token_id
    for asked in (2, 4):
        prompt = TOKENIZER.apply_chat_template(messages[:asked], add_generation_prompt=True)["input_ids"]
        generated = [*TOKENIZER.encode(messages[asked]["content"]), end]
        assert whole[: len(prompt) + len(generated)] == prompt + generated


# --- the dialogues --------------------------------------------------------------------------------------------------


def check_dialogue(turns: list[Any], *, held_out: bool) -> None:
    value = -1
    for turn in turns:
        name, *rest = turn.user.split()
        operand = int(rest[-1]) if rest else 0
        if name != "start":
            assert is_held_out(name, value, operand) == held_out
        value = {"start": operand, "add": value + operand, "subtract": value - operand, "double": 2 * value}[name]
        assert turn.operation == name
        assert turn.answer == str(value)
        assert 0 <= value <= MAX_NUMBER


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_right_in_range_and_on_its_side_of_the_split(held_out: bool) -> None:
    rng = random.Random(3)
    for num_turns in (1, 2, 8, 30):
        for _ in range(50):
            turns = make_dialogue(rng, num_turns, held_out=held_out)
            assert len(turns) == num_turns
            check_dialogue(turns, held_out=held_out)


def test_the_same_seed_makes_the_same_dialogue() -> None:
    first, again, other = (make_dialogue(random.Random(seed), 8, held_out=True) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_about_a_tenth_of_the_calculations_is_held_out() -> None:
    every = [(name, value, operand) for value in range(MAX_NUMBER + 1) for name, operand, _ in calculations(value)]
    share = sum(is_held_out(*calculation) for calculation in every) / len(every)
    assert 0.08 < share < 0.12


# --- the training ---------------------------------------------------------------------------------------------------


def test_only_answers_carry_loss(train: ModuleType) -> None:
    ids, labels = train.encode(TOKENIZER, make_dialogue(random.Random(0), 2, held_out=False))
    assert len(ids) == len(labels)
    learnt = [label for label in labels if label != train.IGNORED]
    expected = "".join(turn.answer + "<|end|>" for turn in make_dialogue(random.Random(0), 2, held_out=False))
    assert TOKENIZER.decode(learnt) == expected
    assert all(label in (train.IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_the_balance_loss_sees_a_layer_whose_experts_idle(train: ModuleType) -> None:
    config = train.make_config(TOKENIZER)
    # Four layers, each of which sends every token to the same four experts; together they use all sixteen evenly.
    collapsed = tuple(
        torch.zeros(32, 16).index_fill(1, torch.arange(4 * layer, 4 * layer + 4), 9.0) for layer in range(4)
    )
    mask = torch.ones(4, 8, dtype=torch.long)
    pooled = train.load_balancing_loss_func(collapsed, 16, 4, mask).item()
    assert pooled == pytest.approx(4.0, rel=0.01)
    assert train.balance_loss(collapsed, mask, config).item() > 3 * pooled


def test_stopping_early_keeps_the_schedule_of_the_full_run(train: ModuleType) -> None:
    """Half of a run of four steps does not equal a run of two: its learning rate is still high."""
    options = {"seed": 0, "batch_size": 2, "lr": 1e-2, "experts": "grouped_mm"}
    early = train.train(argparse.Namespace(steps=4, stop_early=0.5, **options), TOKENIZER)
    again = train.train(argparse.Namespace(steps=4, stop_early=0.5, **options), TOKENIZER)
    short = train.train(argparse.Namespace(steps=2, stop_early=1.0, **options), TOKENIZER)
    weights = [m.lm_head.weight for m in (early, again, short)]
    # Sums over threads differ by rounding from run to run.
    assert torch.dist(weights[0], weights[1]) < 0.01 * torch.dist(weights[0], weights[2])
