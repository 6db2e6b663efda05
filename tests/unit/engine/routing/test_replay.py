"""Replay in every family: exact with a model's own routes, obeyed with any, and differentiated as a dense MoE would be."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.replay_models import (
    CONFIGS,
    LIKE_DEEPSEEK,
    NUM_EXPERTS,
    TOP_K,
    gradients,
    layer_ids,
    make_dense,
    make_model,
    make_routes,
    moe_layers,
    native_rows,
    random_rows,
    random_tokens,
    received_by_experts,
    router_of,
)

from waybill.engine.routing.replay import RoutedExpertsBatch, replay_routing

B, S = 2, 7
families = pytest.mark.parametrize("family", CONFIGS)


def full_batch(model: Any, rows: np.ndarray) -> RoutedExpertsBatch:
    """Rows [B * S, M, K] for every position of a batch without padding."""
    routes = [make_routes(model, item) for item in rows.reshape(B, S, *rows.shape[1:])]
    return RoutedExpertsBatch.from_padded(routes, torch.ones(B, S))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1)[..., 5].sum()


def run(model: Any, tokens: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients."""
    logits = model(tokens, **arguments).logits
    loss_of(logits).backward()
    return logits.detach(), gradients(model)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_own_routes_change_nothing(family: str, dtype: torch.dtype) -> None:
    model, tokens = make_model(family, dtype), random_tokens(B, S)
    batch = full_batch(model, native_rows(model, input_ids=tokens))
    logits, grads = run(model, tokens)
    with replay_routing(model) as replay:
        replayed_logits, replayed_grads = run(model, tokens, routed_experts=batch)
    assert torch.equal(logits, replayed_logits)
    assert_equal(grads, replayed_grads)
    assert replay.layer_ids == layer_ids(model)
    assert replay.counts.replayed == B * S


@families
def test_experts_receive_what_was_recorded(family: str) -> None:
    model, tokens = make_model(family), random_tokens(B, S)
    rows = random_rows(model, B * S)
    assert not np.array_equal(rows, native_rows(model, input_ids=tokens)), "the rows are not the model's own"
    with replay_routing(model), received_by_experts(model) as received:
        model(tokens, routed_experts=full_batch(model, rows))
    for column, calls in enumerate(received):
        assert len(calls) == 1
        assert np.array_equal(calls[0].numpy(), rows[:, column])


@families
def test_gradients_are_those_of_a_dense_moe(family: str) -> None:
    model, tokens = make_model(family, torch.float64), random_tokens(B, S)
    rows = random_rows(model, B * S)
    with replay_routing(model):
        logits, grads = run(model, tokens, routed_experts=full_batch(model, rows))
    make_dense(model, torch.from_numpy(rows).long())
    dense_logits, dense_grads = run(model, tokens)
    # The routers compute in float32.
    torch.testing.assert_close(logits, dense_logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == dense_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], dense_grads[name], rtol=1e-4, atol=1e-5, msg=name)


@families
def test_router_learns_from_ids_outside_its_top_k(family: str) -> None:
    """The lowest-scored experts are replayed; the rows of the router's weight that score them receive gradient."""
    model, tokens = make_model(family), random_tokens(B, S)
    native = native_rows(model, input_ids=tokens)
    others = np.array(
        [[np.setdiff1d(np.arange(NUM_EXPERTS), ids)[:TOP_K] for ids in row] for row in native], dtype=np.uint8
    )
    with replay_routing(model):
        _, grads = run(model, tokens, routed_experts=full_batch(model, others))
    for column, layer in enumerate(layer_ids(model)):
        router = "router" if family == "gpt_oss" else "gate"
        (name,) = (name for name in grads if name.endswith(f"layers.{layer}.mlp.{router}.weight"))
        gradient = grads[name]
        assert (gradient[np.unique(others[:, column]).tolist()].abs().sum(dim=-1) > 0).all()


@families
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_keep_their_own_batch(family: str, reentrant: bool) -> None:
    """Two forwards before any backward, and the second one's backward first: what a queue would mix up."""
    model = make_model(family)
    batches = [full_batch(model, random_rows(model, B * S, seed)) for seed in (1, 2)]
    tokens = [random_tokens(B, S, seed) for seed in (3, 4)]

    def both_backwards() -> dict[str, torch.Tensor]:
        losses = [loss_of(model(ids, routed_experts=batch).logits) for ids, batch in zip(tokens, batches, strict=True)]
        losses[1].backward()
        losses[0].backward()
        return gradients(model)

    with replay_routing(model):
        expected = both_backwards()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        with received_by_experts(model) as received:
            found = both_backwards()
    assert_equal(expected, found)
    for calls in received:
        assert len(calls) == 4, "every layer ran twice for each batch"
        assert torch.equal(calls[0], calls[3]) and torch.equal(calls[1], calls[2])


