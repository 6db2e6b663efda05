"""Encoded images in shared memory: what is kept, what goes, and that ranks read what was written."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from waybill.engine.vision import image_store
from waybill.engine.vision.image_memory import ImageMemory
from waybill.engine.vision.image_store import (
    Features,
    ImageMemoryFullError,
    ImageStore,
    OutdatedImageError,
    StoredImage,
    fill_memory,
)
from waybill.engine.vision.placed_image import PlacedImage


def add(store: ImageStore, name: bytes, height: int, seed: int = 0, incarnation: str = "") -> StoredImage:
    """Of width 2, with one level of 4 numbers: 64 bytes for each row of the grid."""
    values = np.random.default_rng(seed).random((height * 2, 2, 4)).astype(np.float32)
    features = Features(incarnation, height, 2, "float32", memoryview(values.tobytes()))
    return store.add(name, features, fill_memory(features.data))


def test_ranks_read_what_was_written() -> None:
    store = ImageStore(1 << 20)
    image = add(store, b"a", 3, seed=4)
    expected = np.random.default_rng(4).random((6, 2, 4)).astype(np.float32)
    placed = PlacedImage(image.number, 0, 3, 2, 0, image.path, image.dtype)
    memory = ImageMemory(1, 4)
    np.testing.assert_array_equal(memory.rows(placed, 1, 4).numpy(), expected[1:4])
    # What is mapped outlasts the store.
    store.close()
    np.testing.assert_array_equal(memory.rows(placed, 4, 6).numpy(), expected[4:])
    assert memory.rows(placed, 0, 1).dtype == torch.float32


def test_the_least_recently_used_goes_and_what_is_pinned_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "KEEP_S", -1.0)
    store = ImageStore(3 * 128)
    images = [add(store, name, 2) for name in (b"a", b"b", b"c")]
    assert [image.number for image in images] == [1, 2, 3]
    images[0].pin()
    assert store.get(b"b") is images[1]
    add(store, b"d", 2)
    assert store.get(b"c") is None and store.get(b"a") is images[0]
    with pytest.raises(ImageMemoryFullError, match="image-memory-bytes"):
        add(store, b"e", 5)
    images[0].unpin()
    # Its number is remembered longer than it is.
    assert add(store, b"c", 6).number == 3 and len(store) == 1
    assert store.num_bytes == 6 * 64


def test_images_of_another_encoder_are_other_ones() -> None:
    store = ImageStore(1 << 20)
    store.forget_all("first")
    image = add(store, b"a", 2, incarnation="first")
    store.forget_all("second")
    assert store.get(b"a") is None
    # Whoever has it pinned goes on with it.
    assert os.path.exists(image.path)
    with pytest.raises(OutdatedImageError):
        add(store, b"a", 2, incarnation="first")
    assert add(store, b"a", 2, incarnation="second").number == 2
