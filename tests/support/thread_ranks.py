"""A model in bfloat16 on several ranks, which are threads of this process: the real layers, and the real collectives
through memory that all of them map.

Legend: T tokens of a step, L of a sequence, D hidden, V vocabulary, M MoE layers, K experts per token.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch

from support.tiny_families import FAMILIES, make_family_model
from waybill.engine.attention import AttentionBatch, make_attention_backend
from waybill.engine.kv_cache.kv_store import KVStore
from waybill.engine.models.causal_lm import CausalLM
from waybill.engine.models.forward_batch import ForwardBatch
from waybill.engine.models.model_config import ModelConfig
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.registry import build_model, family_of
from waybill.parallel.dp_attention import ReplicatedTokens
from waybill.parallel.mesh import Axis, ParallelMesh
from waybill.parallel.moe.dispatch import RecordedRows
from waybill.parallel.shared_memory import SharedMemory, memory_bytes

CPU = torch.device("cpu")
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Segment:
    """Tokens of a request, from position `start` on."""

    request: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Computed:
    """Of tokens in order: hidden states [T, D], logits [T, V], ids [T, M, K] and weights [T, M, K] of the routes."""

    hidden: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def rows(self, which: slice) -> Computed:
        return Computed(*(part[which] for part in self.parts()))

    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.logits, self.ids, self.weights

    @staticmethod
    def joined(computed: Sequence[Computed]) -> Computed:
        return Computed(*map(torch.cat, zip(*(each.parts() for each in computed), strict=True)))


class Recorder:
    """Keeps the routes of a step."""

    def __init__(self, num_layers: int, num_tokens: int, top_k: int) -> None:
        self.ids = torch.full((num_layers, num_tokens, top_k), -1, dtype=torch.int64)
        self.weights = torch.full((num_layers, num_tokens, top_k), torch.nan)

    def slot(self, moe_layer_index: int) -> RecordedRows:
        return RecordedRows(self.ids[moe_layer_index], weights=self.weights[moe_layer_index])

    def rows_of_world(self, moe_layer_index: int) -> RecordedRows:
        raise AssertionError("tokens are replicated")


def meshes(size: int) -> list[ParallelMesh]:
    """Those of all ranks of one tp group, which is the world."""
    if size == 1:
        return [ParallelMesh.single(CPU)]
    memory, ranks = mmap.mmap(-1, memory_bytes(size)), tuple(range(size))
    found = []
    for rank in ranks:
        axis = Axis("world", rank, size, None, ranks, shared=SharedMemory(memory, rank, size, TIMEOUT_S))
        others = (replace(axis, name=name) for name in ("tp", "ep", "node"))
        found.append(ParallelMesh(CPU, axis, Axis.single("dp"), *others))
    return found


def family_config(family: str, **changes: int) -> ModelConfig:
    """That of a tiny model in bfloat16."""
    hf_config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(hf_config.get_text_config(), name, value)
    return replace(family_of(family).parse_config(hf_config, "nowhere", "bfloat16"), model_type=family)


@cache
def family_state(family: str, **changes: int) -> dict[str, torch.Tensor]:
    """Its tensors, in float32."""
    state: dict[str, torch.Tensor] = make_family_model(family, **changes).state_dict()
    return state


class ThreadRanks:
    """The ranks of a model; `num_requests` of at most `max_length` tokens have room."""

    def __init__(
        self, family: str, tp_size: int, split: str, num_requests: int, max_length: int, **changes: int
    ) -> None:
        self.config = family_config(family, **changes)
        state = family_state(family, **changes)
        self._meshes = meshes(tp_size)
        self._models = [build_model(ModelContext(self.config, mesh, split), max_length) for mesh in self._meshes]
        for model in self._models:
            load(model, state)
        self._max_length = max_length
        self._table = torch.arange(num_requests * max_length, dtype=torch.int32).view(num_requests, max_length)
        self._stores = [
            KVStore(self.config.num_layers, self._table.numel(), 1, model.kv_specs(), CPU) for model in self._models
        ]
        self._pool = ThreadPoolExecutor(tp_size)

    def close(self) -> None:
        self._pool.shutdown()

    def step(self, segments: Sequence[Segment]) -> Computed:
        """What rank 0 has of all tokens; all ranks must have chosen the same experts."""
        found = list(self._pool.map(lambda rank: self._step_of(rank, segments), range(len(self._models))))
        assert all(torch.equal(each.hidden, found[0].hidden) for each in found)
        assert all(torch.equal(each.ids, found[0].ids) for each in found)
        return found[0]

    def _step_of(self, rank: int, segments: Sequence[Segment]) -> Computed:
        model, backend = self._models[rank], make_attention_backend("auto", CPU)
        lengths = [len(each.tokens) for each in segments]
        positions = torch.cat([torch.arange(s.start, s.start + n) for s, n in zip(segments, lengths, strict=True)])
        requests = torch.tensor([segment.request for segment in segments])
        slots = requests.repeat_interleave(torch.tensor(lengths)) * self._max_length + positions
        pages = AttentionBatch(
            lengths, [s.start + n for s, n in zip(segments, lengths, strict=True)], self._table, requests, 1
        )
        batch = ForwardBatch(
            torch.tensor([token for segment in segments for token in segment.tokens]),
            positions,
            slots,
            backend.plan(pages),
            ReplicatedTokens(self._meshes[rank].tp),
            torch.arange(len(positions)),
            requests,
        )
        moe = self.config.moe
        recorder = Recorder(len(moe.layer_ids), len(positions), moe.top_k)
        with torch.inference_mode():
            hidden = model(batch, backend, self._stores[rank], recorder)
            logits = model.gather_logits(model.compute_logits(hidden))
        gathered = hidden.new_empty(len(hidden), 0) if logits is None else logits
        return Computed(hidden, gathered, recorder.ids.transpose(0, 1), recorder.weights.transpose(0, 1))


def load(model: CausalLM, state: dict[str, torch.Tensor]) -> None:
    weights = model.sharded_weights() | {name: fused.weight for name, fused in model.fused_weights().items()}
    for name, tensor in state.items():
        if name in weights:
            weights[name].load(tensor)
        else:
            assert name in model.ignored_weights, name
