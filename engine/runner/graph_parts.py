"""What the CUDA graphs of a rank's steps record: the model, and the tensors at fixed addresses that a step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...parallel.dp_attention import ReplicatedTokens
from ...parallel.mesh import Axis
from ..attention.backend import AttentionBackend, GraphAttentionBackend
from ..kv_cache.kv_store import KVStore
from ..kv_cache.req_to_token_pool import ReqToTokenPool
from ..models.causal_lm import CausalLM
from ..models.forward_batch import ForwardBatch
from ..routing.capturer import RoutedExpertsCapturer
from .step_tensors import known_ids, slots_at

# Runs before a recording, so that kernels are compiled and libraries have their workspaces.
NUM_WARM_UPS = 2


@dataclass(frozen=True)
class GraphParts:
    """Legend: T tokens of a step, D hidden."""

    model: CausalLM
    attention: GraphAttentionBackend[Any]
    kv_store: KVStore
    pool: ReqToTokenPool
    page_size: int
    last_token_ids: torch.Tensor  # [max_requests + 1] int64
    axis: Axis
    capturer: RoutedExpertsCapturer | None

    @property
    def device(self) -> torch.device:
        return self.last_token_ids.device

    def forward(self, inputs: torch.Tensor, attention: AttentionBackend[Any], plan: Any) -> torch.Tensor:
        """Hidden states [T, D] of a step whose ids, positions and pool rows are `inputs` [3, T] int64."""
        ids, positions, rows = inputs
        if self.capturer is not None:
            self.capturer.begin_graph(inputs.shape[1])
        batch: ForwardBatch[Any] = ForwardBatch(
            input_ids=known_ids(ids, rows, self.last_token_ids),
            positions=positions,
            kv_slots=slots_at(self.pool.page_table, rows, positions, self.page_size),
            attention_plan=plan,
            layout=ReplicatedTokens(inputs.shape[1], self.axis),
            sample_rows=rows,
            sampling_req_rows=rows,
        )
        hidden = self.model(batch, attention, self.kv_store, self.capturer)
        if self.capturer is not None:
            self.capturer.check()
        return hidden
