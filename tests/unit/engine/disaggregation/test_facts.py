"""What must be alike in two engines of which one goes on with the other's prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.disaggregation.rank_side import RankPool
from waybill.engine.disaggregation.wire import difference
from waybill.engine.kv_cache.kv_store import KVStore, KVTensorSpec
from waybill.engine.models.model_config import ModelConfig
from waybill.engine.models.registry import load_model_config
from waybill.launch.args import EMBEDDED_MODEL
from waybill.parallel.mesh import ParallelMesh

CONFIG = EngineConfig(model_path=str(EMBEDDED_MODEL), tp_size=1)


def facts(model: ModelConfig, **options: Any) -> dict[str, str]:
    spec = KVTensorSpec("k", (2, 32), torch.bfloat16)
    store, mesh = KVStore(1, 1, 1, [spec], torch.device("cpu")), ParallelMesh.single(torch.device("cpu"))
    return RankPool(store, [spec], model, mesh).facts(msgspec.structs.replace(CONFIG, **options))


def test_whatever_changes_keys_values_or_routes_is_named() -> None:
    model = load_model_config(CONFIG)
    attention, router = model.attention, model.moe.router
    rope = dataclasses.replace(attention.rope, inv_freq=(*attention.rope.inv_freq[:-1], 0.5))
    others = {
        "rms_norm_eps": dataclasses.replace(model, rms_norm_eps=1e-5),
        "attention.rope": dataclasses.replace(model, attention=msgspec.structs.replace(attention, rope=rope)),
        "attention.windows": dataclasses.replace(
            model, attention=msgspec.structs.replace(attention, windows=(4,) * model.num_layers)
        ),
        "router.scale": dataclasses.replace(
            model, moe=dataclasses.replace(model.moe, router=dataclasses.replace(router, scale=2.0))
        ),
        "router.top_k": dataclasses.replace(
            model, moe=dataclasses.replace(model.moe, router=dataclasses.replace(router, top_k=2))
        ),
    }
    assert difference(facts(model), facts(load_model_config(CONFIG))) == ""
    for name, other in others.items():
        assert difference(facts(model), facts(other)).startswith(f"{name}: ")


@pytest.mark.parametrize("options", [{"page_size": 4}, {"kv_cache_tokens": 64}, {"chunked_prefill_size": 8}])
def test_what_may_differ(options: dict[str, Any]) -> None:
    model = load_model_config(CONFIG)
    assert difference(facts(model), facts(model, **options)) == ""
