"""Questions with images and without, and a serial run's answers to them by an engine with an encoder of its own."""

from __future__ import annotations

import io
import os
import random
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.encoder_process import SECRET, VARIABLE, run_encoder
from support.serial_run import Question, SerialAnswer, SerialRun, greedy
from support.tiny_families import IMAGE_PAD, VISION_END, VISION_START, write_family
from support.tiny_images import MERGE, PATCH, data_uri, make_png

from waybill import Engine
from waybill.engine.encoder.tower import ImageLimits, load_processor, open_image

SEED = 23
SIZES = ((40, 24), (32, 32), (32, 56), (72, 40))
PNGS = [make_png(*size, seed) for seed, size in enumerate(SIZES)]
# The images of each question.
SHOWN = ((0,), (1,), (2, 0), (3,), (1, 2), (0, 3), (), ())
# Of what follows; the first text is short and the other one long.
NUM_NEW = (8, 20, 8, 30, 60, 10, 12, 80)
WITH_IMAGES = range(6)
TEXTS = range(6, 8)
LIMITS = ImageLimits(1 << 20, 1 << 20)


@dataclass(frozen=True)
class ImageQuestion(Question):
    """`prompt` has all placeholders."""

    images: tuple[int, ...]

    def image_data(self, choose: random.Random) -> list[str]:
        """Files of other bytes each time, which nobody knows, or those that all know."""
        return [data_uri(fresh(PNGS[each]) if choose.random() < 0.7 else PNGS[each]) for each in self.images]


def fresh(png: bytes) -> bytes:
    """The same pixels in another file."""
    told, file = PngInfo(), io.BytesIO()
    told.add_text("of", secrets.token_hex(8))
    Image.open(io.BytesIO(png)).save(file, "PNG", pnginfo=told)
    return file.getvalue()


def make_image_questions() -> list[ImageQuestion]:
    choose = random.Random(SEED)

    def text(most: int) -> list[int]:
        return choose.choices(range(256), k=choose.randint(1, most))

    questions = []
    for images, num_new in zip(SHOWN, NUM_NEW, strict=True):
        prompt = text(30)
        for each in images:
            width, height = SIZES[each]
            num_tokens = width * height // (PATCH * MERGE) ** 2
            prompt += [VISION_START, *[IMAGE_PAD] * num_tokens, VISION_END, *text(12)]
        questions.append(ImageQuestion(prompt, num_new, images))
    return questions


class ImagesSerialRun(SerialRun):
    """Its reference is shown the images."""

    def beyond_near_ties(self, index: int, output: Any, rows: np.ndarray, start: int) -> str | None:
        question = self.catalogue[index]
        assert isinstance(question, ImageQuestion)
        shown = {}
        if question.images:
            images = [open_image(PNGS[each], LIMITS) for each in question.images]
            made = load_processor(str(self.checkpoint))(images=images, return_tensors="pt")
            shown = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        with self.reference.showing(**shown):
            return super().beyond_near_ties(index, output, rows, start)


@contextmanager
def images_with_a_serial_run() -> Iterator[ImagesSerialRun]:
    """With the checkpoint, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_family("qwen3_vl_moe", Path(folder))
        yield ImagesSerialRun(make_image_questions(), answer_serially(checkpoint), checkpoint)


def answer_serially(checkpoint: Path) -> list[SerialAnswer]:
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 8192, "enable_return_routed_experts": True}
    answers = []
    with (
        run_encoder(checkpoint) as encoder,
        patch.dict(os.environ, {VARIABLE: SECRET}),
        Engine(str(checkpoint), tp_size=1, encoder=encoder.place, **options) as engine,
    ):
        for question in make_image_questions():
            answer = engine.generate(
                input_ids=question.prompt,
                image_data=[data_uri(PNGS[each]) for each in question.images],
                sampling_params=greedy(question),
                return_routed_experts=True,
            )
            answers.append(SerialAnswer(answer["output_ids"], answer["meta_info"]["routed_experts"]))
    return answers
