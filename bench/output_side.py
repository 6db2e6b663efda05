"""What leaders that run inside a benchmark talk to: sockets, and a real output processor in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from waybill.engine.ipc.frontend_messages import BackendMessage, FrontendMessage
from waybill.engine.ipc.lifeline import Lifeline
from waybill.engine.ipc.record_sender import RecordSender
from waybill.engine.ipc.sockets import Receiver, Sender
from waybill.engine.output.config import OutputProcessorConfig
from waybill.engine.scheduler.leader_setup import Endpoints

STOP_TIMEOUT_S = 10


class Surroundings:
    """`endpoints` are a leader's, `peers` the addresses of its tp peers; requests go into `outbox`. The leader of dp rank 0
    has the output processor of all, which share the folder: what a frontend would get comes out of its `answers`."""

    def __init__(
        self, folder: str, tokenizer_path: str, peers: Sequence[str] = (), *, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self._context = zmq.Context()
        address = {name: f"ipc://{folder}/{name}" for name in (f"inbox{dp_rank}", "records", "frontend", "queries")}
        self._lifeline: Lifeline | None = None
        if dp_rank == 0:
            self._lifeline = Lifeline(f"{folder}/alive")
            self._processor = start_processor(folder, address, tokenizer_path, self._lifeline.path, dp_size)
            self.answers: Receiver[BackendMessage] = Receiver(self._context, address["frontend"], BackendMessage)
        inbox: Receiver[FrontendMessage] = Receiver(self._context, address[f"inbox{dp_rank}"], FrontendMessage)
        self.outbox: Sender[FrontendMessage] = Sender(self._context, address[f"inbox{dp_rank}"])
        records = RecordSender(self._context, address["records"])
        frontend: Sender[BackendMessage] = Sender(self._context, address["frontend"])
        self.endpoints = Endpoints(inbox, [Sender(self._context, peer) for peer in peers], records, frontend)

    def close(self) -> None:
        if self._lifeline is not None:
            self._lifeline.cut()
            self._processor.wait(STOP_TIMEOUT_S)
        self._context.destroy(linger=0)


def start_processor(
    folder: str, address: dict[str, str], tokenizer_path: str, lifeline_path: str, dp_size: int
) -> subprocess.Popen[bytes]:
    processor = OutputProcessorConfig(
        records_address=address["records"],
        frontend_address=address["frontend"],
        queries_address=address["queries"],
        tokenizer_path=tokenizer_path,
        lifeline_path=lifeline_path,
        claim_budget_bytes=1 << 20,
        claim_ttl_s=60.0,
        num_dp_ranks=dp_size,
    )
    file = Path(folder) / "output_processor.json"
    file.write_bytes(msgspec.json.encode(processor))
    return subprocess.Popen([sys.executable, "-m", "waybill.engine.output.output_processor", "--config", str(file)])
