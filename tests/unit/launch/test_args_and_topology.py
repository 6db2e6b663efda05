"""Command lines and addresses, before anything is started."""

from __future__ import annotations

import pytest

from waybill.engine.config import EngineConfig
from waybill.launch.args import parse_worker_args
from waybill.launch.topology import Layout, one_node_addresses


def test_the_main_job_has_defaults_for_everything() -> None:
    command = parse_worker_args(["rollout"])
    assert command.config is not None and command.rollout is not None
    assert command.config.tp_size == 2 and command.config.enable_return_routed_experts
    assert command.config.model_path.endswith("examples/tiny_moe/checkpoint")
    assert command.rollout.conversations >= 2 and command.rollout.turns >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout", "--turns", "0"], "--turns 0: must be at least 1"),
        (["rollout", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["rollout", "--temperature", "-1"], "--temperature -1.0: must be at least 0"),
        (["rollout", "--tp", "0"], "--tp 0: must be at least 1"),
        (["rollout", "--page-size", "0"], "page_size=0"),
        (["rollout", "--chunked-prefill-size", "0"], "chunked_prefill_size=0: must be -1 or at least 1"),
        (["rollout", "--routing-ring-slots", "1"], "routing_ring_slots=1: must be more than overlap_depth"),
        (["rollout", "--moe-split", "rows"], "--moe-split"),
        (["rollout", "--colour"], "--colour"),
        (["sing"], "sing"),
    ],
)
def test_a_mistake_ends_with_status_2_and_names_the_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_worker_args(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "int4"}, "dtype='int4': must be one of"),
        ({"overlap_depth": 2}, "overlap_depth=2: must be 0 or 1"),
        ({"kv_memory_fraction": 1.0}, "kv_memory_fraction=1.0"),
        ({"kv_cache_tokens": 3, "page_size": 4}, "kv_cache_tokens=3: must hold at least one page of 4"),
        ({"context_length": 0}, "context_length=0"),
        ({"weight_sync_timeout_s": 0.0}, "weight_sync_timeout_s=0.0: must lie between 0 and 1e6"),
    ],
)
def test_configurations_are_checked_once(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(model_path="x", **fields)


def test_tp_ranks_of_a_replica_are_neighbours() -> None:
    places = [Layout(2, 2).place_of(rank) for rank in range(4)]
    assert [(p.dp_rank, p.tp_rank) for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [p.is_leader for p in places] == [True, False, True, False]


def test_every_socket_has_its_own_address_in_the_runs_folder() -> None:
    addresses = one_node_addresses("/tmp/run", Layout(2, 2))
    everything = [
        addresses.frontend,
        *addresses.records,
        *addresses.queries,
        *addresses.leaders,
        *[peer for peers in addresses.peers for peer in peers],
    ]
    assert len(set(everything)) == len(everything) == 7
    assert all(endpoint.address.startswith("ipc:///tmp/run/") for endpoint in everything)


def test_a_folder_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="set TMPDIR to a shorter path"):
        one_node_addresses("/tmp/" + "x" * 100, Layout(1, 1))
    # The sockets fit, but not those that torch makes between GPUs.
    one_node_addresses("/tmp/" + "x" * 83, Layout(1, 1))
    with pytest.raises(ValueError, match=r"symm_mem.* set TMPDIR to a shorter path"):
        one_node_addresses("/tmp/" + "x" * 83, Layout(1, 2))


def test_a_server_has_options_of_weight_updates() -> None:
    command = parse_worker_args(["serve", "--weight-sync-timeout", "7.5", "--weight-version", "step-0"])
    assert command.config is not None
    assert (command.config.weight_sync_timeout_s, command.config.weight_version) == (7.5, "step-0")
