"""Images on GPUs: what test_images.py compares with `transformers`, with the tower in its own process on a GPU, and the
engine's steps as CUDA graphs - all but those that have tokens of images.

The reference computes on the CPU, in float32.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoder_process import SECRET, VARIABLE, EncoderProcess, run_encoder
from support.image_equality import PNGS, Asked, ask, compare, expanded, make_requests, prompt_of, shown
from support.reference_equality import Setting, make_engine
from support.tiny_families import IMAGE_PAD, VISION_START, write_family

from waybill import Engine
from waybill.engine.routing.transformers_reference import Reference

pytestmark = pytest.mark.gpu

ONE = Setting(1, "ep", 16, cache=True, retract=False, depth=1)
TWO = Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=2)
LAYOUTS = [
    ONE,
    Setting(2, "tp", 16, cache=True, retract=False, depth=1),
    TWO,
    Setting(1, "ep", 7, cache=True, retract=True, depth=1),
    Setting(1, "tp", -1, cache=False, retract=False, depth=0),
    Setting(2, "ep", 7, cache=True, retract=True, depth=0),
    Setting(1, "tp", 7, cache=True, retract=True, depth=1, dp=2),
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, dp=2, dispatcher="all_to_all"),
    # Without graphs.
    Setting(1, "ep", 16, cache=True, retract=False, depth=1, attention="sdpa"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3_vl_moe", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(str(checkpoint))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Iterator[EncoderProcess]:
    """On the last of two devices."""
    with run_encoder(checkpoint, "--device", f"cuda:{min(1, torch.cuda.device_count() - 1)}") as running:
        yield running


@contextmanager
def started(checkpoint: Path, encoder: EncoderProcess, setting: Setting) -> Iterator[Engine]:
    if torch.cuda.device_count() < setting.dp * setting.tp:
        pytest.skip(f"needs {setting.dp * setting.tp} CUDA devices")
    pool = 200 if setting.retract else 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, SECRET)
        with make_engine(checkpoint, setting, pool, "cuda", context_length=180, encoder=encoder.place) as engine:
            yield engine


class Steps:
    """How many steps an engine has run since this was made, and as what."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = self._now()

    def _now(self) -> tuple[int, int, int]:
        state = self._engine.get_server_info()
        return state["num_steps"], state["num_decode_graph_steps"], state["num_prefill_graph_steps"]

    def run(self) -> tuple[int, int, int]:
        """Graphs of decodes, graphs of steps with prefills, and steps without a graph."""
        total, decodes, prefills = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return decodes, prefills, total - decodes - prefills


def check(engine: Engine, checkpoint: Path, reference: Reference, requests: list[Asked]) -> list[dict[str, Any]]:
    answers = ask(engine, requests)
    print(compare(checkpoint, reference, requests, answers))
    return answers


@pytest.fixture(scope="module")
def alone(checkpoint: Path, encoder: EncoderProcess) -> Iterator[Engine]:
    with started(checkpoint, encoder, ONE) as engine:
        yield engine


def test_turns_about_the_same_image_are_graphs(alone: Engine, checkpoint: Path, reference: Reference) -> None:
    """From the second turn on the image is in the cache; text behind it turns by other positions than its own."""
    prompt, images = prompt_of(2, random.Random(4)), [PNGS[3], PNGS[0]]
    steps = Steps(alone)
    for turn in range(3):
        asked = Asked(prompt, images, 6, scores_prompt=False)
        (answer,) = check(alone, checkpoint, reference, [asked])
        prompt = expanded(prompt, shown(checkpoint, images)) if turn == 0 else prompt
        if turn:
            # All but the last token that was sampled, and what came after it.
            assert answer["meta_info"]["cached_tokens"] == len(prompt) - 6
            decodes, prefills, others = steps.run()
            assert others == 0 and prefills == 1 and decodes >= 5
        prompt = [*prompt, *answer["output_ids"], *range(40, 45)]
        steps = Steps(alone)


def test_text_alone_is_graphs(alone: Engine, checkpoint: Path, reference: Reference) -> None:
    steps = Steps(alone)
    check(alone, checkpoint, reference, [Asked([5 + i, *range(30)], [], 8 + i) for i in range(3)])
    decodes, prefills, others = steps.run()
    assert decodes > 0 and prefills > 0 and others == 0


