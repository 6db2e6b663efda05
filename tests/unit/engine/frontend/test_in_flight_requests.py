"""Requests at the engine by the names that their callers know them by."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from waybill.engine.frontend.dp_router import DpRouter
from waybill.engine.frontend.generate_request import parse_generate_request
from waybill.engine.frontend.generation_gate import GenerationGate
from waybill.engine.frontend.in_flight_requests import InFlightRequests
from waybill.engine.frontend.leader_link import LeaderLink
from waybill.engine.frontend.sample_request import SampleRequest
from waybill.engine.io_struct import OutputOptions, SamplingParams


class Leader:
    def send(self, message: Any) -> None:
        pass

    def flush_and_close(self, timeout_s: float) -> None:
        pass


def at_engine(*asked: tuple[str | list[str], list[tuple[int, str]]]) -> InFlightRequests:
    """Of each request its `rid`, and its samples' items and names."""
    requests = InFlightRequests(LeaderLink([Leader()]), DpRouter(1), GenerationGate(1.0, lambda: 0))
    for rid, samples in asked:
        request = parse_generate_request({"input_ids": [[1], [1]], "rid": rid})
        for item, name in samples:
            sample = SampleRequest(name, item, np.array([1]), SamplingParams(max_new_tokens=1), OutputOptions())
            asyncio.run(requests.send(request, [sample]))
    return requests


def test_a_name_means_its_request_and_no_other_that_is_called_alike() -> None:
    single = [("a", [(0, "a")]), ("a_0", [(0, "a_0")]), ("a_x", [(0, "a_x")]), ("ab", [(0, "ab")])]
    requests = at_engine(*single)
    assert requests.named(["a", "nobody"]) == {"a"}
    assert requests.named(["a_0", "a_x"]) == {"a_0", "a_x"}
    requests.end("a")
    assert requests.named(["a"]) == set()


def test_a_name_means_all_samples_of_its_request_and_a_samples_own_that_one() -> None:
    requests = at_engine(
        ("n", [(0, "n_0"), (0, "n_1")]),
        ("batch", [(0, "batch_0_0"), (0, "batch_0_1"), (1, "batch_1_0")]),
        (["x", "y"], [(0, "x_0"), (0, "x_1"), (1, "y_0")]),
    )
    assert requests.named(["n"]) == {"n_0", "n_1"}
    assert requests.named(["batch"]) == {"batch_0_0", "batch_0_1", "batch_1_0"}
    assert requests.named(["x"]) == {"x_0", "x_1"}
    assert requests.named(["n_1", "y_0"]) == {"n_1", "y_0"}
