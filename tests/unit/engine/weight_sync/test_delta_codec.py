"""Deltas as bytes: whatever bits change, they are what they were made of again; what is damaged is refused by name."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.weight_sync.checksum import BITS, checksum
from waybill.engine.weight_sync.delta_codec import (
    as_bytes,
    bits_of,
    changed_places,
    decode_places,
    decode_values,
    encode_chunk,
    encode_index,
    index_size,
)
from waybill.engine.weight_sync.delta_maker import DeltaBucket, DeltaMaker
from waybill.engine.weight_sync.delta_manifest import (
    UNCHANGED,
    Chunk,
    DeltaManifest,
    DeltaPart,
    check_chunk,
    parse_manifest,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
# Of bfloat16: zeros, infinities, NaNs with payloads, the smallest and largest numbers of either sign.
SPECIAL = (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x0001, 0x8001, 0x7F7F, 0xFF7F)


def integers(dtype: torch.dtype) -> st.SearchStrategy[int]:
    bits = 8 * dtype.itemsize
    special = st.sampled_from([value << (bits - 16) if bits > 16 else value >> (16 - bits) for value in SPECIAL])
    return special | st.integers(0, 2**bits - 1)


def from_integers(values: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    data = b"".join(value.to_bytes(dtype.itemsize, "little") for value in values)
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).view(BITS[dtype.itemsize])
        if data
        else torch.empty(0, dtype=BITS[dtype.itemsize])
    )


def applied(old: torch.Tensor, chunk: Chunk, data: torch.Tensor) -> torch.Tensor:
    result = old.clone()
    if chunk.num_changed:
        places = decode_places(chunk, data, len(old))
        result[places] = decode_values(chunk, data, old.dtype).of(old[places], slice(None))
    return result


@settings(max_examples=150)
@given(st.data())
def test_a_chunk_there_and_back(data: st.DataObject) -> None:
    """Any bits before and after; near ones too, whose steps are small."""
    dtype = data.draw(st.sampled_from(DTYPES))
    before = data.draw(st.lists(integers(dtype), max_size=70))
    new_value = integers(dtype)
    after = [
        data.draw(st.one_of(st.just(value), st.just((value + 1) % 2 ** (8 * dtype.itemsize)), new_value))
        for value in before
    ]
    old, new = from_integers(before, dtype), from_integers(after, dtype)
    chunk, pieces = encode_chunk(old, new, changed_places(old, new))
    encoded = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
    check_chunk(chunk, len(old), dtype.itemsize)
    assert len(encoded) == chunk.num_bytes <= new.nbytes + -(-len(new) // 8)
    # Behind a byte of something else: values do not begin where their dtype likes.
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), encoded])[1:]
    assert torch.equal(applied(old, chunk, shifted), new)


@settings(max_examples=100)
@given(st.sets(st.integers(0, 200_000), min_size=1, max_size=40), st.sampled_from(["bitmap", "gaps8", "gaps16"]))
def test_an_index_there_and_back(numbers: set[int], kind: str) -> None:
    """Also with gaps beyond the largest number, several times over."""
    places, size = torch.tensor(sorted(numbers)), max(numbers) + 1
    data = encode_index(kind, places, size)
    assert data.nbytes == index_size(kind, places, size)
    assert torch.equal(decode_places(Chunk(kind, "raw", len(places), data.nbytes, 0), data, size), places)


@pytest.mark.parametrize(
    ("share", "index", "values"),
    [(0.0001, "gaps16", "steps"), (0.02, "gaps8", "steps"), (0.3, "bitmap", "steps"), (1.0, "all", "steps")],
)
def test_the_smaller_form_is_chosen(share: float, index: str, values: str) -> None:
    generator = torch.Generator().manual_seed(1)
    old = bits_of(torch.randn(1 << 16, generator=generator).bfloat16())
    new = old + (torch.rand(len(old), generator=generator) < share).to(torch.int16)
    chunk, _ = encode_chunk(old, new, changed_places(old, new))
    assert (chunk.index, chunk.values) == (index, values)
    further = torch.where(new != old, new + 3000, old)
    far, _ = encode_chunk(old, further, changed_places(old, further))
    assert (far.index, far.values) == (index, "raw")


def test_nothing_changed_takes_nothing() -> None:
    bits = bits_of(torch.full((9,), float("nan")).bfloat16())
    assert encode_chunk(bits, bits.clone(), changed_places(bits, bits)) == (UNCHANGED, [])
    assert encode_chunk(bits[:0], bits[:0], changed_places(bits[:0], bits[:0])) == (UNCHANGED, [])


def test_a_damaged_chunk_is_refused() -> None:
    old = torch.zeros(600, dtype=torch.int16)
    new = old.clone()
    new[[3, 500]] = torch.tensor([1, 3000], dtype=torch.int16)
    chunk = Chunk("gaps8", "steps", 2, 3, 4)
    data = torch.tensor([3, 255, 241, 1, 128, 0xB8, 0x0B], dtype=torch.uint8)
    assert torch.equal(applied(old, chunk, data), new)
    for place, value, words in (
        (1, 9, "its index names 3 values, not 2"),
        (0, 255, "its index names 1 values, not 2"),
        (4, 1, "0 of its steps do not fit, and 1 values are given for them"),
    ):
        damaged = data.clone()
        damaged[place] = value
        with pytest.raises(ValueError, match=words):
            applied(old, chunk, damaged)
    with pytest.raises(ValueError, match="its index names value 500 of 500"):
        decode_places(chunk, data, 500)


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (Chunk("pickle", "raw", 1, 1, 2), "must be of all, bitmap, gaps8, gaps16 and raw, steps"),
        (Chunk("gaps8", "raw", 9, 9, 18), r"9 changed values: must lie in 0 \.\. 8"),
        (Chunk("gaps8", "raw", -1, 0, 0), "must lie in"),
        (Chunk("gaps8", "raw", 0, 0, 2), "without changed values it must have no bytes"),
        (Chunk("gaps8", "raw", 3, 2, 6), "2 bytes of gaps8 cannot name 3 of 8 values"),
        (Chunk("gaps8", "raw", 3, 1 << 40, 6), "cannot name 3 of 8"),
        (Chunk("gaps16", "raw", 2, 3, 4), "3 bytes of gaps16"),
        (Chunk("bitmap", "raw", 2, 2, 4), "2 bytes of bitmap"),
        (Chunk("all", "raw", 7, 0, 14), "0 bytes of all cannot name 7 of 8"),
        (Chunk("bitmap", "raw", 2, 1, 5), "5 bytes of raw are not 2 values"),
        (Chunk("bitmap", "steps", 2, 1, 3), "3 bytes of steps are not 2 values"),
        (Chunk("bitmap", "steps", 2, 1, 8), "8 bytes of steps are not 2 values"),
    ],
)
def test_a_chunk_whose_numbers_do_not_fit_is_refused(chunk: Chunk, words: str) -> None:
    part = DeltaPart("t", "bfloat16", (8,), "0" * 16, "0" * 16, [chunk])
    with pytest.raises(ValueError, match=f"delta: t: chunk 0: .*{words}"):
        parse_manifest(DeltaManifest([part]).encode())


PART = DeltaPart("t", "bfloat16", (8,), "0" * 16, "0" * 16)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (DeltaManifest([]), "parts: must not be empty"),
        (DeltaManifest([PART], 0), r"chunk_values=0: must lie in 1 \.\. "),
        (DeltaManifest([PART], 1 << 30), "chunk_values="),
        (DeltaManifest([PART, PART]), "'t' stands twice"),
        (DeltaManifest([msgspec.structs.replace(PART, dtype="int8")]), "t: dtype 'int8': must be one of"),
        (DeltaManifest([msgspec.structs.replace(PART, shape=(-8,))]), "negative size"),
        (DeltaManifest([msgspec.structs.replace(PART, checksum="0")]), "checksum='0': must be 16 hexadecimal digits"),
        (DeltaManifest([msgspec.structs.replace(PART, base="G" * 16)]), "base="),
        (DeltaManifest([msgspec.structs.replace(PART, base=None, chunks=[UNCHANGED])]), "is whole and has no chunks"),
        (DeltaManifest([msgspec.structs.replace(PART, chunks=[UNCHANGED])], 4), "1 chunks of 4 are not its 8 values"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: DeltaManifest, words: str) -> None:
    with pytest.raises(ValueError, match=f"delta: .*{words}"):
        parse_manifest(manifest.encode())


@pytest.mark.parametrize("text", ["", "[]", '{"parts": 1}', "{", '{"parts": [{"name": "t"}]}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="delta: must be a manifest in JSON"):
        parse_manifest(text)


def made(maker: DeltaMaker, tensors: dict[str, torch.Tensor]) -> list[DeltaBucket]:
    return list(maker.deltas(tensors.items()))


def test_a_maker_says_what_changed_and_moves_on() -> None:
    generator = torch.Generator().manual_seed(1)
    first = {name: torch.randn(40, 25, generator=generator).bfloat16() for name in "abcd"}
    maker = DeltaMaker(chunk_values=300, bucket_bytes=1500, whole={"d"})
    assert not maker.has_base
    sent = dict(maker.remember(first.items()))
    assert maker.has_base and maker.num_held_bytes == sum(tensor.nbytes for tensor in sent.values())
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["a"][7, 3] += 1
    second["b"] = torch.randn(40, 25, generator=generator).bfloat16()
    buckets = made(maker, second)
    parts = [part for bucket in buckets for part in bucket.manifest.parts]
    assert [part.name for part in parts] == list("abcd") and len(buckets) == 4
    for part in parts:
        assert part.checksum == checksum(second[part.name])
        assert part.is_whole or part.base == checksum(first[part.name])
    assert [chunk.num_changed for chunk in parts[0].chunks] == [1, 0, 0, 0]
    assert parts[2].chunks == [] and not parts[2].is_whole and parts[2].num_bytes == 0
    assert parts[3].is_whole and torch.equal(buckets[-1].payload, as_bytes(second["d"]))
    assert all(part.num_bytes <= part.spec.num_bytes for part in parts)
    for bucket in buckets:
        assert parse_manifest(bucket.manifest.encode()) == bucket.manifest
    assert not any(
        part.num_bytes for bucket in made(maker, second) for part in bucket.manifest.parts[:3] if part.name != "d"
    )
    with pytest.raises(ValueError, match="e: was not sent before"):
        made(maker, {"e": first["a"]})
    with pytest.raises(ValueError, match=r"a: was sent as torch.bfloat16 \(40, 25\), now it is torch.float32"):
        made(maker, {"a": first["a"].float()})
    maker.forget()
    assert not maker.has_base


def test_a_tensor_without_dims_or_values() -> None:
    maker = DeltaMaker()
    dict(maker.remember([("point", torch.tensor(1.0)), ("none", torch.empty(0, 3))]))
    (bucket,) = made(maker, {"point": torch.tensor(1.5), "none": torch.empty(0, 3)})
    point, none = bucket.manifest.parts
    assert point.checksum == checksum(torch.tensor(1.5)) and none.num_bytes == 0
    assert parse_manifest(bucket.manifest.encode()) == bucket.manifest
