"""One rank of a replica, from a mesh and a configuration to a running loop.

The tp leader runs a `Scheduler`; its peers execute the plans it sends and sleep on a socket in between, never inside a
collective, whose time-out would end them.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from ..parallel.collectives import gather_bytes
from ..parallel.dp_attention import rows_per_rank
from ..parallel.mesh import Axis, ParallelMesh
from ..parallel.moe.dispatch import SyncClock
from .config import EngineConfig
from .disaggregation.place import TransferPlace
from .disaggregation.rank_side import RankPool, make_page_transfers
from .grammar.mask_maker import MAX_MASK_THREADS, MaskMaker
from .io_struct import RingPlace, RoutingSetup
from .ipc.curve import CurveGuard
from .ipc.frontend_messages import BackendMessage, ControlReply, FrontendMessage
from .ipc.record_sender import RecordSender
from .ipc.sockets import Endpoint, Receiver, Sender
from .kv_cache.kv_store import KVStore
from .models.causal_lm import CausalLM
from .models.kept_config import load_kept_model_config
from .models.model_config import ModelConfig
from .models.registry import load_model
from .plan import PageTransfers, PeerMessage, PeerOperation, ScheduleBatch, StopPeers
from .routing.capturer import RoutedExpertsCapturer
from .routing.geometry import RouteGeometry
from .routing.late_gather import LateRouteGather
from .routing.ring import RouteRing
from .runner.device_watchdog import BOUND_S
from .runner.kv_cache_size import kv_pool_pages, peak_rss_bytes
from .runner.launched_step import LaunchedStep
from .runner.model_runner import ModelRunner
from .runner.rank_operations import RankOperations
from .scheduler.agreement import SingleRankSync
from .scheduler.dp_sync import DpSync
from .scheduler.leader_setup import DpRankInfo, Endpoints
from .scheduler.page_manager import PageManager
from .scheduler.scheduler import Scheduler
from .scheduler.step_limits import StepLimits
from .scheduler.stop_checker import StopChecker
from .scheduler.sync_stalls import freeze_garbage_collector
from .text.tokenizer_file import load_token_decoder
from .weight_sync.report import Outcome

logger = logging.getLogger(__name__)

PEER_WAIT_S = 5.0
FAREWELL_S = 2.0


class ReplicaEndpoints(msgspec.Struct, frozen=True):
    """Addresses that a rank of a replica needs; `peers` are those of tp ranks 1 and up."""

    frontend: Endpoint
    leader: Endpoint
    peers: list[Endpoint]
    records: Endpoint
    transfer: TransferPlace | None = None


@dataclass(frozen=True)
class Rank:
    """What a rank has loaded, before it knows whom it talks to."""

    config: EngineConfig
    mesh: ParallelMesh
    model_config: ModelConfig
    limits: StepLimits
    num_pages: int
    runner: ModelRunner
    geometry: RouteGeometry | None
    ring: RouteRing | None
    clock: SyncClock
    facts: dict[str, int | float | str]
    mask_maker: MaskMaker | None = None


def run_replica(config: EngineConfig, mesh: ParallelMesh, endpoints: ReplicaEndpoints) -> None:
    """Load the model and serve until the frontend says stop."""
    rank = load_rank(config, mesh)
    context = zmq.Context()
    own = endpoints.leader if rank.runner.is_leader else endpoints.peers[mesh.tp.rank - 1]
    guard = CurveGuard(context, [own])
    pool = RankPool(rank.runner.kv_store, rank.runner.model.kv_specs(), rank.model_config, rank.mesh)
    pages = make_page_transfers(config, pool, endpoints.transfer, endpoints.leader)
    freeze_garbage_collector()
    if rank.runner.is_leader:
        inbox: Receiver[FrontendMessage] = Receiver(context, own, FrontendMessage)
        peers: list[Sender[PeerMessage]] = [Sender(context, address) for address in endpoints.peers]
        records = RecordSender(context, endpoints.records)
        frontend: Sender[BackendMessage] = Sender(context, endpoints.frontend)
        operations = make_operations(rank, context, endpoints.frontend)
        make_scheduler(rank, Endpoints(inbox, peers, records, frontend), operations, pages).run()
    else:
        operations = make_operations(rank, context, endpoints.frontend)
        follow(rank.runner, operations, context, own, pages)
    # NCCL's groups cannot be left while graphs have recorded collectives of theirs.
    rank.runner.drop_graphs()
    guard.close()
    context.destroy(linger=int(FAREWELL_S * 1000))


def load_rank(config: EngineConfig, mesh: ParallelMesh) -> Rank:
    """Model, KV pool and, on the rank that records with routing on, the ring."""
    began = time.perf_counter()
    model_config = share_model_config(config, mesh)
    if config.collectives_backend == "auto":
        mesh = mesh.with_symmetric_memory(model_config.row_layout)
    context_length = resolve_context_length(config, model_config)
    limits = StepLimits.resolve(config.chunked_prefill_size, context_length, config.max_running_requests)
    clock = SyncClock()
    model = load_model(config, model_config, context_length, mesh, clock)
    num_pages = kv_pool_pages(config, context_length, model.kv_specs(), model_config.num_layers, mesh)
    kv_store = KVStore(
        model_config.num_layers,
        num_pages,
        config.page_size,
        model.kv_specs(),
        mesh.device,
        is_shared=config.disaggregation == "prefill" and config.disaggregation_transport in ("auto", "shared"),
    )
    geometry, ring = None, None
    recorded = recorded_axis(config, mesh)
    if config.enable_return_routed_experts:
        geometry = model_config.route_geometry(
            slot_rows(limits, mesh, recorded.size),
            model_config.router_weights_dtype(config.router_weights_dtype)
            if config.enable_return_router_weights
            else "",
        )
        if recorded.rank == 0:
            ring = RouteRing.create(geometry, config.routing_ring_slots)
    recorder = None if geometry is None else make_recorder(config, mesh, geometry, ring)
    masks = make_mask_maker(config, mesh, model_config)
    runner = make_runner(config, mesh, model, kv_store, limits, context_length, recorder, masks)
    facts = _facts(config, model_config, context_length, num_pages, time.perf_counter() - began)
    return Rank(config, mesh, model_config, limits, num_pages, runner, geometry, ring, clock, facts, masks)


def make_runner(
    config: EngineConfig,
    mesh: ParallelMesh,
    model: CausalLM,
    kv_store: KVStore,
    limits: StepLimits,
    context_length: int,
    recorder: RoutedExpertsCapturer | LateRouteGather | None,
    mask_maker: MaskMaker | None = None,
) -> ModelRunner:
    """What executes plans over a model and its cache; its graphs are recorded here."""
    # Under graphs all-to-all is an all-gather, see `Dispatcher.fixed`: between nodes that would carry too much.
    is_uneven = mesh.dp.size > 1 and config.moe_dispatcher == "all_to_all" and mesh.node.size < mesh.world.size
    return ModelRunner(
        mesh,
        model,
        kv_store,
        page_size=config.page_size,
        max_running=limits.max_running,
        max_tokens=limits.max_tokens,
        context_length=context_length,
        attention_backend=config.attention_backend,
        # The reference looks at ids on the host, which no graph can hold.
        use_graphs=config.experts_backend != "torch_reference" and not is_uneven,
        # A process under a debugger is given time by the heartbeat's bound.
        step_timeout_s=max(BOUND_S, config.heartbeat_timeout_s),
        capturer=recorder,
        mask_maker=mask_maker,
    )


def make_mask_maker(config: EngineConfig, mesh: ParallelMesh, model_config: ModelConfig) -> MaskMaker | None:
    """On a leader."""
    if mesh.tp.rank != 0:
        return None
    path = config.tokenizer_path or config.model_path
    # A bound rank shares its cores with none.
    sharing = mesh.node.size if config.cpu_threads_bind is None else 1
    num_threads = min(MAX_MASK_THREADS, len(os.sched_getaffinity(0)) // max(1, sharing))
    return MaskMaker(path, model_config.vocab_size, model_config.eos_token_ids, num_threads)


def share_model_config(config: EngineConfig, mesh: ParallelMesh) -> ModelConfig:
    """The checkpoint's configuration. One rank reads it for all: where it is not kept
    from an earlier start, the library that reads it takes seconds to import.

    Raises:
        ValueError: there is none, or no model file serves it; on every rank.
    """
    found: tuple[ModelConfig | None, str] = (None, "")
    if mesh.world.rank == 0:
        try:
            found = (load_kept_model_config(config), "")
        except ValueError as error:
            found = (None, str(error))
    of_all = gather_bytes(msgspec.msgpack.encode(found), mesh.world)
    model_config, refusal = msgspec.msgpack.decode(of_all[0], type=tuple[ModelConfig | None, str])
    if model_config is None:
        raise ValueError(refusal)
    return model_config


def recorded_axis(config: EngineConfig, mesh: ParallelMesh) -> Axis:
    """The ranks whose tokens' routes come to this rank's output processor; the first of them records."""
    if config.output_processors == "node":
        assert mesh.node.size % mesh.tp.size == 0, "a dp group has one output processor"
        return mesh.node
    return mesh.world


def slot_rows(limits: StepLimits, mesh: ParallelMesh, num_recorded: int) -> int:
    """Most rows that a step has over all recorded ranks."""
    if mesh.dp.size == 1:
        return limits.max_tokens
    return rows_per_rank([limits.max_tokens], mesh.tp.size) * num_recorded


def make_recorder(
    config: EngineConfig, mesh: ParallelMesh, geometry: RouteGeometry, ring: RouteRing | None
) -> RoutedExpertsCapturer | LateRouteGather | None:
    """What this rank records: with tokens replicated or gathered, one rank sees all ids; else every rank brings its own."""
    recorded = recorded_axis(config, mesh)
    if mesh.dp.size == 1:
        return None if ring is None else RoutedExpertsCapturer(ring, mesh.device)
    gathers_late = config.moe_dispatcher != "all_gather"
    capturer = None
    if ring is not None:
        capturer = RoutedExpertsCapturer(ring, mesh.device, first_rank=recorded.ranks[0], num_ranks=recorded.size)
    if not gathers_late:
        return capturer
    return LateRouteGather(recorded, geometry, geometry.max_tokens // recorded.size, capturer, mesh.device)


def make_operations(rank: Rank, context: zmq.Context[Any], frontend: Endpoint) -> RankOperations:
    """What this rank does when all are told to. What takes its time is answered over a socket of its own: the step
    thread's belongs to that thread."""

    def answer_later(op_id: str, outcome: Outcome) -> None:
        sender: Sender[BackendMessage] = Sender(context, frontend)
        sender.send(ControlReply(op_id, outcome.success, outcome.message))
        sender.flush_and_close(FAREWELL_S)

    return RankOperations(rank.runner, rank.mesh, rank.config, answer_later)


