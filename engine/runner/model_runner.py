"""Executes plans on one rank; decides nothing.

Every tp rank runs the same forward. All see the same tokens, so that they cannot drift apart: the leader samples and
broadcasts them or, where a temperature is all that is asked for, the ranks choose together. They stay on the device as the
next step's input (`_last_token_ids`), whether or not the host has seen them yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from ...parallel.best_choice import best_choice
from ...parallel.collectives import broadcast
from ...parallel.dp_attention import ReplicatedTokens, ScatteredTokens, TokenLayout, rows_per_rank
from ...parallel.host_to_device import to_device
from ...parallel.mesh import Axis, ParallelMesh
from ..attention import GraphAttentionBackend, make_attention_backend
from ..grammar.mask_maker import MaskMaker
from ..kv_cache.kv_store import KVStore
from ..kv_cache.page_pool import pages_for
from ..kv_cache.req_to_token_pool import ReqToTokenPool
from ..models.causal_lm import CausalLM
from ..models.forward_batch import VisualRows
from ..plan import Draw, GraphChoice, GraphSizes, NewReq, PromptScores, ScheduleBatch, ScheduledReq, StepResult
from ..routing.capturer import RoutedExpertsCapturer
from ..routing.late_gather import LateRouteGather
from ..vision.image_memory import ImageMemory
from .decode_cuda_graphs import DecodeGraphs
from .decode_cuda_graphs import capture_sizes as decode_sizes
from .device_watchdog import BOUND_S, DeviceWatchdog
from .graph_parts import GraphParts
from .gumbel import select_choose_tokens
from .launched_step import HostCopy, LaunchedStep
from .plain_sampling import sample_plain
from .prefill_cuda_graphs import PrefillGraphs
from .prefill_cuda_graphs import capture_sizes as prefill_sizes
from .sampler import NO_TOKEN, Sampled, SamplingRow, sample, score_tokens, start_counts
from .step_tensors import Forwarded, HostBatch, lay_out, make_forward_batch, visual_rows
from .token_masks import TokenMasks

# Logits of prompt positions are made in blocks, so that scoring a prompt never holds [prompt, vocabulary] at once.
SCORE_BLOCK_ROWS = 256
# Why a request cannot go on.
NOT_FINITE = "the model's results for the prompt are not finite numbers (weights with NaN or infinite values do that)"


class ModelRunner:
    """Model, KV cache and per-request device state of one rank."""

    def __init__(
        self,
        mesh: ParallelMesh,
        model: CausalLM,
        kv_store: KVStore,
        *,
        page_size: int,
        max_running: int,
        max_tokens: int,
        context_length: int,
        attention_backend: str,
        use_graphs: bool = True,
        step_timeout_s: float = BOUND_S,
        capturer: RoutedExpertsCapturer | LateRouteGather | None,
        mask_maker: MaskMaker | None = None,
    ) -> None:
        self._mesh = mesh
        self.model = model
        self.kv_store = kv_store
        self._page_size = page_size
        self._capturer = capturer
        self._attention = make_attention_backend(attention_backend, mesh.device)
        self._choose = select_choose_tokens(mesh.device)
        self._masks = TokenMasks(mask_maker)
        config = model.config
        self._images = None if config.vision is None else ImageMemory(config.vision.num_levels, config.hidden_size)
        # On a CPU nothing is waited for but collectives, which have bounds of their own.
        self._watchdog = DeviceWatchdog(step_timeout_s) if mesh.device.type == "cuda" else nullcontext()
        num_pages = pages_for(context_length, page_size)
        self._pool = ReqToTokenPool(max_running, num_pages, kv_store.scratch_page, mesh.device)
        self._last_token_ids = torch.zeros(max_running + 1, dtype=torch.int64, device=mesh.device)
        self.graph_sizes = self._choose_graph_sizes(max_running, max_tokens) if use_graphs else GraphSizes()
        # In a graph every layer sees the ids of the whole world.
        self._graph_capturer = None if capturer is None else capturer.fixed
        self._graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self.make_graphs()
        # On the leader: what the tokens of a row are sampled by.
        self._sampling_rows: dict[int, SamplingRow] = {}

    @property
    def is_leader(self) -> bool:
        return self._mesh.tp.rank == 0

    def start_req(self, req: NewReq) -> None:
        """Leader: the request on a row changes; nothing of the one before survives."""
        sampling_row = SamplingRow(req.params, req.options, tuple(req.stop_ids), constraint=req.constraint)
        known = np.frombuffer(req.tokens, dtype="<i4")
        start_counts(sampling_row, known, req.num_prompt_tokens, self.model.config.vocab_size, self._mesh.device)
        sampling_row.position = len(known) - req.num_prompt_tokens
        self._sampling_rows[req.row] = sampling_row

    def _choose_graph_sizes(self, max_running: int, max_tokens: int) -> GraphSizes:
        """On CUDA, steps run as graphs; their collectives are part of them."""
        if self._mesh.device.type != "cuda" or not isinstance(self._attention, GraphAttentionBackend):
            return GraphSizes()
        spread = 1 if self._mesh.dp.size == 1 else self._mesh.tp.size
        return GraphSizes(
            decode_sizes(rows_per_rank([max_running], spread)), prefill_sizes(rows_per_rank([max_tokens], spread))
        )

    def make_graphs(self) -> None:
        """Record those of all sizes."""
        if not self.graph_sizes.decode:
            return
        assert isinstance(self._attention, GraphAttentionBackend)
        parts = GraphParts(
            self.model,
            self._attention,
            self.kv_store,
            self._pool,
            self._page_size,
            self._last_token_ids,
            self._mesh,
            self._graph_capturer,
        )
        self._graphs = DecodeGraphs(parts, self.graph_sizes.decode)
        self._prefill_graphs = PrefillGraphs(parts, self.graph_sizes.prefill)
        self._warm_up_sampling()

    @torch.inference_mode()
    def _warm_up_sampling(self) -> None:
        """Have the kernel compiled that chooses tokens, among this rank's and among all: else a step would wait for it."""
        config, (first, num_columns) = self.model.config, self.model.logit_columns
        hidden = torch.zeros(1, config.hidden_size, dtype=config.dtype, device=self._mesh.device)
        draws = [Draw(1.0, 0, 0)]
        choice = self._choose(self.model.compute_logits(hidden)[:, :num_columns], first, draws)
        max_running = len(self._last_token_ids) - 1
        for count in (min(1 << power, max_running) for power in range(max_running.bit_length() + 1)):
            scores, ids = (each.expand(count, -1).contiguous() for each in (choice.scores, choice.token_ids))
            best_choice(scores, ids, self._mesh.tp)
        if self.is_leader:
            logits = torch.zeros(1, config.vocab_size, device=self._mesh.device)
            sample_plain(logits, 0, config.vocab_size, draws, Axis.single(), self._choose)

    def drop_graphs(self) -> None:
        """They hold the addresses of weights and KV pool, and memory of their own."""
        self._graphs = self._prefill_graphs = None

    def launch(self, batch: ScheduleBatch) -> LaunchedStep:
        """Run one step's forward and sample; returns before the device is done."""
        with self._watchdog:
            return self._launch(batch)

    @torch.inference_mode()
    def _launch(self, batch: ScheduleBatch) -> LaunchedStep:
        writes = [(req.row, req.first_page, req.pages) for req in batch.reqs if req.pages]
        if writes:
            self._pool.write(writes)
        host = lay_out(batch)
        num_rows = batch.num_rows or batch.num_tokens
        graph = self.graph_sizes.choose(num_rows, is_decode=batch.is_decode, has_images=batch.has_images)
        if graph is not None and graph.is_decode:
            return self._replay(host, graph, batch)
        ring_seq, forwarded = self._forward(host, batch) if graph is None else self._replay_pieces(host, graph, batch)
        hidden = forwarded.hidden
        are_finite = self._check_chunks(hidden, host) if self.is_leader and host.not_sampling else None
        sampled = None
        sampling = [req for req in batch.reqs if req.sample]
        if sampling:
            logits = self.model.compute_logits(hidden[forwarded.sample_rows])
            sampled = self._sample(logits, forwarded.sampling_req_rows, sampling, batch.draws, are_finite)
        elif are_finite is not None:
            sampled = HostCopy(None, are_finite, self._mesh.device)
        scores = self._score_prompts(hidden, batch.reqs)
        return LaunchedStep(sampled, host.sampling, host.not_sampling, scores, ring_seq, graph)

    def _forward(self, host: HostBatch, batch: ScheduleBatch) -> tuple[int, Forwarded]:
        """A step without a graph: its routing's place in the ring, and hidden states."""
        layout = self._lay_out(batch)
        forward = make_forward_batch(
            host, self._pool, self._page_size, self._last_token_ids, self._attention, layout, self._visual(host, layout)
        )
        ring_seq = -1 if self._capturer is None else self._begin_capture(batch)
        hidden = self.model(forward, self._attention, self.kv_store, self._capturer)
        if self._capturer is not None:
            self._capturer.finish()
        return ring_seq, Forwarded(hidden, forward.sample_rows, forward.sampling_req_rows)

    def _replay_pieces(self, host: HostBatch, graph: GraphChoice, batch: ScheduleBatch) -> tuple[int, Forwarded]:
        """The same by a graph of steps with prefills."""
        assert self._prefill_graphs is not None, "no step runs while memory is given back"
        ring_seq = self._begin_replay(graph, batch)
        forwarded = self._prefill_graphs.run(host, graph.num_rows)
        self._finish_replay()
        return ring_seq, forwarded

    def _visual(self, host: HostBatch, layout: TokenLayout) -> VisualRows | None:
        if not host.images:
            return None
        assert self._images is not None, "images of a model that takes none are refused at the edge"
        dtype = self.model.config.dtype
        return visual_rows(host.images, len(host.input_ids), self._images, layout, self._mesh.device, dtype)

    @staticmethod
    def _check_chunks(hidden: torch.Tensor, host: HostBatch) -> torch.Tensor:
        """Whether each request that does not sample [n] may go on: its keys and values in the cache are finite. Its last
        row of `hidden` [T, D] tells, for it has seen all of them, in every layer."""
        last_rows = (np.cumsum(host.q_lens) - 1)[host.not_sampling]
        return hidden[to_device(last_rows, hidden.device)].abs().amax(dim=-1) < torch.inf

    def _lay_out(self, batch: ScheduleBatch) -> TokenLayout:
        if batch.num_rows == 0:
            return ReplicatedTokens(self._mesh.tp)
        return ScatteredTokens(batch.num_tokens, batch.num_rows, self._mesh.tp, self._mesh.device)

    def _begin_capture(self, batch: ScheduleBatch) -> int:
        assert self._capturer is not None
        return self._checked(self._capturer.begin(batch.num_rows or batch.num_tokens), batch)

    def _begin_replay(self, graph: GraphChoice, batch: ScheduleBatch) -> int:
        if self._graph_capturer is None:
            return -1
        return self._checked(self._graph_capturer.begin_replay(graph.num_rows), batch)

    @staticmethod
    def _checked(ring_seq: int, batch: ScheduleBatch) -> int:
        assert ring_seq in (-1, batch.step), "leaders tell the output processor that steps and ring slots are one count"
        return ring_seq

    def _finish_replay(self) -> None:
        if self._graph_capturer is not None:
            self._graph_capturer.finish()

    def _replay(self, host: HostBatch, graph: GraphChoice, batch: ScheduleBatch) -> LaunchedStep:
        assert self._graphs is not None, "no step runs while memory is given back"
        ring_seq = self._begin_replay(graph, batch)
        logits, req_rows = self._graphs.run(host, graph.num_rows)
        self._finish_replay()
        # A dp rank without requests is here for its experts alone.
        sampled = self._sample(logits, req_rows, batch.reqs, batch.draws) if batch.reqs else None
        return LaunchedStep(sampled, host.sampling, [], {}, ring_seq, graph)

    def _sample(
        self,
        logits: torch.Tensor,
        req_rows: torch.Tensor,
        sampling: Sequence[ScheduledReq],
        draws: Sequence[Draw],
        are_finite: torch.Tensor | None = None,
    ) -> HostCopy | None:
        """Sample by this rank's columns [N, V / n]; every rank keeps the tokens for the rows [N] of its pool, and the
        leader sends them to the host."""
        sampled: Sampled | None
        if draws:
            first, num_columns = self.model.logit_columns
            vocab_size = self.model.config.vocab_size
            sampled = sample_plain(logits[:, :num_columns], first, vocab_size, draws, self._mesh.tp, self._choose)
            self._last_token_ids[req_rows] = sampled.token_ids
        else:
            sampled = self._sample_on_leader(self.model.gather_logits(logits), req_rows, sampling)
        if not self.is_leader:
            return None
        rows = [self._sampling_rows[req.row] for req in sampling]
        for row in rows:
            row.position += 1
        constraints = {i: row.constraint for i, row in enumerate(rows) if row.constraint is not None}
        copy = HostCopy(sampled, are_finite, self._mesh.device, constraints)
        self._masks.note(copy)
        return copy

    def _sample_on_leader(
        self, logits: torch.Tensor | None, req_rows: torch.Tensor, sampling: Sequence[ScheduledReq]
    ) -> Sampled | None:
        """By all columns [N, V], which the leader has."""
        sampled = None
        token_ids = torch.empty(len(sampling), dtype=torch.int64, device=self._mesh.device)
        if logits is not None:
            rows = [self._sampling_rows[req.row] for req in sampling]
            sampled = sample(logits, rows, self._masks.take(rows))
            token_ids = sampled.token_ids
        self._last_token_ids[req_rows] = broadcast(token_ids, self._mesh.tp)
        return sampled

    def _score_prompts(self, hidden: torch.Tensor, reqs: list[ScheduledReq]) -> dict[int, PromptScores]:
        scores: dict[int, PromptScores] = {}
        offset = 0
        for index, req in enumerate(reqs):
            if req.num_prompt_logprobs:
                first = offset + req.prompt_logprobs_from
                scored = self._score_rows(hidden[first : first + req.num_prompt_logprobs], req)
                if scored is not None:
                    scores[index] = scored
            offset += req.num_tokens
        return scores

    def _score_rows(self, hidden: torch.Tensor, scheduled: ScheduledReq) -> PromptScores | None:
        """Score the prompt token that follows each row; None but on the leader. Every tp rank takes part."""
        scores = PromptScores([], [], [])
        ids = torch.from_numpy(np.frombuffer(scheduled.prompt_logprob_ids, dtype="<i4").astype(np.int64))
        for block, targets in zip(hidden.split(SCORE_BLOCK_ROWS), ids.split(SCORE_BLOCK_ROWS), strict=True):
            logits = self.model.gather_logits(self.model.compute_logits(block))
            if logits is not None:
                num_top = self._sampling_rows[scheduled.row].options.top_logprobs_num
                scores.extend(score_tokens(logits, targets.to(logits.device), num_top))
        return scores if self.is_leader else None

    def result(self, launched: LaunchedStep) -> StepResult:
        """Wait for a step and bring its tokens to the host. Publishes its routing."""
        with self._watchdog:
            return self._result(launched)

    def _result(self, launched: LaunchedStep) -> StepResult:
        token_ids: list[int] = []
        logprobs: list[float] = []
        top: list[list[tuple[float, int]]] = []
        failures = {index: NOT_FINITE for index, scores in launched.prompt_scores.items() if not scores.are_finite}
        copy = launched.sampled
        if copy is not None:
            copy.wait()
            self._masks.settle()
            if copy.are_finite is not None:
                are_finite = zip(launched.not_sampling, copy.are_finite.tolist(), strict=True)
                failures |= {index: NOT_FINITE for index, is_finite in are_finite if not is_finite}
        if copy is not None and copy.outcomes is not None:
            token_ids = copy.outcomes.tolist()
            outcomes = zip(launched.sampling, token_ids, strict=True)
            failures |= {
                index: copy.why_none(place) for place, (index, token_id) in enumerate(outcomes) if token_id == NO_TOKEN
            }
            if copy.logprobs is not None:
                logprobs = copy.logprobs.tolist()
                top = [
                    [] if pair is None else list(zip(pair[0].tolist(), pair[1].tolist(), strict=True))
                    for pair in copy.top
                ]
        if self._capturer is not None:
            self._capturer.publish(launched.ring_seq)
        return StepResult(token_ids, logprobs, top, launched.prompt_scores, failures, launched.graph)
