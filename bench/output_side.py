"""What a leader that runs inside a benchmark talks to: sockets, and a real output processor in a process of its own."""

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
    """`endpoints` are the leader's, `peers` the addresses of its tp peers; requests go into `outbox`, and what a frontend
    would get comes out of `answers`."""

    def __init__(self, folder: str, tokenizer_path: str, peers: Sequence[str] = ()) -> None:
        self._context = zmq.Context()
        address = {name: f"ipc://{folder}/{name}" for name in ("inbox", "records", "frontend", "queries")}
        self._lifeline = Lifeline(f"{folder}/alive")
        processor = OutputProcessorConfig(
            records_address=address["records"],
            frontend_address=address["frontend"],
            queries_address=address["queries"],
            tokenizer_path=tokenizer_path,
            lifeline_path=self._lifeline.path,
            claim_budget_bytes=1 << 20,
            claim_ttl_s=60.0,
        )
        file = Path(folder) / "output_processor.json"
        file.write_bytes(msgspec.json.encode(processor))
        command = [sys.executable, "-m", "waybill.engine.output.output_processor", "--config", str(file)]
        self._processor = subprocess.Popen(command)
        self.answers: Receiver[BackendMessage] = Receiver(self._context, address["frontend"], BackendMessage)
        inbox: Receiver[FrontendMessage] = Receiver(self._context, address["inbox"], FrontendMessage)
        self.outbox: Sender[FrontendMessage] = Sender(self._context, address["inbox"])
        records = RecordSender(self._context, address["records"])
        frontend: Sender[BackendMessage] = Sender(self._context, address["frontend"])
        self.endpoints = Endpoints(inbox, [Sender(self._context, peer) for peer in peers], records, frontend)

    def close(self) -> None:
        self._lifeline.cut()
        self._processor.wait(STOP_TIMEOUT_S)
        self._context.destroy(linger=0)
