"""Prompts with images that one engine computes and another goes on with: nobody can tell the two from one. Each side has an
encoder of its own."""

from __future__ import annotations

import random
import shutil
import signal
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
    "encoder_timeout_s": 5.0,
    "disaggregation_timeout_s": 8.0,
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


def test_an_image_is_part_of_what_both_sides_must_be_asked(pair: EnginePair) -> None:
    """The same ids, with another image of as many tokens: what came would be cached as what it is not."""
    prompt, twin = prompt_of(1, random.Random(11)), make_png(*SIZES[0], seed=78)
    here, there = (fields_of(Asked(prompt, [png], 4, scores_prompt=False)) for png in (PNGS[0], twin))
    as_text = {**there, "image_data": None}
    at = prompt.index(IMAGE_PAD)
    as_text["input_ids"] = [*prompt[:at], *[IMAGE_PAD] * 15, *prompt[at + 1 :]]
    for other in (there, as_text):
        place = pair.place()
        lent = pair.submit(pair.prefill, **other, **place)
        with pytest.raises(GenerationError, match="another request there: prompt, images"):
            pair.decode.generate(**here, **place)
        lent.result()
    answer = pair.generate(**here)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert pair.prefill.generate(**here, extra_key="anew")["output_ids"] == answer["output_ids"]
    # The prefix is found by its image, on this side, and by no other.
    again, other = pair.generate(**here), pair.generate(**there)
    assert again["meta_info"]["cached_tokens"] == again["meta_info"]["prompt_tokens"] - 1
    assert other["meta_info"]["cached_tokens"] == at
    assert not np.array_equal(other["meta_info"]["routed_experts"], again["meta_info"]["routed_experts"])


def test_samples_batches_streams_and_text_beside_images(pair: EnginePair) -> None:
    rng = random.Random(12)
    asked = [Asked(prompt_of(len(each), rng), [PNGS[i] for i in each], 6) for each in ([1], [], [2, 0])]
    alone = [pair.generate(**fields_of(each), extra_key="alone") for each in asked]
    batch = fields_of(asked[0]) | {
        "input_ids": [each.prompt for each in asked],
        "image_data": [[data_uri(png) for png in each.images] for each in asked],
    }
    at_once = pair.all([fields_of(each, extra_key="at once") for each in asked])
    # The samples of a prompt have one room, and those of a batch count from one, as a list tells here.
    place = [pair.place() for _ in asked]
    rooms = {"bootstrap_room": [each["bootstrap_room"] for each in place]}
    computed = pair.submit(pair.prefill, **batch, **place[0] | rooms)
    together = pair.decode.generate(**batch, **place[0] | rooms)
    computed.result()
    for one, two, three in zip(alone, at_once, together, strict=True):
        assert one["output_ids"] == two["output_ids"] == three["output_ids"]
        np.testing.assert_array_equal(one["meta_info"]["routed_experts"], three["meta_info"]["routed_experts"])
    for sample in pair.generate(**fields_of(asked[2], params={"n": 3})):
        assert sample["output_ids"] == alone[2]["output_ids"]
    chunks = pair.stream(**fields_of(asked[2]), stream_routed_experts=True)
    rows = np.concatenate([chunk["meta_info"]["routed_experts"] for chunk in chunks])
    np.testing.assert_array_equal(rows, alone[2]["meta_info"]["routed_experts"])
    assert len(chunks) >= 6 and chunks[-1]["output_ids"] == alone[2]["output_ids"]


