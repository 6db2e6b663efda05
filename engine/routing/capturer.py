"""Records which experts every token of a step was routed to. Lives on rank 0 alone.

Each MoE layer hands its ids in as soon as its router has chosen. On CPU they are written into the ring slot itself; on
an accelerator into one fixed-address buffer (which a CUDA graph may hold), copied to the ring on a side stream after the
forward. A layer that did not record in a step - a fused router that bypasses the hook, say - fails that step: zeros are
valid expert ids and must never pass for routes.
"""

from __future__ import annotations

import torch

from .ring import RouteRing

ACQUIRE_TIMEOUT_S = 60.0


class RoutedExpertsCapturer:
    """Fills one ring slot per forward. Call order: `begin`, `record` once per MoE layer, `finish`, `publish`."""

    def __init__(self, ring: RouteRing, device: torch.device) -> None:
        self._ring = ring
        self._num_tokens = 0
        self._seq = -1
        self._recorded: list[int] = []
        self._on_device = device.type != "cpu"
        geometry = ring.geometry
        shape = (geometry.num_moe_layers, geometry.max_tokens, geometry.top_k)
        dtype = torch.uint8 if geometry.dtype.itemsize == 1 else torch.uint16
        self._buffer = torch.empty(shape, dtype=dtype, device=device) if self._on_device else torch.empty(0)
        self._copied: dict[int, torch.cuda.Event] = {}
        self._copy_stream = torch.cuda.Stream(device) if self._on_device else None
        self._target = self._buffer

    def begin(self, num_tokens: int) -> int:
        """Start a step of `num_tokens` rows; waits while the ring is full. Returns the step's ring sequence number."""
        assert num_tokens <= self._ring.geometry.max_tokens, "the step is larger than a ring slot"
        self._seq = self._ring.acquire(ACQUIRE_TIMEOUT_S)
        self._num_tokens = num_tokens
        self._recorded = []
        if not self._on_device:
            self._target = torch.from_numpy(self._ring.slot(self._seq))
        return self._seq

    def record(self, moe_layer_index: int, ids: torch.Tensor) -> None:
        """Take the ids [T, K] of one MoE layer, counted among the MoE layers."""
        self._target[moe_layer_index, : self._num_tokens].copy_(ids)
        self._recorded.append(moe_layer_index)

    def finish(self) -> None:
        """The forward is enqueued: check that it was recorded whole, and enqueue the copy to the host.

        Raises:
            RuntimeError: a MoE layer did not record, or did so twice.
        """
        expected = list(range(self._ring.geometry.num_moe_layers))
        if sorted(self._recorded) != expected:
            missing = sorted(set(expected) - set(self._recorded))
            raise RuntimeError(f"routing of step {self._seq}: MoE layers {missing} recorded nothing, or some twice")
        if self._copy_stream is not None:
            self._copy_to_ring()

    def _copy_to_ring(self) -> None:
        """Copy on the side stream, after the forward and before the next one may overwrite the buffer."""
        assert self._copy_stream is not None
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        slot = torch.from_numpy(self._ring.slot(self._seq))
        with torch.cuda.stream(self._copy_stream):
            slot[:, : self._num_tokens].copy_(self._buffer[:, : self._num_tokens], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        torch.cuda.current_stream().wait_event(event)
        self._copied[self._seq] = event

    def publish(self, seq: int) -> None:
        """Wait until the rows of `seq` are in the ring; the step's record may be sent after that."""
        if self._on_device:
            self._copied.pop(seq).synchronize()
