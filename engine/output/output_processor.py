"""The process that files routes, makes text and ships results. No rank ever waits for what it sends.

Threads: one files - it reads step records in order, copies rows from the ring into the ledger and cuts the slices of
finished requests, and does nothing else; the output sender makes text and sends; a third answers claims. One that fails
ends the process. It runs at low priority, so that on a shared host it gives way to the ranks.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from ..disaggregation.routes_side import RoutesSide, make_routes_side
from ..io_struct import (
    BeforeEvent,
    FinishReason,
    OutputBatch,
    OutputRecord,
    ReqAdmitted,
    ReqFinished,
    ReqRetracted,
    ReqStarted,
    ReqTransferred,
    RoutingSetup,
    StepRecord,
    TokenOutput,
)
from ..ipc.critical_thread import start_critical_thread
from ..ipc.curve import CurveGuard
from ..ipc.heartbeat import Heartbeat, table_of_this_run
from ..ipc.lifeline import watch_lifeline
from ..ipc.log_rate import log_to_stderr
from ..ipc.priority import give_way
from ..ipc.record_sender import MAX_QUEUED_RECORDS
from ..ipc.sockets import Receiver, Sender
from ..routing.claims import ClaimStore
from ..routing.ledger import MissingRoutesError, RouteLedger
from ..routing.ring import RouteRing
from ..text.tokenizer_file import load_token_decoder
from .config import OutputProcessorConfig
from .expert_load import ExpertLoad
from .output_sender import OutputSender, Progress, Routes, ShipmentOrder
from .query_server import QueryServer
from .step_joiner import StepJoiner
from .transferred_routes import TransferredRoutes

logger = logging.getLogger(__name__)

# Pages travel as int32.
PAGE_BYTES = 4


@dataclass
class _ReqState:
    """What the filing thread remembers of a request."""

    started: ReqStarted
    dp_rank: int
    cached_tokens: int = 0
    num_retractions: int = 0
    admitted: bool = False
    num_output: int = 0
    # First row that has not been cut out yet.
    next_row: int = 0


class OutputProcessor:
    """Applies the step records of its dp ranks, each rank's in order. Holds no socket: orders go to the output sender.

    Its dp ranks are all of the engine's, or those of its node; the first of them records.
    """

    def __init__(
        self,
        output_sender: OutputSender,
        num_dp_ranks: int = 1,
        *,
        first_dp_rank: int = 0,
        routes_side: RoutesSide | None = None,
    ) -> None:
        self._output_sender = output_sender
        self._transferred = TransferredRoutes(routes_side)
        self._joiner = StepJoiner(tuple(range(first_dp_rank, first_dp_rank + num_dp_ranks)), recorder=first_dp_rank)
        self._page_size = 1
        self._ring: RouteRing | None = None
        # One a dp rank, where routing is on: KV slots are a rank's own.
        self._ledgers: dict[int, RouteLedger] = {}
        self._reqs: dict[str, _ReqState] = {}
        self.expert_load = ExpertLoad(num_dp_ranks)
        self.num_output_tokens = 0
        self.num_slices = 0
        self.num_rows_filed = 0
        self.num_rows_refused = 0

    def handle(self, record: OutputRecord) -> None:
        if isinstance(record, RoutingSetup):
            self._set_up(record)
        else:
            for due in self._joiner.add(record):
                self._apply(due)
            self._give_slots_back()

    def _set_up(self, setup: RoutingSetup) -> None:
        self._page_size = setup.page_size
        geometry = setup.geometry
        if geometry is None:
            return
        self._ledgers[setup.dp_rank] = RouteLedger(setup.num_pages, setup.page_size, geometry)
        self._output_sender.geometry = self.expert_load.geometry = geometry
        if setup.ring is not None:
            self._ring = RouteRing.attach(setup.ring.path, geometry, setup.ring.num_slots)

    def _give_slots_back(self) -> None:
        for seq in self._joiner.take_done():
            assert self._ring is not None, "slots are published by the rank that told where the ring is"
            self._ring.mark_filed(seq)

    def _apply(self, record: StepRecord) -> None:
        """One step, in the order that makes slices right: before, rows, outputs, after."""
        started = [event for event in record.before if isinstance(event, ReqStarted)]
        ledger = self._ledgers.get(record.dp_rank)
        for event in record.before:
            if isinstance(event, ReqTransferred):
                # An order of its own: its request may have a part in this step, too.
                order = ShipmentOrder(record.dp_rank, event.weight_version, started, [self._go_on(event, ledger)])
                self._output_sender.submit(order)
                started = []
            else:
                self._before(event, record.dp_rank, ledger)
        if ledger is not None:
            self._file(record, ledger)
        self._transferred.filed(record, ledger)
        progress: dict[str, Progress] = {}
        done = {finished.rid for finished in record.after}
        for output in record.outputs:
            progress[output.rid] = self._progress(output, is_last=output.rid in done)
        for finished in record.after:
            progress[finished.rid] = self._finish(finished, progress.get(finished.rid))
        if started or progress:
            order = ShipmentOrder(record.dp_rank, record.weight_version, started, list(progress.values()))
            self._output_sender.submit(order)

    def _progress(self, output: TokenOutput, *, is_last: bool) -> Progress:
        state = self._reqs[output.rid]
        state.num_output += len(output.token_ids)
        self.num_output_tokens += len(output.token_ids)
        routes = None
        if state.started.options.stream_routed_experts and state.num_output and not is_last:
            routes = self.maybe_collect_routed_experts(state)
        return Progress(output.rid, output, state.cached_tokens, state.num_retractions, routes=routes)

    def _go_on(self, event: ReqTransferred, ledger: RouteLedger | None) -> Progress:
        """What another engine's prefill has put out."""
        num_filed, output = self._transferred.arrived(event, ledger)
        self.num_rows_filed += num_filed
        progress = self._progress(output, is_last=event.reason is not None)
        return progress if event.reason is None else self._finish(ReqFinished(event.rid, event.reason), progress)

    def _before(self, event: BeforeEvent, dp_rank: int, ledger: RouteLedger | None) -> None:
        if isinstance(event, ReqStarted):
            self._reqs[event.rid] = _ReqState(event, dp_rank, next_row=event.options.routed_experts_start_len)
            if ledger is not None:
                options = event.options
                # Another engine is given all that there is.
                weights = options.return_router_weights or self._transferred.offers(event, ledger)
                ledger.start(event.rid, keep=options.return_routed_experts, weights=weights)
        elif isinstance(event, ReqAdmitted):
            state = self._reqs[event.rid]
            if not state.admitted:
                state.cached_tokens = len(event.cached_pages) // PAGE_BYTES * self._page_size
                state.admitted = True
            if ledger is not None:
                ledger.admit(event.rid, event.cached_pages)
            self._transferred.admitted(state.started, dp_rank, ledger)
        elif isinstance(event, ReqRetracted):
            self._reqs[event.rid].num_retractions += 1
            if ledger is not None:
                ledger.retract(event.rid)
            self._transferred.retracted(event.rid)
        elif ledger is not None:
            ledger.flush()

    def _file(self, record: StepRecord, ledger: RouteLedger) -> None:
        if not record.segments:
            return
        assert self._ring is not None and record.ring_seq >= 0, (
            "segments come with a forward, whose rows are in the ring"
        )
        num_rows = sum(segment.num_tokens for segment in record.segments)
        rows = self._ring.rows(record.ring_seq, record.first_row, num_rows)
        weights = self._ring.weights(record.ring_seq, record.first_row, num_rows)
        self.num_rows_filed += ledger.file_step(record.segments, rows, record.weight_version, weights)
        self.expert_load.offer(record.dp_rank, rows)

    def _finish(self, finished: ReqFinished, progress: Progress | None) -> Progress:
        state = self._reqs.pop(finished.rid)
        routes = self.maybe_collect_routed_experts(state, finished.reason)
        if state.dp_rank in self._ledgers:
            self._ledgers[state.dp_rank].drop(finished.rid)
        self._transferred.finished(finished)
        return Progress(
            rid=finished.rid,
            output=None if progress is None else progress.output,
            cached_tokens=state.cached_tokens,
            num_retractions=state.num_retractions,
            finish_reason=finished.reason,
            routes=routes,
        )

    def maybe_collect_routed_experts(self, state: _ReqState, reason: FinishReason | None = None) -> Routes | None:
        """The rows of a request that opted in, from its next one on; None for the others, for whom nothing is sliced.

        A request is asked for once, when it has finished (for a `reason`), or with every output if it streams its rows.
        An aborted request gets the rows it has; in int32 none where it has no token, as readers of that form count on the
        rows of all tokens but the last. A row that is missing fails the slice: the reason goes in its place.
        """
        rid, options = state.started.rid, state.started.options
        is_compact = options.routed_experts_format == "compact"
        aborted = reason is not None and reason.type == "abort"
        if not options.return_routed_experts or (aborted and not state.num_output and not is_compact):
            return None
        ledger = self._ledgers[state.dp_rank]
        seqlen = state.started.num_prompt_tokens + state.num_output
        if aborted:
            seqlen = min(seqlen, ledger.num_rows(rid) + 1)
        elif not state.num_output and is_compact:
            # A prefill only: its last token was an input, too.
            seqlen += 1
        try:
            rows = ledger.get_topk(rid, state.next_row, seqlen)
        except MissingRoutesError as error:
            self.num_rows_refused += 1
            logger.error("routed experts refused: %s", error)
            return Routes(error=str(error))
        self.num_slices += 1
        state.next_row += len(rows.rows)
        return Routes(rows)

    def counters(self) -> dict[str, int]:
        return {
            "num_output_tokens": self.num_output_tokens,
            "routed_experts_slices": self.num_slices,
            "routed_experts_rows_filed": self.num_rows_filed,
            "routed_experts_refused": self.num_rows_refused,
            "outputs_failed": self._output_sender.num_failed,
            "routed_experts_rows_shipped": self._output_sender.num_rows_shipped,
            "routed_experts_bytes_shipped": self._output_sender.num_bytes_shipped,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Waybill's output processor; started by a node's first rank")
    parser.add_argument("--config", type=Path, required=True, help="file with an OutputProcessorConfig as JSON")
    config = msgspec.json.decode(parser.parse_args().config.read_bytes(), type=OutputProcessorConfig)
    # An interrupt at the terminal is for the frontend; this process ends with its rank.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_dir = Path(config.lifeline_path).parent
    watch_lifeline(config.lifeline_path, on_death=lambda: shutil.rmtree(run_dir, ignore_errors=True))
    log_to_stderr(config.log_level, logging.Formatter("%(levelname)s output-processor %(message)s"))
    give_way(config.nice)
    # Before the first beat: it holds the interpreter, for seconds if it is large.
    decoder = load_token_decoder(config.tokenizer_path)
    if config.heartbeat_timeout_s is not None:
        Heartbeat(table_of_this_run(), "output processor", config.heartbeat_timeout_s)
    context = zmq.Context()
    guard = CurveGuard(context, (config.records_address, config.queries_address))
    claims = ClaimStore(config.claim_budget_bytes, config.claim_ttl_s, time.monotonic, config.claim_prefix)
    sender: Sender[OutputBatch] = Sender(context, config.frontend_address)
    output_sender = OutputSender(sender, decoder, claims)
    processor = OutputProcessor(
        output_sender,
        config.num_dp_ranks,
        first_dp_rank=config.first_dp_rank,
        routes_side=make_routes_side(config.transfer, config.first_dp_rank),
    )
    records: Receiver[OutputRecord] = Receiver(
        context, config.records_address, OutputRecord, max_queued=MAX_QUEUED_RECORDS
    )
    output_sender.start()
    queries = QueryServer(
        context,
        config.queries_address,
        claims,
        processor.counters,
        processor.expert_load,
        config.claim_budget_bytes,
    )
    start_critical_thread(queries.serve, "queries")

    def file_records() -> None:
        while True:
            record, _ = records.receive()
            processor.handle(record)

    # Nothing is done in order here: the process lives until it is ended, and a thread that fails ends it.
    start_critical_thread(file_records, "filing").join()
    guard.close()


if __name__ == "__main__":
    main()
