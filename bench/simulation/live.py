"""The check of the virtual time: a taped run played in real time, at an engine's pace, to a real output processor process.

The player stands for all leaders: it fills the ring and sends the records when the steps end. What it sees is the ring:
when each step was filed. The answers are read by a thread and dropped.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import zmq

from waybill.engine.io_struct import OutputBatch, OutputRecord, RingPlace, RoutingSetup
from waybill.engine.ipc.sockets import Receiver, Sender
from waybill.engine.output.output_processor import OutputProcessor
from waybill.engine.output.output_sender import OutputSender
from waybill.engine.routing.claims import ClaimStore
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.ring import RouteRing
from waybill.engine.text.tokenizer_file import load_token_decoder

from .leaders import RING_SLOTS
from .rule import Rule
from .tape import Tape, TapeStep

POLL_S = 0.0002
PATIENCE_S = 120.0


@dataclass(frozen=True)
class LiveLag:
    """Seconds from a step's end to its rows being filed; ring slots occupied at the steps' ends; the processor's CPU time.
    `late_s`: what the player was late by at the end, through a full ring or its own doing."""

    behind_s: float
    max_behind_s: float
    max_slots_occupied: int
    cpu_share: float
    late_s: float


def process_records(folder: str, dp_size: int, tokenizer_path: str, cpu_s: Any) -> None:
    """The output processor's loop, both threads of it, without lifeline and queries."""
    context = zmq.Context()
    sender: Sender[OutputBatch] = Sender(context, f"ipc://{folder}/frontend")
    output_sender = OutputSender(sender, load_token_decoder(tokenizer_path), ClaimStore(1 << 20, 60.0, time.monotonic))
    processor = OutputProcessor(output_sender, dp_size)
    records: Receiver[OutputRecord] = Receiver(context, f"ipc://{folder}/records", OutputRecord)
    output_sender.start()
    while True:
        record, _ = records.receive()
        processor.handle(record)
        cpu_s.value = time.process_time()


@dataclass
class Player:
    """Plays steps into ring and socket, and notes when each ring slot was published and filed."""

    ring: RouteRing
    rule: Rule
    socket: Any
    published: list[float] = field(default_factory=list)
    filed: list[float] = field(default_factory=list)

    def look(self) -> None:
        now = time.perf_counter()
        self.filed += [now] * (self.ring.num_filed - len(self.filed))

    def launch(self, step: TapeStep) -> None:
        if not step.num_slot_rows:
            return
        while self.ring.num_occupied >= RING_SLOTS:
            self.look()
            time.sleep(POLL_S)
        slot = self.ring.slot(self.ring.acquire(PATIENCE_S), step.num_slot_rows)
        if step.places:
            rows = self.rule.table[np.concatenate(step.entries)]
            slot[:, np.concatenate(step.places)] = rows.transpose(1, 0, 2)

    def commit(self, step: TapeStep, num_forwards: int) -> None:
        for record in step.records:
            self.socket.send(record)
        if len(self.published) < num_forwards:
            self.published.append(time.perf_counter())

    def wait_until(self, when: float) -> None:
        while time.perf_counter() < when:
            self.look()
            time.sleep(POLL_S)


def drop_answers(context: zmq.Context[Any], address: str) -> None:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    while True:
        socket.recv_multipart(copy=False)


def play(
    tape: Tape, setups: list[RoutingSetup], geometry: RouteGeometry, tokenizer_path: str, forward_s: float
) -> LiveLag:
    """The taped steps, those in the middle once every `forward_s`."""
    rule = Rule()
    ring = RouteRing.create(rule.geometry(geometry.max_tokens), RING_SLOTS)
    spawn = multiprocessing.get_context("spawn")
    cpu_s = spawn.Value("d", 0.0)
    with tempfile.TemporaryDirectory(prefix="waybill-") as folder:
        process = spawn.Process(target=process_records, args=(folder, len(setups), tokenizer_path, cpu_s), daemon=True)
        process.start()
        context = zmq.Context()
        threading.Thread(target=drop_answers, args=(context, f"ipc://{folder}/frontend"), daemon=True).start()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(f"ipc://{folder}/records")
        try:
            for setup in setups:
                place = RingPlace(ring.path, ring.num_slots) if setup.ring is not None else None
                socket.send(msgspec.msgpack.encode(msgspec.structs.replace(setup, ring=place)))
            return _play_steps(Player(ring, rule, socket), tape, forward_s, cpu_s)
        finally:
            process.terminate()
            process.join()
            socket.close(linger=0)


def _play_steps(player: Player, tape: Tape, forward_s: float, cpu_s: Any) -> LiveLag:
    """A step's records follow the next step's launch, as with overlap."""
    num_forwards, first, last, occupied = 0, 0, 0, []
    began = began_cpu = late = 0.0
    for index, step in enumerate(tape.steps):
        is_timed = tape.timed_from <= index < tape.timed_to
        if index == tape.timed_from:
            while player.ring.num_filed < len(player.published):
                time.sleep(POLL_S)
            player.look()
            began, began_cpu, first = time.perf_counter(), cpu_s.value, len(player.published)
        if index == tape.timed_to:
            last = len(player.published)
            late = time.perf_counter() - began - (tape.timed_to - tape.timed_from) * forward_s
            break
        player.launch(step)
        if is_timed:
            player.wait_until(began + (index - tape.timed_from + 1) * forward_s)
            occupied.append(player.ring.num_occupied)
        player.commit(step, num_forwards)
        num_forwards += step.num_slot_rows > 0
    deadline = time.perf_counter() + PATIENCE_S
    while len(player.filed) < last and time.perf_counter() < deadline:
        player.look()
        time.sleep(POLL_S)
    behind = np.array(player.filed[first:last]) - np.array(player.published[first:last])
    wall = time.perf_counter() - began
    return LiveLag(
        behind_s=float(np.median(behind)),
        max_behind_s=float(behind.max()),
        max_slots_occupied=max(occupied),
        cpu_share=(cpu_s.value - began_cpu) / wall,
        late_s=late,
    )
