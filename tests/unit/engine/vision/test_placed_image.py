"""Positions of images and the text between them, against the stock model's own."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.replay_models import CONFIGS, IMAGE_PAD
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

from waybill.engine.frontend.image_placement import place_images
from waybill.engine.vision.image_store import Room, StoredImage
from waybill.engine.vision.placed_image import images_within, rope_positions

GRIDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)), max_size=4)


def stored(number: int, height: int, width: int) -> StoredImage:
    return StoredImage(number, b"", height, width, "float32", "/nowhere", Room(0, 0))


@settings(max_examples=60, deadline=None)
@given(grids=GRIDS, data=st.data())
def test_positions_are_those_of_transformers(grids: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Of the whole sequence, and of chunks that begin and end anywhere, within images too."""
    ids = [1, 2]
    for _, _, num_text in grids:
        ids += [IMAGE_PAD] + [3] * num_text
    images = [stored(1 + i, height, width) for i, (height, width, _) in enumerate(grids)]
    placed = place_images(np.array(ids, dtype=np.int32), images, IMAGE_PAD)
    num_tokens = len(placed.input_ids) + 3
    tokens = torch.tensor([[*placed.input_ids.tolist(), 7, 8, 9]])
    model = Qwen3VLMoeModel.__new__(Qwen3VLMoeModel)
    torch.nn.Module.__init__(model)
    model.config = CONFIGS["qwen3_vl_moe"]()
    patches = torch.tensor([[1, 2 * height, 2 * width] for height, width, _ in grids])
    expected, _ = model.get_rope_index(tokens, (tokens == IMAGE_PAD).int(), patches if grids else None)
    start = data.draw(st.integers(0, num_tokens - 1))
    end = data.draw(st.integers(start + 1, num_tokens))
    for first, last in ((0, num_tokens), (start, end)):
        delta, within = images_within(placed.images, first, last)
        found = rope_positions(first, last - first, delta, within)
        np.testing.assert_array_equal(found, expected[:, 0, first:last].numpy())
        assert all(image.start < last and image.end > first for image in within)


def test_a_placed_prompt_is_placed_again_as_it_is() -> None:
    ids = np.array([1, IMAGE_PAD, 2, IMAGE_PAD, 3], dtype=np.int32)
    images = [stored(5, 2, 3), stored(6, 1, 1)]
    placed = place_images(ids, images, IMAGE_PAD)
    assert placed.input_ids.tolist() == [1] + 6 * [IMAGE_PAD] + [2, IMAGE_PAD, 3]
    assert placed.cache_ids.tolist() == [1] + 6 * [-5] + [2, -6, 3]
    again = place_images(placed.input_ids, images, IMAGE_PAD)
    assert again.input_ids.tolist() == placed.input_ids.tolist() and again.images == placed.images
