"""Several leaders without a model: real schedulers, mailboxes, agreement and output processor, and every message between
processes delayed as a test likes.

Nothing runs by itself. `turn` lets one leader do its next thing, `deliver` lets messages of the frontend arrive at one
leader, `file` lets records of one leader arrive at the output processor; in which order is the test's choice. A leader
that has made its proposal waits until all have, as in a collective. Every forward "routes" row i of dp rank r in step k to
the ids (r, k, i), so that a row that is shipped names the forward that it must come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import (
    RingPlace,
    RoutingSetup,
    StepRecord,
)
from waybill.engine.ipc.frontend_messages import (
    AbortReq,
    ControlReply,
    ControlReq,
    ShutdownReq,
)
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.plan import GraphSizes, NewReq, ScheduleBatch
from waybill.engine.replica import slot_rows
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
from waybill.engine.scheduler.agreement import Agreement, Proposal
from waybill.engine.scheduler.leader_setup import DpRankInfo, Endpoints
from waybill.engine.scheduler.page_manager import PageManager
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.engine.scheduler.stop_checker import StopChecker
from waybill.parallel.dp_attention import rows_per_rank
from waybill.parallel.mesh import Axis, ParallelMesh

from .dp_frontend import NUM_LAYERS, TOP_K, Frontend, Wire
from .replica_harness import EOS, FakeInbox, FakeRunner, FakeSender, FakeStep

GEOMETRY_EXPERTS = 60_000
MAX_TURNS = 20_000


class RoutingRunner(FakeRunner):
    """Also remembers, by KV slot, which row of which forward routed its token; and by request, which did so first."""

    def __init__(self, dp_rank: int, on_launch: Callable[[ScheduleBatch], None], *sizes: int) -> None:
        super().__init__(*sizes)
        self._dp_rank = dp_rank
        self._on_launch = on_launch
        self._routed: dict[int, tuple[int, int, int]] = {}
        self._beginning: set[str] = set()
        # By rid and position: the forward whose routing answers for it.
        self.first_routed: dict[str, dict[int, tuple[int, int, int]]] = {}
        self.forwards: list[tuple[int, int]] = []

    def start_req(self, req: NewReq) -> None:
        super().start_req(req)
        self._beginning.add(req.rid)

    def launch(self, batch: ScheduleBatch) -> FakeStep:
        self.forwards.append((batch.step, batch.num_rows))
        self._on_launch(batch)
        step = super().launch(batch)
        row = 0
        for scheduled in batch.reqs:
            rid = self._rids[scheduled.row]
            routed = self.first_routed.setdefault(rid, {})
            if rid in self._beginning:
                self._beginning.remove(rid)
                # What the prefix cache gave lies before its first chunk.
                for position in range(scheduled.start):
                    routed.setdefault(position, self._routed[self._slot(scheduled.row, position)])
            for position in range(scheduled.start, scheduled.start + scheduled.num_tokens):
                origin = (self._dp_rank, batch.step, row)
                self._routed[self._slot(scheduled.row, position)] = origin
                routed.setdefault(position, origin)
                row += 1
        return step


@dataclass(frozen=True)
class Applied:
    """A control operation as one leader applied it."""

    kind: str
    number: int
    num_agreements: int
    # Numbers of the requests that ran or waited anywhere when the leaders last agreed.
    alive: frozenset[int]


def graph_sizes_of(limits: StepLimits, tp_size: int) -> GraphSizes:
    """Few, so that most steps are padded."""
    most = rows_per_rank([limits.max_tokens], tp_size)
    return GraphSizes(decode=(min(2, most), min(5, most)), prefill=(min(7, most),))


class Leader:
    """One leader's loop, one thing at a time; see `Scheduler.run`."""

    def __init__(self, group: DpGroup, dp_rank: int, config: EngineConfig, num_pages: int, context_length: int) -> None:
        self._group = group
        self.dp_rank = dp_rank
        self.inbox = FakeInbox()
        self.wire = Wire(self.inbox)
        self.records, self.frontend = FakeSender(), FakeSender()
        self.num_filed = 0
        self.num_agreements = 0
        self.applied: list[Applied] = []
        self.proposal: Proposal | None = None
        self.pages = PageManager(num_pages, config.page_size, config.enable_prefix_cache)
        limits = group.limits
        sizes = (num_pages, config.page_size, limits.max_running, -(-context_length // config.page_size))
        self.runner = RoutingRunner(dp_rank, self._on_launch, *sizes, limits.max_tokens)
        self.scheduler: Scheduler[FakeStep] = Scheduler(
            config,
            limits,
            self.pages,
            StopChecker((EOS,), None),
            self.runner,
            Endpoints(self.inbox, [], self.records, self.frontend),
            # Rows are padded as for CUDA graphs.
            dp=DpRankInfo(dp_rank, config.dp_size, config.tp_size, graph_sizes=graph_sizes_of(limits, config.tp_size)),
        )
        handlers = self.scheduler._handlers
        for kind in (AbortReq, ControlReq, ShutdownReq):
            handlers[kind] = self._watched(handlers[kind])

    def _watched(self, handler: Callable[..., None]) -> Callable[..., None]:
        def handle(message: AbortReq | ControlReq | ShutdownReq) -> None:
            kind = type(message.operation if isinstance(message, ControlReq) else message).__name__
            self.applied.append(Applied(kind, message.seq, self.num_agreements, self._group.alive))
            handler(message)
            if kind == "FlushCache" and not self._group.alive:
                assert self.pages.pool.num_free == self.pages.pool.num_pages, "a flush leaves pages behind"

        return handle

    def _on_launch(self, batch: ScheduleBatch) -> None:
        assert batch.num_tokens <= self._group.rows_of_a_dp_rank(batch), "rows do not hold the tokens"
        if self.dp_rank == 0:
            self._group.record_routing(batch)

    @property
    def has_left(self) -> bool:
        return not self.scheduler._serving

    @property
    def rests(self) -> bool:
        """Asleep, and nothing there to wake it."""
        scheduler = self.scheduler
        return (
            scheduler.lockstep.is_asleep
            and not scheduler.is_awake
            and not self.inbox.messages
            and self.proposal is None
        )

    def turn(self) -> bool:
        """The next thing; whether there was one."""
        if self.has_left or self.proposal is not None or self.rests:
            return False
        self.scheduler.receive()
        if not self.has_left and self.scheduler.is_awake:
            self.proposal = self.scheduler.propose()
            self._group.try_to_agree()
        return True

    def proceed(self, agreement: Agreement) -> None:
        self.proposal = None
        self.num_agreements += 1
        self.scheduler.proceed(agreement)


def mesh_of(config: EngineConfig) -> ParallelMesh:
    """Sizes without processes."""

    def axis(name: str, size: int) -> Axis:
        return Axis(name, 0, size, None, tuple(range(size)))

    return ParallelMesh(
        torch.device("cpu"),
        axis("world", config.world_size),
        axis("dp", config.dp_size),
        axis("tp", config.tp_size),
        axis("ep", config.world_size),
        axis("node", config.world_size),
    )


class DpGroup:
    """All leaders, the frontend and the output processor."""

    def __init__(self, config: EngineConfig, num_pages: int, context_length: int = 256) -> None:
        self.config = config
        self.limits = StepLimits.resolve(config.chunked_prefill_size, context_length, config.max_running_requests)
        self.alive: frozenset[int] = frozenset()
        rows = slot_rows(self.limits, mesh_of(config), config.world_size)
        geometry = RouteGeometry(tuple(range(NUM_LAYERS)), NUM_LAYERS, rows, TOP_K, GEOMETRY_EXPERTS)
        self.ring = RouteRing.create(geometry, config.routing_ring_slots)
        self.leaders = [Leader(self, rank, config, num_pages, context_length) for rank in range(config.dp_size)]
        self.frontend = Frontend([leader.wire for leader in self.leaders])
        self.output_sender = OutputSender(self.frontend, None, ClaimStore(1 << 20, 10.0, lambda: 0.0))
        self.processor = OutputProcessor(self.output_sender, config.dp_size)
        for leader in self.leaders:
            place = RingPlace(self.ring.path, self.ring.num_slots) if leader.dp_rank == 0 else None
            self.processor.handle(RoutingSetup(leader.dp_rank, num_pages, config.page_size, geometry, place))

    def try_to_agree(self) -> None:
        """All leaders have proposed: they agree, and go on."""
        if any(leader.proposal is None for leader in self.leaders):
            return
        agreement = Agreement(tuple(leader.proposal for leader in self.leaders))
        # What the requests' own states say, apart from what the proposals claim.
        self.alive = frozenset(req.recv.seq for leader in self.leaders for req in leader.scheduler.queues.matching(""))
        # Not in dp order: rank 0 must find the ring free whoever goes first.
        for leader in reversed(self.leaders):
            leader.proceed(agreement)

    def rows_of_a_dp_rank(self, batch: ScheduleBatch) -> int:
        """With one dp rank the tokens are replicated, and there is no padding."""
        return batch.num_tokens if self.config.dp_size == 1 else batch.num_rows * self.config.tp_size

    def record_routing(self, batch: ScheduleBatch) -> None:
        """What rank 0's recorder writes: the rows of all ranks, padding included."""
        while self.ring.num_occupied >= self.ring.num_slots:
            # Rank 0 waits for the output processor, which gets record by record what was sent.
            filed = [leader.num_filed for leader in self.leaders]
            for leader in self.leaders:
                self.file(leader.dp_rank, 1)
            assert filed != [leader.num_filed for leader in self.leaders], "the ring is full and nothing is to be filed"
        seq = self.ring.acquire(0.0)
        assert seq == batch.step
        per_dp = self.rows_of_a_dp_rank(batch)
        slot = self.ring.slot(seq, per_dp * self.config.dp_size)
        for dp_rank in range(self.config.dp_size):
            rows = slot[:, dp_rank * per_dp : (dp_rank + 1) * per_dp]
            for layer in range(NUM_LAYERS):
                rows[layer, :, 0] = dp_rank * NUM_LAYERS + layer
                rows[layer, :, 1] = seq
                rows[layer, :, 2] = np.arange(per_dp)

    def file(self, dp_rank: int, count: int) -> None:
        """So many of a leader's records reach the output processor."""
        leader = self.leaders[dp_rank]
        for record in leader.records.sent[leader.num_filed : leader.num_filed + count]:
            leader.num_filed += 1
            self.processor.handle(record)
        while not self.output_sender._orders.empty():
            self.output_sender.ship(self.output_sender._orders.get())

    def file_all(self) -> None:
        for leader in self.leaders:
            self.file(leader.dp_rank, len(leader.records.sent))

    def run_until_rest(self) -> None:
        """Everything arrives; every leader gets its turns. Fails if they neither go on nor come to rest."""
        for leader in self.leaders:
            leader.wire.arrive(len(leader.wire.on_the_way))
        for _ in range(MAX_TURNS):
            if all(leader.rests or leader.has_left for leader in self.leaders):
                self.file_all()
                return
            moved = [leader.turn() for leader in self.leaders]
            assert any(moved), f"a leader waits for one that sleeps: {self.describe()}"
        raise AssertionError(f"the leaders do not come to rest: {self.describe()}")

    def describe(self) -> list[str]:
        return [f"{leader.dp_rank}: {leader.proposal} rests={leader.rests}" for leader in self.leaders]

    def expected_rows(self, rid: str) -> np.ndarray:
        """Rows [start, seqlen - 1) by the forwards that routed them first; of a prompt without an answer that of its last
        token, too, and of an aborted request those there are."""
        answer = self.frontend.answers[rid]
        routed = self.leaders[answer.dp_rank].runner.first_routed.get(rid, {})
        end = len(answer.prompt) + len(answer.token_ids) - 1
        if answer.reason is not None and answer.reason.type == "abort":
            end = min(end, len(routed))
        elif not answer.token_ids:
            end = len(answer.prompt)
        rows = np.zeros((max(0, end - answer.start), NUM_LAYERS, TOP_K), np.uint16)
        for index, position in enumerate(range(answer.start, end)):
            dp_rank, step, row = routed[position]
            for layer in range(NUM_LAYERS):
                rows[index, layer] = (dp_rank * NUM_LAYERS + layer, step, row)
        return rows

    def replies(self) -> dict[str, ControlReply]:
        found = [reply for leader in self.leaders for reply in leader.frontend.sent]
        by_op = {reply.op_id: reply for reply in found if isinstance(reply, ControlReply)}
        assert len(by_op) == len(found), "an operation was answered twice"
        return by_op

    def check_records(self) -> None:
        """Every leader has one record for every forward, and all forwards are the same ones everywhere."""
        forwards = self.leaders[0].runner.forwards
        for leader in self.leaders:
            assert leader.runner.forwards == forwards
            records: list[StepRecord] = leader.records.sent
            assert [record.step for record in records] == list(range(len(records)))
            assert [record.ring_seq for record in records if record.ring_seq >= 0] == [step for step, _ in forwards]
        assert self.ring.num_occupied == 0
        assert self.processor._joiner.num_waiting == 0