def make_scheduler(
    rank: Rank,
    endpoints: Endpoints,
    operations: RankOperations | None = None,
    page_transfers: PageTransfers | None = None,
) -> Scheduler[LaunchedStep]:
    """Wire a leader, and tell the output processor and the frontend that it is there."""
    config, dp, tp_size = rank.config, rank.mesh.dp, rank.mesh.tp.size
    first_recorded_dp = recorded_axis(config, rank.mesh).ranks[0] // tp_size
    scheduler = Scheduler(
        config,
        rank.limits,
        PageManager(rank.num_pages, config.page_size, config.enable_prefix_cache),
        StopChecker(rank.model_config.eos_token_ids, load_token_decoder(config.tokenizer_path or config.model_path)),
        rank.runner,
        endpoints,
        rank.ring,
        dp=DpRankInfo(dp.rank, dp.size, tp_size, first_recorded_dp, rank.runner.graph_sizes),
        sync=SingleRankSync() if dp.size == 1 else DpSync(dp),
        clock=rank.clock,
        operations=operations,
        mask_maker=rank.mask_maker,
        page_transfers=page_transfers,
    )
    endpoints.records.send(_routing_setup(rank))
    if dp.rank == 0:
        endpoints.frontend.send(ControlReply("ready", True, state=rank.facts))
    return scheduler


