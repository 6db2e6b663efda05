"""What a rank of the checks records, and what must stand in the ring then."""

from __future__ import annotations

import torch

from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.late_gather import LateRouteGather
from waybill.engine.routing.ring import RouteRing
from waybill.parallel.dp_attention import ScatteredTokens
from waybill.parallel.mesh import ParallelMesh
from waybill.parallel.moe.dispatch import Dispatcher


def check_recorded(
    ring: RouteRing, seq: int, rows: slice, chosen: list[list[list[int]]], used: list[torch.Tensor], where: str
) -> None:
    """Rows of the ring against the ids that each layer has chosen for them, and the weights of the whole world's rows."""
    num_rows = rows.stop - rows.start
    assert ring.rows(seq, rows.start, num_rows).tolist() == chosen, where
    weights = ring.weights(seq, rows.start, num_rows)
    assert weights is not None
    for found, of_world in zip(weights, used, strict=True):
        bits = of_world.view(torch.uint16) if of_world.dtype == torch.bfloat16 else of_world
        assert found.tobytes() == bits[rows].numpy().tobytes(), where


def make_recorder(
    mesh: ParallelMesh,
    layout: ScatteredTokens,
    top_k: int,
    dispatcher: Dispatcher,
    dtype: torch.dtype,
    num_experts: int,
    num_layers: int = 2,
) -> tuple[RouteRing | None, RoutedExpertsCapturer | LateRouteGather | None]:
    geometry = RouteGeometry(
        tuple(range(num_layers)), num_layers, layout.num_rows * mesh.world.size + 3, top_k, num_experts, str(dtype)[6:]
    )
    ring = RouteRing.create(geometry, 2) if mesh.world.rank == 0 else None
    capturer = None if ring is None else RoutedExpertsCapturer(ring, torch.device("cpu"), num_ranks=mesh.world.size)
    if dispatcher.gathers_ids:
        return ring, capturer
    return ring, LateRouteGather(mesh.world, geometry, layout.num_rows + 2, capturer, torch.device("cpu"))
