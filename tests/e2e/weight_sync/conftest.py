"""Engines whose weights are updated, and the weights; shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from support.weight_updates import OPTIONS, Tensors

from waybill import Engine


@pytest.fixture(scope="session")
def base(checkpoint: str) -> Tensors:
    return load_file(f"{checkpoint}/model.safetensors")


@pytest.fixture(scope="session")
def other(base: Tensors) -> Tensors:
    """Other weights, which answer and route otherwise."""
    torch.manual_seed(7)
    return {name: (t + torch.randn(t.shape) * 0.3 * t.float().std()).to(t.dtype) for name, t in base.items()}


@pytest.fixture(scope="session")
def tp2(checkpoint: str) -> Iterator[Engine]:
    with Engine(checkpoint, tp_size=2, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="session")
def dp2(checkpoint: str) -> Iterator[Engine]:
    with Engine(checkpoint, tp_size=1, dp_size=2, **OPTIONS) as engine:
        yield engine


@pytest.fixture(params=["tp2", "dp2"])
def engine(request: pytest.FixtureRequest, checkpoint: str) -> Engine:
    """Each with the weights of the checkpoint, whatever the test before did."""
    engine: Engine = request.getfixturevalue(request.param)
    return with_base(engine, checkpoint)


@pytest.fixture
def replica(tp2: Engine, checkpoint: str) -> Engine:
    return with_base(tp2, checkpoint)


def with_base(engine: Engine, checkpoint: str) -> Engine:
    engine.abort_request(abort_all=True)
    if engine.get_server_info()["blocked"].startswith("memory"):
        engine.resume_memory_occupation()
    if engine.get_server_info()["weight_version"] != "default" or engine.get_server_info()["blocked"]:
        engine.update_weights_from_disk(checkpoint, weight_version="default")
    engine.continue_generation()
    engine.flush_cache()
    return engine
