"""Prompts with images: tokens, log-probabilities and the routes of all positions against `transformers` with its own vision
tower, in float32; and what follows from images for caches, sessions and answers.

The engines ask an encoder in a process of its own, as a server does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.encoder_process import SECRET, VARIABLE, EncoderProcess, run_encoder
from support.image_equality import PNGS, Asked, ask, compare, expanded, make_requests, prompt_of, shown
from support.reference_equality import Setting, make_engine
from support.tiny_families import IMAGE_PAD, VISION_START, write_family
from support.tiny_images import data_uri, make_png

from waybill import Engine
from waybill.engine.routing.hf_config import read_hf_config
from waybill.engine.routing.replay import RoutedExpertsBatch, replay_routing, routes_from_answer
from waybill.engine.routing.transformers_reference import Reference, auto_class

TP = Setting(2, "tp", 7, cache=True, retract=True, depth=1)
DP = Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=2)
MATRIX = [
    Setting(1, "ep", -1, cache=False, retract=False, depth=0),
    Setting(1, "ep", 7, cache=True, retract=True, depth=1, attention="torch_reference"),
    Setting(2, "ep", 16, cache=True, retract=False, depth=1),
    Setting(1, "tp", 7, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=2, dispatcher="all_to_all"),
    Setting(2, "ep", 16, cache=True, retract=False, depth=1, dp=2),
    Setting(2, "tp", 7, cache=True, retract=True, depth=1, dp=2),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3_vl_moe", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Iterator[EncoderProcess]:
    with run_encoder(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(str(checkpoint))


@pytest.fixture
def start(checkpoint: Path, encoder: EncoderProcess, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(VARIABLE, SECRET)

    def made(setting: Setting, **options: Any) -> Engine:
        pool = 200 if setting.retract else 4096
        return make_engine(checkpoint, setting, pool, context_length=180, encoder=encoder.place, **options)

    return made


@pytest.mark.parametrize("setting", [pytest.param(each, marks=pytest.mark.matrix) for each in (TP, *MATRIX)], ids=str)
def test_equals_transformers(setting: Setting, start: Any, checkpoint: Path, reference: Reference) -> None:
    with start(setting) as engine:
        state = check_equality(engine, setting, checkpoint, reference)
    assert (state["num_retractions"] > 0) == setting.retract
    assert state["num_images_encoded"] == 5


def check_equality(engine: Engine, setting: Setting, checkpoint: Path, reference: Reference) -> dict[str, Any]:
    requests = make_requests(setting)
    answers = ask(engine, requests)
    print(f"{setting}: {compare(checkpoint, reference, requests, answers)}")
    return engine.get_server_info()


@pytest.fixture(scope="module")
def shared(checkpoint: Path, encoder: EncoderProcess) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, SECRET)
        with make_engine(checkpoint, DP, 4096, context_length=180, encoder=encoder.place) as engine:
            yield engine


def test_equals_transformers_with_dp_attention(shared: Engine, checkpoint: Path, reference: Reference) -> None:
    check_equality(shared, DP, checkpoint, reference)


def generate(engine: Engine, prompt: Any, images: Any, **fields: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, **fields.pop("params", {})}
    return engine.generate(
        input_ids=prompt,
        image_data=images,
        sampling_params=params,
        return_routed_experts=True,
        routed_dp_rank=0,
        **fields,
    )


def test_a_prefix_is_found_by_its_image_and_no_other(shared: Engine) -> None:
    prompt = prompt_of(1, random.Random(3))
    first, again = (generate(shared, prompt, data_uri(PNGS[1])) for _ in range(2))
    other = generate(shared, prompt, data_uri(make_png(32, 32, seed=50)))
    assert first["meta_info"]["cached_tokens"] == 0
    assert again["meta_info"]["cached_tokens"] == first["meta_info"]["prompt_tokens"] - 1
    # The text before the image, and the token that begins it.
    assert other["meta_info"]["cached_tokens"] == 6
    np.testing.assert_array_equal(first["meta_info"]["routed_experts"], again["meta_info"]["routed_experts"])
    assert not np.array_equal(first["meta_info"]["routed_experts"], other["meta_info"]["routed_experts"])


def test_a_prompt_that_ends_in_an_image(shared: Engine, checkpoint: Path, reference: Reference) -> None:
    """The second time all but its last token are found, and what is left, one token that a next one is sampled for, is
    the image's."""
    prompt = [*range(20, 26), VISION_START, IMAGE_PAD]
    asked = Asked(prompt, [PNGS[0]], dp_rank=0, scores_prompt=False)
    answers = [ask(shared, [asked])[0] for _ in range(2)]
    compare(checkpoint, reference, [asked, asked], answers)
    assert answers[1]["meta_info"]["cached_tokens"] == answers[1]["meta_info"]["prompt_tokens"] - 1


