"""Prompts with images, and their answers against `transformers` with its own vision tower."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from support.reference_equality import LONG_ANSWER_TOLERANCE, Setting
from support.tiny_families import IMAGE_PAD, VISION_END, VISION_START
from support.tiny_images import MERGE, data_uri, make_png
from waybill import Engine
from waybill.engine.encoder.tower import ImageLimits, load_processor, open_image
from waybill.engine.routing.transformers_reference import Agreement, Reference

LIMITS = ImageLimits(1 << 20, 1 << 20)
# Grids of 3 x 5, 4 x 4, 7 x 4 and 5 x 9 tokens.
SIZES = [(40, 24), (32, 32), (32, 56), (72, 40)]
PNGS = [make_png(*size, seed) for seed, size in enumerate(SIZES)]


@dataclass(frozen=True)
class Asked:
    """A prompt with one placeholder for each image."""

    prompt: list[int]
    images: list[bytes]
    num_new_tokens: int = 8
    dp_rank: int | None = None
    # Log-probabilities of the prompt are asked for, whose positions are computed anew then, not found in the cache.
    scores_prompt: bool = True


def prompt_of(images: int, rng: random.Random) -> list[int]:
    """Text, images with text between them, text."""
    ids = [rng.randrange(256) for _ in range(5)]
    for _ in range(images):
        ids += [VISION_START, IMAGE_PAD, VISION_END, *(rng.randrange(256) for _ in range(rng.randrange(1, 6)))]
    return ids


def make_requests(setting: Setting) -> list[Asked]:
    rng = random.Random(1)
    length, scores = (40, False) if setting.retract else (8, True)
    shown = [[0], [1], [2], [0, 3], [3, 1, 2], []]
    asked = [Asked(prompt_of(len(each), rng), [PNGS[i] for i in each], length, scores_prompt=scores) for each in shown]
    # The same ids with another image of as many tokens, and the same image again.
    twin = make_png(*SIZES[0], seed=77)
    asked += [Asked(asked[0].prompt, [twin]), Asked(asked[0].prompt, [PNGS[0]])]
    if setting.dp == 1:
        return asked
    return [replace(each, dp_rank=int(i < 5)) for i, each in enumerate(asked)]


def ask(engine: Engine, requests: list[Asked]) -> list[dict[str, Any]]:
    async def one(asked: Asked) -> dict[str, Any]:
        answer = await engine.async_generate(
            input_ids=asked.prompt,
            image_data=[data_uri(png) for png in asked.images],
            sampling_params={"temperature": 0, "max_new_tokens": asked.num_new_tokens, "ignore_eos": True},
            routed_dp_rank=asked.dp_rank,
            return_logprob=True,
            logprob_start_len=0 if asked.scores_prompt else -1,
            return_routed_experts=True,
            return_router_weights=True,
        )
        assert isinstance(answer, dict)
        return answer

    async def all_of_them() -> list[dict[str, Any]]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(all_of_them())


def shown(checkpoint: Path, images: list[bytes]) -> dict[str, torch.Tensor]:
    if not images:
        return {}
    made = load_processor(str(checkpoint))(images=[open_image(png, LIMITS) for png in images], return_tensors="pt")
    return {name: made[name] for name in ("pixel_values", "image_grid_thw")}


def expanded(prompt: list[int], images: dict[str, torch.Tensor]) -> list[int]:
    """With all placeholders, which it may have already."""
    counts = (images["image_grid_thw"].prod(-1) // MERGE**2).tolist() if images else []
    if prompt.count(IMAGE_PAD) == sum(counts):
        return prompt
    left = iter(counts)
    return [one for token in prompt for one in ([token] * next(left) if token == IMAGE_PAD else [token])]


def compare(checkpoint: Path, reference: Reference, requests: list[Asked], answers: list[dict[str, Any]]) -> Agreement:
    agreement = Agreement()
    for asked, answer in zip(requests, answers, strict=True):
        meta, images = answer["meta_info"], shown(checkpoint, asked.images)
        prompt = expanded(asked.prompt, images)
        assert meta["prompt_tokens"] == len(prompt)
        assert asked.dp_rank in (None, meta["dp_rank"])
        logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
        with reference.showing(**images):
            agreement += reference.check_generation(
                prompt,
                answer["output_ids"],
                logprobs,
                meta["routed_experts"],
                LONG_ANSWER_TOLERANCE,
                meta["router_weights"],
            )
        if meta.get("input_token_logprobs"):
            # What callers see of a prompt has the placeholders.
            assert [token for _, token, _ in meta["input_token_logprobs"]] == prompt
    return agreement
