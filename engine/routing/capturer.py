"""Records which experts every token of a step was routed to and, where that is asked for, with which weights. Lives on the
recording rank alone: rank 0, or the first one of each node where every node has an output processor.

Each MoE layer writes its routes where `slot` says, as its router chooses, or hands over those of the whole world. On CPU
that is the ring slot itself; on an accelerator a buffer at a fixed address (a CUDA graph holds it), which goes to the
ring on a side stream after the forward. A layer that did not ask for its slot - a fused router that bypasses the hook,
say - fails that step: zeros are valid expert ids and must never pass for routes.
"""

from __future__ import annotations

import weakref

import torch

from ...parallel.moe.dispatch import RecordedRows
from .geometry import RouteGeometry
from .ring import RouteRing
from .step_rows import StepRows

ACQUIRE_TIMEOUT_S = 60.0


class RoutedExpertsCapturer:
    """Fills one ring slot per forward. Call order: `begin`, `slot` or `rows_of_world` once per MoE layer, `finish`,
    `publish`.

    `first_rank` and `num_ranks` say which ranks' rows are recorded where a layer has those of the whole world.

    A graph is captured between `begin_graph` and `check`, and replayed between `begin_replay` and `finish`.
    """

    def __init__(self, ring: RouteRing, device: torch.device, *, first_rank: int = 0, num_ranks: int = 1) -> None:
        self._ring = ring
        self._first_rank = first_rank
        self._num_ranks = num_ranks
        self._first_row = 0
        self._num_rows = 0
        self._seq = -1
        self._asked: list[int] = []
        self._target = StepRows(torch.empty(0), None)
        self._device_copy = None if device.type == "cpu" else DeviceCopy(ring, device)

    @property
    def fixed(self) -> RoutedExpertsCapturer:
        """What records in a CUDA graph."""
        return self

    def begin(self, num_rows: int) -> int:
        """Start a step of `num_rows` rows a rank; waits while the ring is full. Returns the step's ring sequence number."""
        self._seq = self._ring.acquire(ACQUIRE_TIMEOUT_S)
        self._first_row = num_rows * self._first_rank
        self._num_rows = num_rows = num_rows * self._num_ranks
        self._asked = []
        if self._device_copy is None:
            step = torch.from_numpy(self._ring.step(self._seq, num_rows))
            self._target = StepRows.of(step, self._ring.geometry, num_rows)
        else:
            self._target = self._device_copy.begin(num_rows)
        return self._seq

    def begin_graph(self, num_rows: int) -> None:
        """Start to capture a graph of steps of `num_rows` rows a rank; nothing goes to the ring."""
        assert self._device_copy is not None
        self._asked = []
        self._first_row = num_rows * self._first_rank
        self._target = self._device_copy.target(num_rows * self._num_ranks)

    def begin_replay(self, num_rows: int) -> int:
        """As `begin`, for a step that replays a graph: its layers asked for their slots when it was captured."""
        seq = self.begin(num_rows)
        self._asked = list(range(self._ring.geometry.num_moe_layers))
        return seq

    def slot(self, moe_layer_index: int) -> RecordedRows:
        """Where the routes [T, K] of one MoE layer go, counted among the MoE layers."""
        self._asked.append(moe_layer_index)
        return self._target.layer(moe_layer_index)

    def rows_of_world(self, moe_layer_index: int) -> RecordedRows:
        """Where the rows of the recorded ranks go, out of those of the whole world."""
        self._asked.append(moe_layer_index)
        return self._target.layer(moe_layer_index, self._first_row)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a MoE layer did not ask for its slot, or did so twice.
        """
        check_asked(self._asked, self._ring.geometry, f"step {self._seq}")

    def finish(self) -> None:
        """The forward is enqueued: check that it was recorded whole, and enqueue the copy to the host."""
        self.check()
        if self._device_copy is not None:
            self._device_copy.start(self._seq, self._num_rows)

    def publish(self, seq: int) -> None:
        """Wait until the rows of `seq` are in the ring; the step's record may be sent after that."""
        if self._device_copy is not None:
            self._device_copy.wait(seq)


def check_asked(asked: list[int], geometry: RouteGeometry, step: str) -> None:
    """
    Raises:
        RuntimeError: not every MoE layer asked for its slot once.
    """
    expected = list(range(geometry.num_moe_layers))
    if sorted(asked) != expected:
        missing = sorted(set(expected) - set(asked))
        raise RuntimeError(f"routing of {step}: MoE layers {missing} recorded nothing, or some twice")


class DeviceCopy:
    """The buffer on the device, and its way into the ring: pinned memory, a stream of its own, one copy a step."""

    def __init__(self, ring: RouteRing, device: torch.device) -> None:
        self._ring = ring
        self._buffer = torch.empty(ring.geometry.slot_bytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)
        self._copied: dict[int, torch.cuda.Event] = {}
        self._last_copy: torch.cuda.Event | None = None
        address = pin(ring)
        # Before the memory goes: another mapping may get the same address.
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address)

    def target(self, num_rows: int) -> StepRows:
        """At the buffer's start."""
        return StepRows.of(self._buffer, self._ring.geometry, num_rows)

    def begin(self, num_rows: int) -> StepRows:
        """The target of the next forward, which must not overwrite what is still being copied."""
        if self._last_copy is not None:
            torch.cuda.current_stream().wait_event(self._last_copy)
        return self.target(num_rows)

    def start(self, seq: int, num_rows: int) -> None:
        """Copy on the side stream, after the forward."""
        self._stream.wait_stream(torch.cuda.current_stream())
        step = torch.from_numpy(self._ring.step(seq, num_rows))
        with torch.cuda.stream(self._stream):
            step.copy_(self._buffer[: len(step)], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._last_copy = self._copied[seq] = event

    def wait(self, seq: int) -> None:
        self._copied.pop(seq).synchronize()


def pin(ring: RouteRing) -> int:
    """Make the ring's memory known to the driver, so that copies into it need no staging and nobody waits for them.

    Returns:
        The memory's address, for `cudaHostUnregister`.

    Raises:
        RuntimeError: the driver refuses.
    """
    memory = ring.memory
    status = torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
    if int(status) != 0:
        raise RuntimeError(f"the routing ring could not be pinned: CUDA error {int(status)}")
    return int(memory.ctypes.data)
