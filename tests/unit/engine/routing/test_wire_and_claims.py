"""Rows on the wire: self-describing, verified, and in the field's form where it is asked for."""

from __future__ import annotations

import base64
import io
from contextlib import suppress

import msgspec
import numpy as np
import pytest

from waybill.engine.routing import wire
from waybill.engine.routing.claims import ENTRY_BYTES, RUN_BYTES, ClaimError, ClaimStore, claim_prefix, processor_of
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.wire import (
    RoutedExperts,
    decode,
    encode,
    stitch,
    to_base64,
    to_npy_base64,
    version_runs,
)

GEOMETRY = RouteGeometry(layer_ids=(1, 3), num_layers_total=4, max_tokens=64, top_k=2, num_experts=16)
ROWS = np.arange(20, dtype=np.uint8).reshape(5, 2, 2)


def make(rows: np.ndarray = ROWS, start: int = 3) -> RoutedExperts:
    return encode(rows, start, GEOMETRY, [("v1", start, start + len(rows))])


def test_a_frame_and_its_envelope_give_the_rows_back() -> None:
    routed = make()
    again = decode(msgspec.msgpack.decode(msgspec.msgpack.encode(routed.meta), type=type(routed.meta)), routed.frame)
    assert again.rows.tobytes() == ROWS.tobytes() and again.rows.shape == (5, 2, 2)
    assert (again.meta.start, again.meta.rows, again.meta.layer_ids) == (3, 5, [1, 3])


def test_no_rows_are_an_answer_too() -> None:
    routed = make(ROWS[:0])
    assert decode(routed.meta, routed.frame).rows.shape == (0, 2, 2)
    assert to_base64(routed, 4) == b"" and to_base64(routed) == b""


@pytest.mark.parametrize(
    ("change", "frame", "words"),
    [
        ({}, bytes(ROWS)[:-1], "19 bytes arrived, the envelope states 20"),
        ({}, bytes(reversed(bytes(ROWS))), "checksum"),
        ({"rows": 4}, bytes(ROWS), "states 16"),
        ({"dtype": "int8"}, bytes(ROWS), "not known"),
        ({"byte_order": "big"}, bytes(ROWS), "not known"),
    ],
)
def test_a_damaged_frame_is_refused(change: dict[str, object], frame: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(msgspec.structs.replace(make().meta, **change), frame)


def test_the_fields_form_has_all_layers_and_zeros_in_dense_ones() -> None:
    flat = np.frombuffer(base64.b64decode(to_base64(make(), 4)), dtype="<i4")
    assert flat.size == 5 * 4 * 2
    wide = flat.reshape(5, 4, 2)
    assert (wide[:, [1, 3]] == ROWS).all() and (wide[:, [0, 2]] == 0).all()
    compact = np.frombuffer(base64.b64decode(to_base64(make())), dtype=np.uint8)
    assert compact.tobytes() == ROWS.tobytes()


@pytest.mark.parametrize("block_bytes", [1, 20, 1 << 20])
def test_a_numpy_file_has_all_layers_in_the_rows_own_dtype(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """Whatever the blocks are: its head is no multiple of three bytes."""
    monkeypatch.setattr(wire, "BLOCK_BYTES", block_bytes)
    for rows in (ROWS, ROWS[:0], ROWS[:1]):
        wide = np.load(io.BytesIO(base64.b64decode(to_npy_base64(make(rows), 4), validate=True)), allow_pickle=False)
        assert wide.dtype == np.uint8 and wide.shape == (len(rows), 4, 2)
        assert (wide[:, [1, 3]] == rows).all() and (wide[:, [0, 2]] == 0).all()


def test_many_experts_travel_as_uint16() -> None:
    geometry = RouteGeometry((0,), 1, 8, 2, 512)
    routed = encode(np.array([[[511, 256]]], dtype=np.uint16), 0, geometry, [])
    assert routed.meta.dtype == "uint16"
    assert decode(routed.meta, bytes(routed.frame)).rows.tolist() == [[[511, 256]]]


def test_stitching_refuses_gaps_and_disagreement() -> None:
    assert stitch(ROWS[:3], 2, ROWS[2:]).tobytes() == ROWS.tobytes()
    assert stitch(ROWS[:3], 3, ROWS[3:]).tobytes() == ROWS.tobytes()
    with pytest.raises(ValueError, match="rows 2 to 3 are missing"):
        stitch(ROWS[:2], 3, ROWS[3:])
    with pytest.raises(ValueError, match="disagrees"):
        stitch(ROWS[:3], 2, ROWS[:3])


def test_runs_of_weight_versions() -> None:
    assert version_runs(np.array([], dtype=np.int32), [], 4) == []
    assert version_runs(np.array([0, 0, 1]), ["a", "b"], 4) == [("a", 4, 6), ("b", 6, 7)]
    assert version_runs(np.array([0, 2, 0]), ["a", "b", "c"], 0) == [("a", 0, 1), ("c", 1, 2), ("a", 2, 3)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_claims_are_fetched_often_and_expire() -> None:
    clock = Clock()
    store = ClaimStore(10_000, 10.0, clock)
    claim = store.put(make())
    assert store.get(claim).rows.tobytes() == store.get(claim).rows.tobytes() == ROWS.tobytes()
    clock.now = 10.0
    with pytest.raises(ClaimError, match="has expired"):
        store.get(claim)


def test_the_byte_budget_drops_the_oldest_and_refuses_what_never_fits() -> None:
    # Two of them fit, and not three.
    each = 20 + ENTRY_BYTES + RUN_BYTES
    store = ClaimStore(2 * each + 5, 10.0, Clock())
    first, second, third = (store.put(make()) for _ in range(3))
    with pytest.raises(ClaimError):
        store.get(first)
    assert store.get(second) and store.get(third)
    with pytest.raises(ClaimError, match=f"exceed claim_budget_bytes={2 * each + 5}"):
        store.put(make(np.zeros((each, 2, 2), dtype=np.uint8)))
    assert store.get(second) and store.get(third), "what never fits drops nobody"


def test_claims_of_no_rows_cost_budget_and_so_does_their_envelope() -> None:
    """Else their number has no bound."""
    store = ClaimStore(100 * ENTRY_BYTES, 1e9, Clock())
    claims = [store.put(make(ROWS[:0])) for _ in range(1000)]
    kept = 0
    for claim in claims:
        with suppress(ClaimError):
            store.get(claim)
            kept += 1
    assert 0 < kept <= 100
    runs = [("v" * 8, position, position + 1) for position in range(1000)]
    with pytest.raises(ClaimError, match="exceed claim_budget_bytes"):
        ClaimStore(100_000, 1.0, Clock()).put(encode(ROWS[:0], 0, GEOMETRY, runs))


def test_a_claim_names_the_output_processor_that_made_it() -> None:
    for processor in range(12):
        store = ClaimStore(10_000, 10.0, Clock(), claim_prefix(processor, 12))
        claim = store.put(make())
        assert processor_of(claim, 12) == processor and store.get(claim)
    assert claim_prefix(0, 1) == "" and processor_of("anything", 1) == 0
    with pytest.raises(ClaimError, match="a claim has at most 128 characters"):
        processor_of("c" * 10_000_000, 1)
    for unknown in ("", "12.ab", "x.ab", "-1.ab", "01.ab", "0" * 32):
        with pytest.raises(ClaimError, match="names none of 12 output processors"):
            processor_of(unknown, 12)