def test_turns_with_images_and_their_deltas(pair: EnginePair, checkpoint: Path, reference: Reference) -> None:
    """Each turn brings an image more; rows begin where the last turn's end, or within an image."""
    context, known = [1, 2, 3], np.zeros((0, 0, 0), dtype=np.uint8)
    shown: list[bytes] = []
    for turn, png in enumerate((PNGS[0], PNGS[3], PNGS[1])):
        context, shown = [*context, VISION_START, IMAGE_PAD, VISION_END, 40 + turn], [*shown, png]
        fields = fields_of(Asked(context, shown, 4, scores_prompt=False), routed_experts_start_len="auto")
        answer = pair.generate(**fields, session_id="turns")
        start = answer["meta_info"]["routed_experts_meta"]["start"]
        assert start == len(known) > 0 or turn == 0
        rows = answer["meta_info"]["routed_experts"]
        known = rows if turn == 0 else stitch(known, start, rows)
        # What comes next has all placeholders.
        height, width = SIZES[PNGS.index(png)][1] // 8, SIZES[PNGS.index(png)][0] // 8
        at = len(context) - 3
        context = [*context[:at], *[IMAGE_PAD] * (height * width), *context[at + 1 :], *answer["output_ids"]]
    asked = Asked(context, shown, 2, scores_prompt=False)
    whole = pair.generate(**fields_of(asked))
    np.testing.assert_array_equal(whole["meta_info"]["routed_experts"][: len(known)], known)
    compare(checkpoint, reference, [asked], [whole])
    within = pair.generate(**fields_of(asked), routed_experts_start_len=12)
    np.testing.assert_array_equal(within["meta_info"]["routed_experts"], whole["meta_info"]["routed_experts"][12:])


def test_weights_change_under_a_request(pair: EnginePair, checkpoint: Path) -> None:
    """It gives up its pages where it has joined, and that side computes its images' positions again: by itself."""
    # Long enough to be running still when the calls below arrive.
    asked = Asked(prompt_of(2, random.Random(13)), [PNGS[3], PNGS[0]], 100, scores_prompt=False)
    expected = pair.generate(**fields_of(asked), extra_key="before")
    before = at_rest(pair.decode)
    place = pair.place()
    computed = pair.submit(pair.prefill, **fields_of(asked), **place)
    chunks = []
    for chunk in pair.decode.generate(**fields_of(asked), stream=True, **place):
        chunks.append(chunk)
        if len(chunks) == 1:
            pair.decode.pause_generation("retract")
            pair.decode.update_weights_from_disk(str(checkpoint), weight_version="new")
            pair.decode.continue_generation()
    computed.result()
    assert chunks[-1]["output_ids"] == expected["output_ids"]
    meta = chunks[-1]["meta_info"]
    np.testing.assert_array_equal(meta["routed_experts"], expected["meta_info"]["routed_experts"])
    assert [version for version, *_ in meta["routed_experts_meta"]["weight_versions"]] == ["default", "new"]
    state = at_rest(pair.decode)
    assert state["num_retractions"] > before["num_retractions"]
    with pytest.raises(GenerationError, match="weight_version: the prefill's side ran with 'default'"):
        pair.generate(**fields_of(asked))
    pair.prefill.update_weights_from_disk(str(checkpoint), weight_version="new")
    assert pair.generate(**fields_of(asked))["output_ids"] == expected["output_ids"]
    at_rest(pair.prefill)


def until(happens: Callable[[], bool], bound_s: float = 30.0) -> None:
    end = time.monotonic() + bound_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_refused_is_refused_as_by_one(pair: EnginePair) -> None:
    for prompt, images in (([1, 2], [PNGS[0]]), ([1, IMAGE_PAD, IMAGE_PAD, 2], [PNGS[0]]), ([1, IMAGE_PAD], [b"no"])):
        refusals = []
        for engine in (pair.prefill, pair.decode):
            for more in ({}, pair.place()):
                with pytest.raises(ValueError, match="image") as refusal:
                    engine.generate(**fields_of(Asked(prompt, images)), **more)
                refusals.append(str(refusal.value))
        assert len(set(refusals)) == 1
    # A placeholder without an image is a token like any other.
    assert pair.generate(**fields_of(Asked([1, IMAGE_PAD, 2], [])))["meta_info"]["prompt_tokens"] == 3


