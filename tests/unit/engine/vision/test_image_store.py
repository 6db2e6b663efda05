"""Encoded images in shared memory: what is kept, what goes, and that ranks read what was written."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import torch

from waybill.engine.vision.image_memory import ImageMemory
from waybill.engine.vision.image_store import (
    Features,
    ImageMemoryFullError,
    ImageStore,
    ImageTooLargeError,
    OutdatedImageError,
    StoredImage,
)
from waybill.engine.vision.placed_image import PlacedImage

PAGE = mmap.ALLOCATIONGRANULARITY
# Of one row of a grid that is 2 wide, with one level: 2 * 2 * 256 numbers.
ROW_BYTES = 4096


def values_of(height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((height * 2, 2, 256)).astype(np.float32)


def add(
    store: ImageStore, name: bytes, height: int, seed: int = 0, incarnation: str = "", weights: str = ""
) -> StoredImage:
    data = memoryview(values_of(height, seed).tobytes())
    assert data.nbytes == height * ROW_BYTES
    room = store.reserve(data.nbytes)
    store.arena.write(room.offset, data)
    return store.add(name, Features(incarnation, weights, height, 2, "float32", data), room)


def placed(image: StoredImage) -> PlacedImage:
    return PlacedImage(image.number, 0, image.height, 2, 0, image.path, image.room.offset, image.dtype)


def memory_of(store: ImageStore) -> int:
    """Bytes that the system has given to it."""
    return os.stat(store.arena.path).st_blocks * 512


def test_ranks_read_what_was_written() -> None:
    store = ImageStore(1 << 20)
    add(store, b"other", 2, seed=5)
    image = add(store, b"a", 3, seed=4)
    memory = ImageMemory(1, 256)
    np.testing.assert_array_equal(memory.rows(placed(image), 1, 4).numpy(), values_of(3, 4)[1:4])
    # What a rank has open outlasts the store.
    store.close()
    np.testing.assert_array_equal(memory.rows(placed(image), 4, 6).numpy(), values_of(3, 4)[4:])
    assert memory.rows(placed(image), 0, 1).dtype == torch.float32
    memory.close()


def test_what_goes_takes_no_memory_and_nobody_reads_another_image_in_its_place() -> None:
    """Whatever ranks have read, and however many images there were: one file is open."""
    store = ImageStore(4 * ROW_BYTES)
    memory = ImageMemory(1, 256)
    first = add(store, b"first", 2)
    memory.rows(placed(first), 0, 4)
    num_open = len(os.listdir("/proc/self/fd"))
    for seed in range(50):
        image = add(store, b"%d" % seed, 3, seed)
        np.testing.assert_array_equal(memory.rows(placed(image), 0, 6).numpy(), values_of(3, seed))
    assert memory_of(store) == store.num_bytes == 3 * ROW_BYTES
    assert not memory.rows(placed(first), 0, 4).any()
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_the_least_recently_used_goes_and_what_is_pinned_stays() -> None:
    store = ImageStore(6 * ROW_BYTES)
    images = [add(store, name, 2) for name in (b"a", b"b", b"c")]
    assert [image.number for image in images] == [1, 2, 3]
    images[0].pin()
    assert store.get(b"b") is images[1]
    add(store, b"d", 2)
    assert store.get(b"c") is None and store.get(b"a") is images[0]
    with pytest.raises(ImageMemoryFullError, match=f"no room for {5 * ROW_BYTES} bytes"):
        store.reserve(5 * ROW_BYTES)
    # What cannot be had costs nobody anything.
    assert len(store) == 3
    with pytest.raises(ImageTooLargeError, match=f"takes {7 * ROW_BYTES} bytes .* at most {6 * ROW_BYTES} "):
        store.reserve(7 * ROW_BYTES)
    images[0].unpin()
    # Its number is remembered longer than it is.
    assert add(store, b"c", 6).number == 3 and len(store) == 1
    assert store.num_bytes == 6 * ROW_BYTES == memory_of(store)


def test_memory_is_counted_in_pages() -> None:
    store = ImageStore(2 * PAGE)
    store.reserve(1)
    room = store.reserve(1)
    with pytest.raises(ImageMemoryFullError):
        store.reserve(1)
    store.give_back(room)
    assert store.num_bytes == PAGE
    store.reserve(1)


def test_stores_know_an_image_by_what_encodes_alike() -> None:
    """Numbers are a store's own; what the sides of a request compare is the file, and the weights of its encoder."""
    one, other = ImageStore(1 << 20), ImageStore(1 << 20)
    for store in (one, other):
        store.forget_all(f"an encoder of {id(store)}")
    add(other, b"first", 1, incarnation=f"an encoder of {id(other)}")
    images = [
        add(store, file, 2, incarnation=f"an encoder of {id(store)}", weights=weights)
        for store, file, weights in ((one, b"a", "w"), (other, b"a", "w"), (one, b"b", "w"), (other, b"c", "v"))
    ]
    assert images[0].content == images[1].content and images[0].number != images[1].number
    one.forget_all("another one")
    images.append(add(one, b"a", 2, incarnation="another one", weights="v"))
    assert len({image.content for image in images}) == 4


def test_images_of_another_encoder_are_other_ones() -> None:
    store = ImageStore(1 << 20)
    store.forget_all("first")
    image = add(store, b"a", 2, seed=1, incarnation="first")
    add(store, b"b", 1, incarnation="first")
    image.pin()
    store.forget_all("second")
    assert store.get(b"a") is None
    # Whoever has it pinned goes on with it; the other one is gone.
    np.testing.assert_array_equal(ImageMemory(1, 256).rows(placed(image), 0, 4).numpy(), values_of(2, 1))
    assert store.num_bytes == 2 * ROW_BYTES
    with pytest.raises(OutdatedImageError):
        add(store, b"a", 2, incarnation="first")
    assert store.num_bytes == 2 * ROW_BYTES
    image.unpin()
    assert add(store, b"a", 2, incarnation="second").number == 3
    assert store.num_bytes == memory_of(store) == 2 * ROW_BYTES
