"""Records routes where no layer sees those of the whole world: each rank keeps its own, and one gather a step joins those
of the recorded ranks.

Legend: M MoE layers, P rows of each rank in this step, K experts per token.
"""

from __future__ import annotations

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import Axis
from ...parallel.moe.dispatch import RecordedRows
from .capturer import RoutedExpertsCapturer, check_asked
from .geometry import RouteGeometry
from .step_rows import StepRows


class LateRouteGather:
    """One rank's part, called as `RoutedExpertsCapturer` is. `axis` are the recorded ranks; `capturer` is there on the
    first of them."""

    def __init__(
        self,
        axis: Axis,
        geometry: RouteGeometry,
        max_rows: int,
        capturer: RoutedExpertsCapturer | None,
        device: torch.device,
    ) -> None:
        self._axis = axis
        self._geometry = geometry
        self._capturer = capturer
        self._asked: list[int] = []
        self._buffer = torch.empty(geometry.step_bytes(max_rows), dtype=torch.uint8, device=device)
        self._num_rows = 0
        self._own = StepRows(torch.empty(0), None)

    @property
    def fixed(self) -> RoutedExpertsCapturer | None:
        """What records in a CUDA graph, where the dispatcher gathers ids."""
        return self._capturer

    def begin(self, num_rows: int) -> int:
        self._asked = []
        self._num_rows = num_rows
        self._own = StepRows.of(self._buffer, self._geometry, num_rows)
        return -1 if self._capturer is None else self._capturer.begin(num_rows)

    def slot(self, moe_layer_index: int) -> RecordedRows:
        self._asked.append(moe_layer_index)
        return self._own.layer(moe_layer_index)

    def rows_of_world(self, moe_layer_index: int) -> RecordedRows:
        raise AssertionError("a dispatcher that gathers ids needs no late gather")

    def finish(self) -> None:
        """Join the rows [M, P, K] of the axis' ranks; as bytes, which every backend can carry.

        Raises:
            RuntimeError: a layer of this rank did not ask for its slot: what it left there last must not pass for routes.
        """
        check_asked(self._asked, self._geometry, "a late gather")
        own = self._buffer[: self._geometry.step_bytes(self._num_rows)]
        gathered = all_gather(own[None], self._axis)
        if self._capturer is None:
            return
        parts = StepRows.of(gathered, self._geometry, self._num_rows)
        for layer in range(self._geometry.num_moe_layers):
            slot = self._capturer.slot(layer)
            slot.ids.copy_(parts.ids[:, layer].flatten(0, 1))
            if parts.weights is not None:
                slot.keep_weights(parts.weights[:, layer].flatten(0, 1))
        self._capturer.finish()

    def publish(self, seq: int) -> None:
        if self._capturer is not None:
            self._capturer.publish(seq)
