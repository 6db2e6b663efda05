"""Records routes where no layer sees those of the whole world: each rank keeps its own, and one gather a step joins those
of the recorded ranks.

Legend: M MoE layers, P rows of each rank in this step, K experts per token.
"""

from __future__ import annotations

import math

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import Axis
from ...parallel.moe.dispatch import RecordedRows
from .capturer import RoutedExpertsCapturer, check_asked
from .geometry import RouteGeometry


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
        self._shape = (geometry.num_moe_layers, max_rows, geometry.top_k)
        dtype = torch.uint8 if geometry.dtype.itemsize == 1 else torch.uint16
        self._buffer = torch.empty(math.prod(self._shape), dtype=dtype, device=device)
        self._own = torch.empty(0)

    @property
    def fixed(self) -> RoutedExpertsCapturer | None:
        """What records in a CUDA graph, where the dispatcher gathers ids."""
        return self._capturer

    def begin(self, num_rows: int) -> int:
        self._asked = []
        num_layers, _, top_k = self._shape
        shape = (num_layers, num_rows, top_k)
        self._own = self._buffer[: math.prod(shape)].view(shape)
        return -1 if self._capturer is None else self._capturer.begin(num_rows)

    def slot(self, moe_layer_index: int) -> torch.Tensor:
        self._asked.append(moe_layer_index)
        return self._own[moe_layer_index]

    def rows_of_world(self, moe_layer_index: int) -> RecordedRows:
        raise AssertionError("a dispatcher that gathers ids needs no late gather")

    def finish(self) -> None:
        """Join the rows [M, P, K] of the axis' ranks; as bytes, which every backend can carry.

        Raises:
            RuntimeError: a layer of this rank did not ask for its slot: what it left there last must not pass for routes.
        """
        check_asked(self._asked, self._geometry, "a late gather")
        parts = all_gather(self._own.view(torch.uint8)[None], self._axis).view(self._own.dtype)
        if self._capturer is None:
            return
        for layer in range(self._shape[0]):
            self._capturer.slot(layer).copy_(parts[:, layer].flatten(0, 1))
        self._capturer.finish()

    def publish(self, seq: int) -> None:
        if self._capturer is not None:
            self._capturer.publish(seq)