def test_the_encoder_of_a_side_stops_dies_and_comes_with_other_weights(
    pair: EnginePair, checkpoint: Path, encoders: Encoders, tmp_path: Path
) -> None:
    """Last: the other tests need it. Whoever waits for it is answered within a bound, on both sides, and nothing is left;
    what the side has of images is enough for the requests that it goes on with."""
    rng = random.Random(14)
    known = fields_of(Asked(prompt_of(1, rng), [PNGS[0]], 4, scores_prompt=False))
    expected = pair.generate(**known)
    new = fields_of(Asked(prompt_of(1, rng), [make_png(40, 40, 90)], 4))
    encoders.of_decode.stop(signal.SIGSTOP)
    began, places = time.monotonic(), [pair.place() for _ in range(2)]
    computed = [pair.submit(pair.prefill, **new, **place) for place in places]
    aborted = pair.submit(pair.decode, rid="aborted", **new, **places[0])
    waiting = pair.submit(pair.decode, **new, **places[1])
    until(lambda: pair.decode.get_server_info()["num_images_encoding"] == 1)
    pair.decode.abort_request("aborted")
    assert aborted.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert pair.generate(**known)["output_ids"] == expected["output_ids"]
    with pytest.raises(UnavailableError, match="has not encoded an image within"):
        waiting.result()
    for each in computed:
        with pytest.raises(GenerationError, match="the decode's side has not taken it within"):
            each.result()
    assert time.monotonic() - began < OPTIONS["encoder_timeout_s"] + OPTIONS["disaggregation_timeout_s"]
    encoders.of_decode.stop(signal.SIGKILL)
    until(lambda: not pair.decode.get_server_info()["is_encoder_up"])
    with pytest.raises(UnavailableError, match="is gone"):
        pair.decode.generate(**new, **pair.place())
    assert pair.generate(**known)["output_ids"] == expected["output_ids"]
    for engine in (pair.prefill, pair.decode):
        at_rest(engine)
    with run_encoder(with_another_tower(checkpoint, tmp_path / "other"), port=encoders.port):
        until(lambda: pair.decode.get_server_info()["is_encoder_up"] == 1)
        with pytest.raises(GenerationError, match="another request there: prompt, images"):
            pair.generate(**known)
    with run_encoder(checkpoint, port=encoders.port):
        until(lambda: pair.decode.get_server_info()["is_encoder_up"] == 1)
        answer = pair.generate(**known)
        # Of another encoder it is another image for the cache, whose weights are the same again.
        assert answer["output_ids"] == expected["output_ids"]
        assert answer["meta_info"]["cached_tokens"] == known["input_ids"].index(IMAGE_PAD)
        for engine in (pair.prefill, pair.decode):
            at_rest(engine)


def with_another_tower(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(
            {name: tensor * 1.5 if name.startswith(PREFIX) else tensor for name, tensor in tensors.items()},
            file,
            {"format": "pt"},
        )
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tp_size": 2}, {"tp_size": 1}),
        ({"tp_size": 1, "page_size": 3}, {"tp_size": 2, "overlap_depth": 0}),
        ({"tp_size": 1}, {"tp_size": 1, "dp_size": 2}),
        ({"tp_size": 1, "dp_size": 2}, {"tp_size": 1, "dp_size": 2, "moe_split": "tp"}),
        ({"tp_size": 2, "chunked_prefill_size": -1}, {"tp_size": 2, "enable_prefix_cache": False}),
    ],
)
@pytest.mark.parametrize("transport", ["shared", "tcp"])
@pytest.mark.parametrize("setting", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_other_layouts(
    checkpoint: Path,
    reference: Reference,
    prefill: dict[str, Any],
    decode: dict[str, Any],
    transport: str,
    setting: Setting,
) -> None:
    """All at once, with one encoder for both sides; where the decode's pool is tight, requests give up their pages."""
    tight = {"kv_cache_tokens": 200, "page_size": 4} if setting.retract else {}
    requests = make_requests(setting)
    with run_encoder(checkpoint) as encoder:
        options = OPTIONS | {"encoder": encoder.place, "disaggregation_transport": transport}
        pair = EnginePair(str(checkpoint), prefill, decode | tight, secret=SECRET, **options)
        try:
            answers = pair.all([fields_of(asked) for asked in requests])
            print(compare(checkpoint, reference, requests, answers))
            at_rest(pair.prefill)
            state = at_rest(pair.decode)
        finally:
            pair.shutdown()
    if setting.retract and decode.get("dp_size", 1) == 1:
        assert state["num_retractions"] > 0