def resolve_context_length(config: EngineConfig, model_config: ModelConfig) -> int:
    """Tokens that a request may have.

    Raises:
        ValueError: more was asked for than the model has positions.
    """
    if config.context_length is None:
        return model_config.max_position_embeddings
    if config.context_length > model_config.max_position_embeddings:
        raise ValueError(
            f"context_length={config.context_length}: must be at most max_position_embeddings="
            f"{model_config.max_position_embeddings}"
        )
    return config.context_length


def follow(
    runner: ModelRunner,
    operations: RankOperations,
    context: zmq.Context[Any],
    where: Endpoint,
    pages: PageTransfers | None = None,
) -> None:
    """Execute the leader's plans and operations, in order, until it says stop."""
    inbox: Receiver[PeerMessage] = Receiver(context, where, PeerMessage)
    # As on the leader: at the first rest after the first steps.
    is_settled, has_worked = False, False
    while True:
        if not inbox.wait(PEER_WAIT_S):
            if has_worked and not is_settled:
                is_settled = True
                freeze_garbage_collector()
            continue
        has_worked = True
        message = inbox.receive_nowait()
        if isinstance(message, StopPeers):
            return
        if isinstance(message, PeerOperation):
            operations.run(message.op_id, message.operation)
        elif isinstance(message, ScheduleBatch):
            runner.result(runner.launch(message))
        elif message is not None:
            assert pages is not None
            pages.handle(message)


def _routing_setup(rank: Rank) -> RoutingSetup:
    ring = None if rank.ring is None else RingPlace(rank.ring.path, rank.ring.num_slots)
    return RoutingSetup(rank.mesh.dp.rank, rank.num_pages, rank.config.page_size, rank.geometry, ring)


def _facts(
    config: EngineConfig, model_config: ModelConfig, context_length: int, num_pages: int, load_s: float
) -> dict[str, int | float | str]:
    """What a frontend needs to know before it accepts requests."""
    return {
        "model_path": config.model_path,
        "model_type": model_config.model_type,
        "dtype": model_config.dtype_name,
        "quantization": "fp8" if model_config.is_fp8 else "none",
        "context_length": context_length,
        "vocab_size": model_config.vocab_size,
        "num_layers": model_config.num_layers,
        "num_moe_layers": len(model_config.moe.layer_ids),
        "num_experts": model_config.moe.num_experts,
        "top_k": model_config.moe.top_k,
        "dp_size": config.dp_size,
        "tp_size": config.tp_size,
        "page_size": config.page_size,
        "kv_cache_tokens": num_pages * config.page_size,
        "routing_ring_slots": config.routing_ring_slots if config.enable_return_routed_experts else 0,
        "router_weights_dtype": model_config.router_weights_dtype(config.router_weights_dtype),
        "load_s": load_s,
        "peak_rss_bytes": peak_rss_bytes(),
        **model_config.vision_facts,
    }
