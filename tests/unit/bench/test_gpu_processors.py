"""One host as two nodes."""

from __future__ import annotations

from gpu_processors import devices_of, node_options


def test_each_node_has_devices_of_its_own() -> None:
    assert devices_of(0, 1, 8) == "0,1,2,3,4,5,6,7"
    assert [devices_of(node, 2, 8) for node in (0, 1)] == ["0,1,2,3", "4,5,6,7"]
    assert [devices_of(node, 2, 4, "7,5,a,b") for node in (0, 1)] == ["7,5", "a,b"]


def test_nodes_meet_at_the_first_ones_address() -> None:
    assert node_options(0, 1, 7000) == []
    first, second = (dict(zip(*[iter(node_options(node, 2, 7000))] * 2, strict=True)) for node in (0, 1))
    assert first["--rdzv-endpoint"] == second["--rdzv-endpoint"] == "127.0.0.1:7000"
    assert (first["--node-rank"], second["--node-rank"]) == ("0", "1")
    assert first["--node-address"] != second["--node-address"]