def test_turns_have_all_placeholders_and_their_rows_from_a_start(shared: Engine) -> None:
    """The second turn gives the first one's ids back, with the image; rows go on within the image, or from "auto"."""
    prompt = prompt_of(1, random.Random(4))
    image = data_uri(PNGS[2])
    first = generate(shared, prompt, image, session_id="turns", routed_experts_start_len="auto")
    grid_tokens = 28
    at = prompt.index(IMAGE_PAD)
    turn = prompt[:at] + [IMAGE_PAD] * grid_tokens + prompt[at + 1 :] + first["output_ids"] + [7, 8]
    whole = generate(shared, turn, [image])
    rows = whole["meta_info"]["routed_experts"]
    within = generate(shared, turn, [image], routed_experts_start_len=at + 5)
    np.testing.assert_array_equal(within["meta_info"]["routed_experts"], rows[at + 5 :])
    num_known = first["meta_info"]["prompt_tokens"] + len(first["output_ids"]) - 1
    delta = generate(shared, turn, [image], session_id="turns", routed_experts_start_len="auto")
    np.testing.assert_array_equal(delta["meta_info"]["routed_experts"], rows[num_known:])
    # Of another image the session has the rows before it alone.
    other = generate(shared, turn, [data_uri(make_png(32, 56, 9))], session_id="turns", routed_experts_start_len="auto")
    assert len(other["meta_info"]["routed_experts"]) == len(rows) - at


def test_samples_and_batches(shared: Engine) -> None:
    rng = random.Random(5)
    prompts = [prompt_of(1, rng), prompt_of(0, rng), prompt_of(2, rng)]
    images = [data_uri(PNGS[0]), None, [data_uri(PNGS[1]), data_uri(PNGS[0])]]
    alone = [generate(shared, *each) for each in zip(prompts, images, strict=True)]
    batch = generate(shared, prompts, images)
    for one, other in zip(alone, batch, strict=True):
        assert one["output_ids"] == other["output_ids"]
        np.testing.assert_array_equal(one["meta_info"]["routed_experts"], other["meta_info"]["routed_experts"])
    for sample in generate(shared, prompts[2], images[2], params={"n": 3}):
        assert sample["output_ids"] == alone[2]["output_ids"]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([1, IMAGE_PAD, 2], [], None),
        ([1, 2], [data_uri(PNGS[0])], "1 images for 0 places"),
        ([1, IMAGE_PAD, IMAGE_PAD, 2], [data_uri(PNGS[0])], "takes 15 tokens .3 x 5.; the prompt has 2 placeholders"),
        ([1, IMAGE_PAD, 2], "https://example.com/cat.png", "image_data.0: .*files and URLs are not fetched"),
        ([1, IMAGE_PAD, 2], "/etc/passwd", "files and URLs are not fetched"),
        ([1, IMAGE_PAD, 2], "file:///etc/passwd", "files and URLs are not fetched"),
        ([1, IMAGE_PAD, 2], "data:text/plain;base64,aGk=", "text/plain is no image"),
        ([1, IMAGE_PAD, 2], "data:image/png,abc", "must be base64"),
        ([1, IMAGE_PAD, 2], "%%%", "is no base64"),
        ([1, IMAGE_PAD, 2], "aGVsbG8=", "the image is in none of the formats PNG, JPEG"),
        ([1, IMAGE_PAD, 2], data_uri(PNGS[0][:200]), "the image cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(shared: Engine, prompt: list[int], images: Any, message: str | None) -> None:
    if message is None:
        # A placeholder without an image is a token like any other.
        assert generate(shared, prompt, images)["meta_info"]["prompt_tokens"] == 3
        return
    with pytest.raises(ValueError, match=message):
        generate(shared, prompt, images)


def test_routes_are_replayed_with_the_image(shared: Engine, checkpoint: Path) -> None:
    """Experts of the stock model see the recorded ids at every position, an image's included."""
    prompt = prompt_of(1, random.Random(6))
    answer = generate(shared, prompt, data_uri(PNGS[3]))
    images = shown(checkpoint, [PNGS[3]])
    tokens = expanded(prompt, images) + answer["output_ids"]
    rows = answer["meta_info"]["routed_experts"]
    config = read_hf_config(str(checkpoint))
    model = auto_class(config).from_pretrained(checkpoint, dtype=torch.float32).train()
    seen: list[torch.Tensor] = []
    layers = [layer.mlp for layer in model.model.language_model.layers if hasattr(layer.mlp, "experts")]
    for block in layers:
        block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
    routes = routes_from_answer(answer["meta_info"])
    ids = torch.tensor([tokens])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_PAD).int(), **images}
    batch = RoutedExpertsBatch.from_padded([routes], torch.ones_like(ids))
    with replay_routing(model) as replay:
        out = model(**inputs, routed_experts=batch)
        out.logits.sum().backward()
    assert replay.counts.replayed == len(rows)
    for column, found in enumerate(seen):
        np.testing.assert_array_equal(found[: len(rows)].numpy(), rows[:, column])
    assert model.model.visual.merger.linear_fc1.weight.grad is not None