def test_torch_checkpoint_wrappers_around_decoder_layers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa: PLC0415

    model, tokens = make_model("qwen3_moe"), random_tokens(B, S)
    batch = full_batch(model, random_rows(model, B * S))
    with replay_routing(model):
        logits, expected = run(model, tokens, routed_experts=batch)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    with replay_routing(model):
        wrapped_logits, found = run(model, tokens, routed_experts=batch)
    assert torch.equal(logits, wrapped_logits)
    assert_equal(expected, {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()})


@families
def test_gradient_accumulation_is_the_sum(family: str) -> None:
    model, tokens = make_model(family, torch.float64), random_tokens(B, S)
    rows = random_rows(model, B * S)
    with replay_routing(model) as replay:
        _, expected = run(model, tokens, routed_experts=full_batch(model, rows))
        for index in range(B):
            routes = [make_routes(model, rows.reshape(B, S, *rows.shape[1:])[index])]
            batch = RoutedExpertsBatch.from_padded(routes, torch.ones(1, S))
            loss_of(model(tokens[index : index + 1], routed_experts=batch).logits).backward()
        found = gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert replay.counts.replayed == 2 * B * S


@families
def test_after_the_context_the_model_is_as_before(family: str) -> None:
    model, tokens = make_model(family), random_tokens(B, S)
    expected = run(model, tokens)
    hooks_before = count_hooks(model)
    state_before = {name: value.clone() for name, value in model.state_dict().items()}
    with replay_routing(model):
        assert count_hooks(model) > hooks_before
        run(model, tokens, routed_experts=full_batch(model, random_rows(model, B * S)))
        native = run(model, tokens, routed_experts=None)
    assert count_hooks(model) == hooks_before
    assert_equal(state_before, model.state_dict())
    after = run(model, tokens)
    for found in (native, after):
        assert torch.equal(found[0], expected[0])
        assert_equal(found[1], expected[1])


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in LIKE_DEEPSEEK])
def test_router_logits_and_auxiliary_loss_are_the_router_s_own(family: str) -> None:
    """The balance loss judges the router by its logits, which replay does not touch in the first MoE layer."""
    model, tokens = make_model(family), random_tokens(B, S)
    native = model(tokens, output_router_logits=True, labels=tokens)
    with replay_routing(model):
        batch = full_batch(model, native_rows(model, input_ids=tokens, routed_experts=None))
        own = model(tokens, output_router_logits=True, labels=tokens, routed_experts=batch)
        batch = full_batch(model, random_rows(model, B * S))
        other = model(tokens, output_router_logits=True, labels=tokens, routed_experts=batch)
        other.aux_loss.backward()
    assert torch.equal(native.aux_loss, own.aux_loss) and torch.equal(native.loss, own.loss)
    assert len(other.router_logits) == len(layer_ids(model))
    assert torch.equal(native.router_logits[0], other.router_logits[0])
    for layer in moe_layers(model):
        assert router_of(layer.mlp).weight.grad.abs().sum() > 0


def test_a_trainer_needs_no_engine() -> None:
    script = (
        "import sys, waybill.engine.routing.replay;"
        "names = [name for name in sys.modules if name.startswith('waybill.') or name in ('deepspeed', 'zmq', 'fastapi')];"
        "print(*sorted(names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    replay = {f"waybill.engine.routing.replay{part}" for part in ("", ".batch", ".context", ".layers", ".routers")}
    routing = {f"waybill.engine.routing{part}" for part in ("", ".geometry", ".wire")}
    others = {"waybill.engine", "waybill.engine.io_struct", *routing}
    assert set(done.stdout.split()) == replay | others


@pytest.mark.gpu
@families
def test_on_a_gpu(family: str) -> None:
    """Own routes change nothing, any routes are obeyed, and a recomputation gets its own batch, as on a CPU."""
    model, tokens = make_model(family).to("cuda"), random_tokens(B, S).to("cuda")
    with received_by_experts(model) as received, torch.no_grad():
        expected = model(tokens).logits
    own = torch.stack([calls[0] for calls in received], dim=1).cpu().numpy().astype(np.uint8)
    rows = random_rows(model, B * S)
    with replay_routing(model):
        assert torch.equal(model(tokens, routed_experts=full_batch(model, own).to("cuda")).logits, expected)
        _, plain = run(model, tokens, routed_experts=full_batch(model, rows))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with received_by_experts(model) as received:
            _, checkpointed = run(model, tokens, routed_experts=full_batch(model, rows))
    for column, calls in enumerate(received):
        assert len(calls) == 2
        assert all(np.array_equal(ids.cpu().numpy(), rows[:, column]) for ids in calls)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name)
