"""DeepSpeed around a stock model, with its routes replayed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import msgspec
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from policy import Mismatch, group_advantages, grpo_loss, log_ratios, make_batch
from rollouts import Rollout
from torch import nn
from transformers import AutoModelForCausalLM

from waybill.engine.routing.replay import leaf_module_classes, replay_routing
from waybill.engine.weight_sync.sender import NamedTensor, gathered_tensors


class Trainer:
    """One rank; every method is called on all ranks alike."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
        self._pad: int = model.config.pad_token_id
        if options.zero == 3:
            set_z3_leaf_modules(model, leaf_module_classes(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._num_micro_batches = (
            options.dialogues * options.samples // (options.mini_steps * dist.get_world_size() * options.micro_batch)
        )
        config = {
            "train_micro_batch_size_per_gpu": options.micro_batch,
            "gradient_accumulation_steps": self._num_micro_batches,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": options.zero},
        }
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def replaying(self) -> AbstractContextManager[Any]:
        """For the whole of the training: without it forwards take no routes."""
        return replay_routing(self._engine)

    def train(self, rollouts: list[Rollout]) -> torch.Tensor:
        """One batch, in `mini_steps` optimizer steps. Returns [kl, extreme, tokens] over all ranks, of the first of
        them: before anything was learnt from the batch."""
        options = self._options
        advantages = group_advantages(rollouts)
        order = torch.randperm(
            len(rollouts), generator=torch.Generator().manual_seed(self._engine.global_steps)
        ).tolist()
        mismatch = Mismatch()
        for mini_step in range(options.mini_steps):
            part = order[mini_step :: options.mini_steps]
            num_tokens = sum(rollouts[i].num_sampled for i in part)
            own = part[dist.get_rank() :: dist.get_world_size()]
            self._optimizer_step(
                [rollouts[i] for i in own],
                advantages[own],
                # DeepSpeed takes the mean over ranks and micro-batches.
                num_tokens / (dist.get_world_size() * self._num_micro_batches),
                mismatch if mini_step == 0 else Mismatch(),
            )
        total = mismatch.as_tensor()
        dist.all_reduce(total)
        return total

    def _optimizer_step(
        self, rollouts: list[Rollout], advantages: torch.Tensor, num_tokens: float, mismatch: Mismatch
    ) -> None:
        size = self._options.micro_batch
        for first in range(0, len(rollouts), size):
            batch = make_batch(rollouts[first : first + size], advantages[first : first + size], self._pad)
            ratios_log = log_ratios(self._engine, batch, replay=not self._options.no_replay)
            mismatch.add(ratios_log, batch.sampled)
            loss = grpo_loss(ratios_log, batch, self._options.clip, num_tokens)
            self._engine.backward(loss)
            self._engine.step()

    def tensors(self) -> Iterator[NamedTensor]:
        """The weights, whole, one after another; to be iterated to the end on every rank."""
        return gathered_tensors(self._engine.module, self._gather if self._options.zero == 3 else None)

    @staticmethod
    def _gather(parameter: nn.Parameter) -> AbstractContextManager[object]:
        return deepspeed.zero.GatheredParameters([parameter])


def share_rollouts(rollouts: list[Rollout] | None) -> list[Rollout]:
    """Rank 0's rollouts on every rank, as msgpack."""
    data = b"" if rollouts is None else msgspec.msgpack.encode(rollouts)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    payload = torch.empty(int(size), dtype=torch.uint8)
    if rollouts is not None:
        payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(payload, 0)
    return msgspec.msgpack.decode(payload.numpy().tobytes(), type=list[Rollout])
