"""Prompts with images that one engine computes and another goes on with: nobody can tell the two from one. Each side has an
encoder of its own."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.encoder_process import SECRET, EncoderProcess, run_encoder
from support.engine_pair import EnginePair, free_port
from support.image_equality import PNGS, SIZES, Asked, compare, make_requests, prompt_of
from support.reference_equality import Setting
from support.tiny_families import IMAGE_PAD, VISION_END, VISION_START, write_family
from support.tiny_images import data_uri, make_png

from waybill import Engine
from waybill.engine.encoder.tower import PREFIX
from waybill.engine.frontend.answer import GenerationError
from waybill.engine.frontend.generation_gate import UnavailableError
from waybill.engine.routing.transformers_reference import Reference
from waybill.engine.routing.wire import stitch

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "context_length": 180,
    "kv_cache_tokens": 1024,
    "page_size": 1,
    "max_running_requests": 16,
    # Images are cut by it.
    "chunked_prefill_size": 7,
    "enable_return_routed_experts": True,
    "enable_return_router_weights": True,
    "encoder_timeout_s": 8.0,
    "disaggregation_timeout_s": 12.0,
}
ROOMY = Setting(1, "ep", 7, cache=True, retract=False, depth=1)
TIGHT = Setting(1, "ep", 7, cache=True, retract=True, depth=1)
ALL = {"return_logprob": True, "return_routed_experts": True, "return_router_weights": True}
REST_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3_vl_moe", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(str(checkpoint))


@dataclass
class Encoders:
    """One for each side; that of the decode's is replaced by tests."""

    of_prefill: EncoderProcess
    of_decode: EncoderProcess
    port: int


@pytest.fixture(scope="module")
def encoders(checkpoint: Path) -> Iterator[Encoders]:
    port = free_port()
    with run_encoder(checkpoint) as one, run_encoder(checkpoint, port=port) as other:
        yield Encoders(one, other, port)


@pytest.fixture(scope="module")
def pair(checkpoint: Path, encoders: Encoders) -> Iterator[EnginePair]:
    sides = [{"encoder": each.place} for each in (encoders.of_prefill, encoders.of_decode)]
    pair = EnginePair(str(checkpoint), *sides, secret=SECRET, **OPTIONS)
    yield pair
    pair.shutdown()


def fields_of(asked: Asked, **more: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": asked.num_new_tokens, "ignore_eos": True}
    return {
        "input_ids": asked.prompt,
        "image_data": [data_uri(png) for png in asked.images],
        "sampling_params": params | more.pop("params", {}),
        "logprob_start_len": 0 if asked.scores_prompt else -1,
        **ALL,
        **more,
    }


def at_rest(engine: Engine) -> dict[str, Any]:
    """The state once nothing runs, waits or is lent; every page is then free or cached."""
    end = time.monotonic() + REST_S
    while time.monotonic() < end:
        state = engine.get_server_info()
        if state["num_running"] == state["num_waiting"] == state["num_transferring"] == 0:
            assert state["num_free_pages"] + state["num_cached_pages"] == state["num_pages"]
            assert state["num_images_encoding"] == 0
            return state
        time.sleep(0.02)
    raise AssertionError("the engine does not come to rest")


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """To the bit."""
    assert one["output_ids"] == two["output_ids"] and one["text"] == two["text"]
    assert one["meta_info"].keys() == two["meta_info"].keys()
    for name in one["meta_info"].keys() - {"id", "e2e_latency"}:
        assert np.array_equal(one["meta_info"][name], two["meta_info"][name]), name


def test_nobody_can_tell_the_pair_from_one(pair: EnginePair, checkpoint: Path, reference: Reference) -> None:
    """Scored and not, found in caches and not, an image and another one of its size: to the bit what the prefill's side
    answers where it is an engine alone, in a partition of its cache of its own."""
    requests = make_requests(ROOMY)
    answers = []
    for scored in (True, False):
        for asked in requests:
            fields = fields_of(asked) if scored else fields_of(asked) | {"logprob_start_len": -1}
            both = pair.generate(**fields, extra_key="pair")
            check_same(pair.prefill.generate(**fields, extra_key="one"), both)
            answers.append(both)
    assert answers[-1]["meta_info"]["cached_tokens"] == answers[-1]["meta_info"]["prompt_tokens"] - 1
    print(compare(checkpoint, reference, [*requests, *requests], answers))
    states = [at_rest(pair.prefill), at_rest(pair.decode)]
    assert states[0]["num_transfers"] == states[1]["num_transfers"] == len(answers)
    assert states[0]["num_images_encoded"] == states[1]["num_images_encoded"] == 5
