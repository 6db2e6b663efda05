"""Two torchrun agents as two nodes, in two network namespaces where that is permitted: the same answers as on one node, one
output processor or one on each, and an end on both as soon as one is gone.

`make test` runs tensor parallelism across nodes and a death; the rest is `make test-nodes`.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server_process import ROOT, ServerProcess
from support.two_nodes import TwoNodes, TwoNodeServer, rollout_command, two_node_rollout

OPTIONS = ("--enable-return-routed-experts", "--kv-cache-tokens", "16384", "--dtype", "float32")
TIMEOUT_S = 60.0
# A host that falls silent is noticed by TCP's keep-alive; a process that ends, at once.
SILENT_DEATH_S = 12.0
DEATH_S = 8.0
# With a heartbeat of 4 s.
STOPPED_S = 40.0
PROMPTS = [list(range(3, 23)), list(range(40, 47)), [5, 9] * 30, list(range(3, 31))]

Post = Callable[[str, dict[str, Any]], httpx.Response]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    yield nodes
    nodes.close()


@contextmanager
def two_node_server(nodes: TwoNodes, *options: str) -> Iterator[TwoNodeServer]:
    server = TwoNodeServer(nodes, *OPTIONS, *options)
    try:
        yield server
    finally:
        server.kill()


def poster(nodes: TwoNodes, server: TwoNodeServer) -> Post:
    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        with nodes.inside(0):
            return httpx.post(server.url + path, json=body, timeout=TIMEOUT_S)

    return post


def here(server: ServerProcess) -> Post:
    return lambda path, body: httpx.post(server.url + path, json=body, timeout=TIMEOUT_S)


def answers(post: Post, dp_size: int, **fields: Any) -> list[dict[str, Any]]:
    """What an engine says, one request after the other, dp ranks in turn: ids, log-probabilities and routes."""
    found = []
    for index, prompt in enumerate(PROMPTS):
        response = post(
            "/generate",
            {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
                "return_routed_experts": True,
                "return_logprob": True,
                "routed_dp_rank": index % dp_size,
                **fields,
            },
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        meta = answer["meta_info"]
        wanted = ("routed_experts", "routed_experts_meta", "output_token_logprobs", "dp_rank", "cached_tokens")
        found.append({"ids": answer["output_ids"], **{key: meta[key] for key in wanted if key in meta}})
    return found


def ended(processes: list[psutil.Process], within_s: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())


def run_dirs(processes: list[psutil.Process]) -> set[str]:
    words = [word for process in processes for word in process.cmdline()]
    return {found.group() for word in words if (found := re.match(r"/.*/waybill-[^/]+", word))}


def test_tensor_parallelism_across_nodes_and_the_death_of_one(
    nodes: TwoNodes, server: ServerProcess, checkpoint: str
) -> None:
    # Others may have asked the same before.
    assert here(server)("/flush_cache", {}).status_code == 200
    expected = answers(here(server), 1)
    with two_node_server(nodes) as across:
        assert answers(poster(nodes, across), 1) == expected
        everything = across.processes(0) + across.processes(1)
        began = time.monotonic()
        # The agent alone; its rank follows, and with it the other node, idle as it is.
        across.second.kill()
        assert ended(everything, DEATH_S), "left behind on the other node"
        assert time.monotonic() - began < DEATH_S


@pytest.mark.nodes
def test_one_output_processor_on_each_node_says_what_one_for_all_says(nodes: TwoNodes) -> None:
    one = ServerProcess(*OPTIONS, "--dp", "2", "--tp", "1")
    expected = answers(here(one), 2)
    one.stop()
    with two_node_server(nodes, "--dp", "2", "--tp", "1") as engine:
        assert answers(poster(nodes, engine), 2) == expected
        engine.stop()
    with two_node_server(nodes, "--dp", "2", "--tp", "1", "--output-processors", "node") as node:
        post = poster(nodes, node)
        assert answers(post, 2) == expected
        processors = [
            [p for p in node.processes(k) if "waybill.engine.output.output_processor" in p.cmdline()] for k in (0, 1)
        ]
        assert [len(found) for found in processors] == [1, 1]
        check_claims_and_counters(nodes, node, post, expected)
        node.stop()


def check_claims_and_counters(
    nodes: TwoNodes, server: TwoNodeServer, post: Post, expected: list[dict[str, Any]]
) -> None:
    """Claims are fetched from the processor that made them; the state adds up both."""
    for dp_rank in (0, 1):
        body = {
            "input_ids": PROMPTS[dp_rank],
            "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
            "return_routed_experts": True,
            "routed_experts_delivery": "reference",
            "routed_dp_rank": dp_rank,
        }
        claim = post("/generate", body).json()["meta_info"]["routed_experts_claim"]
        assert claim.startswith(f"{dp_rank}.")
        with nodes.inside(0):
            fetched = httpx.get(f"{server.url}/routed_experts/{claim}", timeout=TIMEOUT_S)
        meta = expected[dp_rank]["routed_experts_meta"]
        assert fetched.status_code == 200
        assert len(fetched.content) == meta["rows"] * meta["num_layers"] * meta["top_k"]
    with nodes.inside(0):
        assert httpx.get(f"{server.url}/routed_experts/7.{'0' * 32}", timeout=TIMEOUT_S).status_code == 410
        state = httpx.get(f"{server.url}/get_server_info", timeout=TIMEOUT_S).json()
    assert state["routed_experts_slices"] == len(PROMPTS) + 2
    assert state["routed_experts_rows_filed"] > 0 and state["routed_experts_refused"] == 0


@pytest.mark.nodes
@pytest.mark.parametrize("processors", ["engine", "node"])
def test_the_other_dispatcher_across_nodes(nodes: TwoNodes, processors: str) -> None:
    options = ("--dp", "2", "--tp", "1", "--moe-dispatcher", "all_to_all")
    one = ServerProcess(*OPTIONS, *options)
    expected = answers(here(one), 2)
    one.stop()
    with two_node_server(nodes, *options, "--output-processors", processors) as across:
        assert answers(poster(nodes, across), 2) == expected
        across.stop()


@pytest.mark.nodes
@pytest.mark.parametrize("sizes", [("--dp", "2", "--tp", "1"), ("--dp", "1", "--tp", "2"), ("--dp", "2", "--tp", "2")])
def test_a_rollout_on_two_nodes_is_that_of_one(nodes: TwoNodes, tmp_path: Path, sizes: tuple[str, ...]) -> None:
    options = ("--conversations", "2", "--turns", "2", "--dtype", "float32", "--kv-cache-tokens", "8192", *sizes)
    command = rollout_command("--out", str(tmp_path), *options)
    one = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert one.returncode == 0, one.stdout + one.stderr
    two = json.loads(two_node_rollout(nodes, tmp_path, *options))
    assert without_times(two) == without_times(json.loads(one.stdout.splitlines()[-1]))
    assert two["stitched_equals_one_shot"] and two["rows"] > 0


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    # Which dp rank has which prompt cached depends on who came first.
    return {key: value for key, value in report.items() if key not in ("tokens_per_s", "cached_tokens")}


@pytest.mark.nodes
@pytest.mark.parametrize("victim", ["agent of node 0", "rank of node 1", "output processor of node 1", "cable"])
def test_whatever_ends_ends_both_nodes(nodes: TwoNodes, victim: str) -> None:
    if victim == "cable" and not nodes.has_namespaces:
        pytest.skip("two loopback addresses have no cable")
    with (
        two_node_server(nodes, "--dp", "2", "--tp", "1", "--output-processors", "node") as server,
        ExitStack() as stack,
    ):
        first, second = server.processes(0), server.processes(1)
        folders = run_dirs(first + second)
        assert len(folders) == 2
        if victim == "cable":
            stack.enter_context(nodes.cut_cable())
        elif victim == "agent of node 0":
            first[-1].kill()
        else:
            word = "waybill.launch.worker" if "rank" in victim else "waybill.engine.output.output_processor"
            next(p for p in second if word in p.cmdline()).kill()
        workers = first[:-1] + second[:-1]
        assert ended(workers, SILENT_DEATH_S if victim == "cable" else DEATH_S)
        # An agent takes a moment more to notice that its ranks are gone.
        assert ended([first[-1], second[-1]], DEATH_S)
        assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.nodes
@pytest.mark.parametrize("node", [0, 1])
def test_a_node_on_which_everything_is_stopped_ends_the_other(nodes: TwoNodes, node: int) -> None:
    """Its kernel keeps every connection alive; and when it goes on it finds that the run is over."""
    with two_node_server(nodes, "--dp", "2", "--tp", "1", "--heartbeat-timeout", "4") as server:
        processes = [server.processes(0), server.processes(1)]
        for process in processes[node]:
            process.suspend()
        assert ended(processes[1 - node], STOPPED_S)
        for process in processes[node]:
            process.resume()
        assert ended(processes[node], STOPPED_S)


@pytest.mark.nodes
def test_a_node_that_is_not_where_the_others_look_for_it_says_so(nodes: TwoNodes) -> None:
    """Node 1 calls itself node 0, whose address it does not have."""
    if not nodes.has_namespaces:
        pytest.skip("every loopback address is ours")
    command = [*nodes.prefix(1), str(ROOT / "torchrun.sh"), *nodes.options(0, nodes.free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"cannot listen on {nodes.addresses[0]}" in done.stderr
