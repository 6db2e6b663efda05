"""What every rank does in the tests of replay under DeepSpeed. Each rank also trains the whole batch alone, to compare."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, set_z3_leaf_modules
from support.replay_models import make_model, make_routes, moe_layers, random_rows, random_tokens, received_by_experts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from waybill.engine.routing.replay import RoutedExpertsBatch, leaf_module_classes, replay_routing

WORLD, MICRO_BATCHES, STEPS = 2, 2, 2
B, S = 2, 6
# A large eps: where a gradient is nearly zero, Adam would make its rounding the size of a step.
ADAM: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}


@dataclass(frozen=True)
class MicroBatch:
    """`rows` [B * (S - 1), M, K] of the positions that have one."""

    tokens: torch.Tensor
    mask: torch.Tensor
    routes: RoutedExpertsBatch
    rows: np.ndarray


def make_micro_batch(model: Any, seed: int) -> MicroBatch:
    """One sequence of full length without its first two rows, one that is shorter, padded left."""
    rows = random_rows(model, 2 * S, seed)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, :2] = 0
    routes = [make_routes(model, rows[2 : S - 1], start=2), make_routes(model, rows[S : 2 * S - 3])]
    kept = np.concatenate([rows[2 : S - 1], rows[S : 2 * S - 3]])
    return MicroBatch(random_tokens(B, S, seed), mask, RoutedExpertsBatch.from_padded(routes, mask), kept)


def loss_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    logits = model(batch.tokens, attention_mask=batch.mask, use_cache=False, routed_experts=batch.routes).logits
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    return -(logprobs * batch.mask[:, 1:]).mean()


def all_micro_batches(model: Any, step: int) -> list[list[MicroBatch]]:
    """By rank."""
    return [
        [make_micro_batch(model, 100 * step + 10 * rank + i) for i in range(MICRO_BATCHES)] for rank in range(WORLD)
    ]


@cache
def train_alone(family: str) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Gradients of every step and the weights at the end, of one process that sees the batches of all ranks."""
    model = make_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    gradients = []
    with replay_routing(model):
        for step in range(STEPS):
            batches = [batch for rank in all_micro_batches(model, step) for batch in rank]
            torch.stack([loss_of(model, batch) for batch in batches]).mean().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
    return gradients, {name: p.detach().clone() for name, p in model.named_parameters()}


def start_engine(model: Any, stage: int) -> Any:
    if stage == 3:
        set_z3_leaf_modules(model, leaf_module_classes(model))
    config = {
        "train_micro_batch_size_per_gpu": B,
        "gradient_accumulation_steps": MICRO_BATCHES,
        # DeepSpeed clips at 1 if nothing is said.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), **ADAM), config=config
    )
    return engine


def train_and_compare(family: str, stage: int, checkpointing: bool) -> None:
    model = make_model(family)
    steps = [all_micro_batches(model, step)[dist.get_rank()] for step in range(STEPS)]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected_gradients, expected_weights = train_alone(family)
    engine = start_engine(model, stage)
    with replay_routing(engine) as replay:
        for step, batches in enumerate(steps):
            for batch in batches:
                with received_by_experts(model) as received:
                    engine.backward(loss_of(engine, batch))
                check_received(received, batch, num_calls=2 if checkpointing else 1)
                if engine.is_gradient_accumulation_boundary():
                    found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
                    compare(found, expected_gradients[step], f"ZeRO-{stage} gradient")
                engine.step()
    counts = steps[0][0].routes.counts
    assert counts.missing == 2 and counts.padding == 2
    assert replay.counts.missing == STEPS * MICRO_BATCHES * counts.missing
    compare(
        {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters()}, expected_weights, f"ZeRO-{stage}"
    )
    engine.destroy()


def check_received(received: list[list[torch.Tensor]], batch: MicroBatch, num_calls: int) -> None:
    """The experts were given the recorded ids, in the forward and in its recomputation."""
    has_row = batch.routes.has_row.numpy()
    for column, calls in enumerate(received):
        assert len(calls) == num_calls
        for ids in calls:
            assert np.array_equal(ids.numpy()[has_row], batch.rows[:, column])


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{what} of {name}: {text}"
        )


def check_deepspeed() -> None:
    """Everything below, in one start of the ranks."""
    prepare_deepspeed()
    check_zero_stages()
    check_torch_wrappers()
    check_autoep()


def check_zero_stages() -> None:
    """Every stage, with and without activation checkpointing; another family under the stage that partitions most."""
    for stage, checkpointing in product((1, 2, 3), (False, True)):
        train_and_compare("qwen3_moe", stage, checkpointing)
    train_and_compare("deepseek_v3", 3, True)


def check_torch_wrappers() -> None:
    """DDP and FSDP2 give the gradients of one process."""
    (expected, *_), _ = train_alone("qwen3_moe")
    for wrap in (DistributedDataParallel, shard):
        model = make_model("qwen3_moe")
        batches = all_micro_batches(model, 0)[dist.get_rank()]
        with replay_routing(wrapped := wrap(model)):
            torch.stack([loss_of(wrapped, batch) for batch in batches]).mean().backward()
        found = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in model.named_parameters()
        }
        compare(found, expected, f"{wrap.__name__}: gradient")


def shard(model: Any) -> Any:
    """Every decoder layer, then the rest, which also changes their classes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_autoep() -> None:
    """DeepSpeed's expert-parallel layers replay what the stock blocks do, with experts on one rank and on two."""
    for family, ep_size in product(("qwen3_moe", "mixtral", "deepseek_v3"), (1, WORLD)):
        model = make_model(family)
        batch = make_micro_batch(model, seed=dist.get_rank())
        with replay_routing(model):
            expected = loss_of(model, batch)
            expected.backward()
        routers = [layer.mlp.gate.weight.grad.clone() for layer in moe_layers(model)]
        model.zero_grad()
        replace_blocks(model, family, ep_size)
        with replay_routing(model) as replay:
            found = loss_of(model, batch)
            found.backward()
        assert replay.counts == batch.routes.counts
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        blocks = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, AutoEPMoELayer)]
        assert len(blocks) == len(routers) > 0
        for block, gradient in zip(blocks, routers, strict=True):
            torch.testing.assert_close(block.router.gate.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def replace_blocks(model: Any, family: str, ep_size: int) -> None:
    """What `deepspeed.initialize` does with `expert_parallel`, without its last step: DeepSpeed 0.19.8 moves the hooks for
    router logits to the new layers by a call that transformers 5.23 refuses."""
    config = parse_autoep_config(
        {"enabled": True, "autoep_size": ep_size, "preset_model": family, "use_grouped_mm": False}
    )
    auto_ep = AutoEP(model, config)
    for spec in auto_ep.ep_parser():
        layer, _ = auto_ep._replace_moe_layer_without_retarget(spec, ep_size, dist.get_rank() % ep_size)
        layer.ep_group = dist.group.WORLD if ep_size > 1 else None


def prepare_deepspeed() -> None:
    # Compiles for half a minute what training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
