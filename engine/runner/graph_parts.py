"""What the CUDA graphs of a rank's steps record: the model, and the tensors at fixed addresses that a step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...parallel.dp_attention import FixedTokens, ReplicatedTokens, TokenLayout
from ...parallel.mesh import ParallelMesh
from ..attention.backend import AttentionBackend, GraphAttentionBackend
from ..kv_cache.kv_store import KVStore
from ..kv_cache.req_to_token_pool import ReqToTokenPool
from ..models.causal_lm import CausalLM
from ..models.forward_batch import ForwardBatch
from ..routing.capturer import RoutedExpertsCapturer
from .step_tensors import TokenInputs, select_read_inputs

# Runs before a recording, so that kernels are compiled and libraries have their workspaces.
NUM_WARM_UPS = 2


@dataclass(frozen=True)
class GraphParts:
    """Legend: T tokens of a step on this dp rank, P rows of each rank between the layers, D hidden."""

    model: CausalLM
    attention: GraphAttentionBackend[Any]
    kv_store: KVStore
    pool: ReqToTokenPool
    page_size: int
    last_token_ids: torch.Tensor  # [max_requests + 1] int64
    mesh: ParallelMesh
    capturer: RoutedExpertsCapturer | None

    @property
    def device(self) -> torch.device:
        return self.last_token_ids.device

    def num_tokens(self, num_rows: int) -> int:
        """T for a graph of P rows a rank; with one dp rank every rank holds all."""
        return num_rows if self.mesh.dp.size == 1 else num_rows * self.mesh.tp.size

    def num_rows(self, num_tokens: int) -> int:
        """The inverse."""
        return num_tokens if self.mesh.dp.size == 1 else num_tokens // self.mesh.tp.size

    def new_inputs(self, num_tokens: int) -> torch.Tensor:
        """[3 or 4, T] int64, see `write_graph_inputs`; all of it padding."""
        inputs = torch.zeros(self.num_inputs, num_tokens, dtype=torch.int64, device=self.device)
        inputs[2] = self.pool.scratch_row
        return inputs

    @property
    def num_inputs(self) -> int:
        """Of a token."""
        return 3 if self.model.config.vision is None else 4

    def _layout(self, pool_rows: torch.Tensor) -> TokenLayout:
        tp = self.mesh.tp
        if self.mesh.dp.size == 1:
            return ReplicatedTokens(tp)
        return FixedTokens(self.num_rows(len(pool_rows)), tp, pool_rows == self.pool.scratch_row)

    def read(self, inputs: torch.Tensor) -> TokenInputs:
        """Of a step with these `inputs`."""
        read_inputs = select_read_inputs(self.device)
        return read_inputs(inputs, self.last_token_ids, self.pool.page_table, self.page_size)

    def forward(
        self, inputs: torch.Tensor, tokens: TokenInputs, attention: AttentionBackend[Any], plan: Any
    ) -> torch.Tensor:
        """Hidden states [T, D] of the step with these inputs."""
        positions, rows = inputs[1], inputs[2]
        layout = self._layout(rows)
        if self.capturer is not None:
            self.capturer.begin_graph(self.num_rows(len(rows)))
        batch: ForwardBatch[Any] = ForwardBatch(
            input_ids=tokens.ids,
            positions=positions,
            kv_slots=tokens.kv_slots,
            attention_plan=plan,
            layout=layout,
            sample_rows=rows,
            sampling_req_rows=rows,
            rope_positions=None if self.model.config.vision is None else inputs[3],
        )
        hidden = self.model(batch, attention, self.kv_store, self.capturer)
        if self.capturer is not None:
            self.capturer.check()
        return hidden