def test_a_prompt_that_ends_in_an_image(alone: Engine, checkpoint: Path, reference: Reference) -> None:
    """The second time all but its last token are found: a step of one token that a next one is sampled for, as a decode's,
    but it is the image's. It must not run as a decode's graph, also beside real decodes."""
    asked = Asked([*range(20, 26), VISION_START, IMAGE_PAD], [PNGS[1]], scores_prompt=False)
    check(alone, checkpoint, reference, [asked])
    steps = Steps(alone)
    (answer,) = check(alone, checkpoint, reference, [asked])
    assert answer["meta_info"]["cached_tokens"] == answer["meta_info"]["prompt_tokens"] - 1
    assert steps.run()[2] == 1
    others = [Asked([7 + i, *range(60, 64)], [], 30, scores_prompt=False) for i in range(2)]
    for _ in range(3):
        check(alone, checkpoint, reference, [*others, asked])


def test_memory_that_is_given_back_and_taken_again(alone: Engine, checkpoint: Path, reference: Reference) -> None:
    """Graphs are recorded anew, with their inputs."""
    asked = [Asked(prompt_of(1, random.Random(11)), [PNGS[2]], 12, scores_prompt=False)]
    before = check(alone, checkpoint, reference, asked)
    alone.release_memory_occupation(["kv_cache"])
    alone.resume_memory_occupation(["kv_cache"])
    steps = Steps(alone)
    after = check(alone, checkpoint, reference, asked)
    assert before[0]["output_ids"] == after[0]["output_ids"]
    assert steps.run()[0] >= 10


def test_an_image_on_one_dp_rank_takes_graphs_from_all(
    checkpoint: Path, encoder: EncoderProcess, reference: Reference
) -> None:
    """Ranks meet in the experts, so they run a step as the same thing: while one has tokens of an image, the other, which
    decodes, runs without a graph, too."""
    prompt = prompt_of(1, random.Random(8))
    decoding = Asked([1, 2, 3], [], 60, dp_rank=1, scores_prompt=False)
    with started(checkpoint, encoder, TWO) as engine:
        for png in PNGS:
            check(engine, checkpoint, reference, [decoding, Asked(prompt, [png], 12, dp_rank=0)])
        last = Asked([*range(20, 26), VISION_START, IMAGE_PAD], [PNGS[0]], dp_rank=0, scores_prompt=False)
        for _ in range(3):
            check(engine, checkpoint, reference, [decoding, last])
        decodes, prefills, others = Steps(engine).run()
        assert (decodes, prefills, others) == (0, 0, 0), "nobody runs"
        states = engine.get_server_info()
    assert states["num_decode_graph_steps"] > 60


@pytest.mark.parametrize("setting", LAYOUTS, ids=str)
def test_equals_transformers_on_gpu(
    setting: Setting, checkpoint: Path, encoder: EncoderProcess, reference: Reference
) -> None:
    """Then requests that end one after the other, so that graphs of several sizes serve those that are left, and the same
    again, whose images are in the prefix cache."""
    check_layout(setting, checkpoint, encoder, reference)


def test_tower_and_engine_on_one_gpu(checkpoint: Path, reference: Reference) -> None:
    with run_encoder(checkpoint, "--device", "cuda:0") as encoder:
        check_layout(ONE, checkpoint, encoder, reference)


def check_layout(setting: Setting, checkpoint: Path, encoder: EncoderProcess, reference: Reference) -> None:
    requests = make_requests(setting)
    lengths = [2 + 4 * i if not setting.retract else each.num_new_tokens for i, each in enumerate(requests)]
    staggered = [
        replace(each, num_new_tokens=length, scores_prompt=False)
        for each, length in zip(requests, lengths, strict=True)
    ]
    with started(checkpoint, encoder, setting) as engine:
        steps = Steps(engine)
        for asked in (requests, staggered, staggered):
            check(engine, checkpoint, reference, asked)
        decodes, prefills, others = steps.run()
        state = engine.get_server_info()
    print(f"{setting}: {decodes} decode graphs, {prefills} prefill graphs, {others} steps without")
    assert (state["num_retractions"] > 0) == setting.retract
    assert state["num_images_encoded"] == 5
    assert others > 0, "steps with tokens of images have no graph"
    assert (decodes > 20) == (setting.attention == "auto")
