"""Which rank records whose rows, with one output processor for all and with one on each node."""

from __future__ import annotations

import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.replica import make_recorder, recorded_axis, slot_rows
from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.late_gather import LateRouteGather
from waybill.engine.routing.ring import RouteRing
from waybill.engine.scheduler.leader_setup import DpRankInfo
from waybill.engine.scheduler.step_limits import StepLimits
from waybill.parallel.mesh import Axis, ParallelMesh

CPU = torch.device("cpu")
DP, TP, NODE = 4, 2, 4
NUM_ROWS, TOP_K = 3, 2


def mesh_of(rank: int) -> ParallelMesh:
    """Of dp 4 x tp 2 on two nodes; without groups, so that nothing may be communicated."""
    first = rank // NODE * NODE
    return ParallelMesh(
        CPU,
        Axis("world", rank, DP * TP, None, tuple(range(DP * TP))),
        Axis("dp", rank // TP, DP, None, tuple(range(rank % TP, DP * TP, TP))),
        Axis("tp", rank % TP, TP, None, tuple(range(rank - rank % TP, rank - rank % TP + TP))),
        Axis("ep", rank, DP * TP, None, tuple(range(DP * TP))),
        Axis("node", rank - first, NODE, None, tuple(range(first, first + NODE))),
    )


def recorders(processors: str, dispatcher: str) -> dict[int, tuple[RouteRing, RoutedExpertsCapturer | LateRouteGather]]:
    """Those of the ranks that record, as `load_rank` makes them."""
    config = EngineConfig(
        model_path="m", dp_size=DP, tp_size=TP, output_processors=processors, moe_dispatcher=dispatcher
    )
    limits = StepLimits.resolve(8, 64, 4)
    found = {}
    for rank in range(DP * TP):
        mesh = mesh_of(rank)
        recorded = recorded_axis(config, mesh)
        geometry = RouteGeometry((0, 1), 2, slot_rows(limits, mesh, recorded.size), TOP_K, 16)
        ring = RouteRing.create(geometry, 2) if recorded.rank == 0 else None
        recorder = make_recorder(config, mesh, geometry, ring)
        if ring is not None:
            assert recorder is not None
            found[rank] = (ring, recorder)
    return found


@pytest.mark.parametrize(("processors", "ranks"), [("engine", [0]), ("node", [0, NODE])])
def test_the_first_rank_of_an_output_processors_ranks_records(processors: str, ranks: list[int]) -> None:
    assert list(recorders(processors, "all_gather")) == ranks == list(recorders(processors, "all_to_all"))


@pytest.mark.parametrize("processors", ["engine", "node"])
def test_out_of_the_worlds_ids_a_recorder_takes_those_of_its_ranks_alone(processors: str) -> None:
    ids = torch.arange(DP * TP * NUM_ROWS)[:, None].expand(-1, TOP_K) % 16
    for rank, (ring, recorder) in recorders(processors, "all_gather").items():
        assert isinstance(recorder, RoutedExpertsCapturer)
        seq = recorder.begin(NUM_ROWS)
        for layer in (0, 1):
            recorder.rows_of_world(layer).keep(ids, torch.zeros(len(ids), TOP_K))
        recorder.finish()
        num_ranks = DP * TP if processors == "engine" else NODE
        expected = ids[rank * NUM_ROWS :][: num_ranks * NUM_ROWS]
        assert ring.rows(seq, 0, num_ranks * NUM_ROWS).tolist() == [expected.tolist()] * 2
        # Where each leader of these ranks looks for its rows.
        for dp_rank in range(rank // TP, (rank + num_ranks) // TP):
            first = DpRankInfo(dp_rank, DP, TP, first_recorded_dp=rank // TP).first_row(NUM_ROWS)
            assert ring.rows(seq, first, 1)[0, 0, 0] == ids[dp_rank * TP * NUM_ROWS, 0]


def test_a_slot_has_room_for_the_rows_of_its_ranks_and_no_more() -> None:
    for processors, num_ranks in (("engine", DP * TP), ("node", NODE)):
        for ring, _ in recorders(processors, "all_gather").values():
            limits = StepLimits.resolve(8, 64, 4)
            assert ring.geometry.max_tokens == slot_rows(limits, mesh_of(0), 1) * num_ranks
