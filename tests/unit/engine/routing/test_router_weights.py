"""Combine weights beside the ids: in the ring, from every recorder, in the ledger, on the wire."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from waybill.engine.config import EngineConfig
from waybill.engine.io_struct import Segment
from waybill.engine.routing.capturer import RoutedExpertsCapturer
from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.routing.late_gather import LateRouteGather
from waybill.engine.routing.ledger import MissingRoutesError, RouteLedger
from waybill.engine.routing.ring import RouteRing
from waybill.engine.routing.wire import RouterWeights, decode_weights, encode, encode_weights, weight_bits
from waybill.parallel.mesh import Axis

CPU = torch.device("cpu")
LAYERS, TOP_K = 2, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def geometry_of(dtype: str, num_experts: int = 16) -> RouteGeometry:
    """Of steps whose rows have an odd number of bytes."""
    return RouteGeometry((1, 2), 3, 5, TOP_K, num_experts, dtype)


def float32_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits if dtype == "float32" else torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()


def test_nothing_is_kept_for_weights_that_nobody_records() -> None:
    with_ids, with_both = geometry_of(""), geometry_of("float32")
    num_values = LAYERS * TOP_K * 5
    assert with_both.slot_bytes - with_ids.slot_bytes == num_values * 4
    assert with_ids.slot_bytes - num_values < 4
    ring = RouteRing.create(with_ids, 2)
    ring.slot(ring.acquire(1.0), 3)
    assert ring.weights(0, 0, 3) is None
    assert len(RouteLedger(4, 1, with_ids)._stores) == 1


def test_a_server_that_records_them_records_routes() -> None:
    with pytest.raises(ValueError, match="enable_return_router_weights: needs enable_return_routed_experts"):
        EngineConfig(model_path="m", enable_return_router_weights=True)
    with pytest.raises(ValueError, match="router_weights_dtype"):
        EngineConfig(model_path="m", router_weights_dtype="float16")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("num_experts", [16, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_layer_reach_the_ring_rounded_to_the_nearest(dtype: str, num_experts: int, late: bool) -> None:
    geometry = geometry_of(dtype, num_experts)
    ring = RouteRing.create(geometry, 2)
    capturer = RoutedExpertsCapturer(ring, CPU)
    recorder = LateRouteGather(Axis.single(), geometry, 5, capturer, CPU) if late else capturer
    for num_rows in (5, 3, 0):
        ids = torch.randint(num_experts, (LAYERS, num_rows, TOP_K))
        weights = torch.rand(LAYERS, num_rows, TOP_K)
        seq = recorder.begin(num_rows)
        for layer in (1, 0):
            rows = recorder.slot(layer)
            rows.ids.copy_(ids[layer])
            rows.keep_weights(weights[layer])
        recorder.finish()
        recorder.publish(seq)
        assert ring.rows(seq, 0, num_rows).tolist() == ids.tolist()
        found = ring.weights(seq, 0, num_rows)
        assert found is not None
        assert np.array_equal(float32_of(found, dtype), weights.to(DTYPES[dtype]).float().numpy())
        ring.mark_filed(seq)


def test_bfloat16_rounds_ties_to_even() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20])
    ring = RouteRing.create(RouteGeometry((0,), 1, 1, 3, 16, "bfloat16"), 1)
    capturer = RoutedExpertsCapturer(ring, CPU)
    seq = capturer.begin(1)
    capturer.slot(0).keep(torch.tensor([[0, 1, 2]]), values[None])
    capturer.finish()
    found = ring.weights(seq, 0, 1)
    assert found is not None
    assert float32_of(found, "bfloat16").tolist() == [[[1.0, 1 + 2**-6, 1 + 2**-7]]]


def test_out_of_the_worlds_weights_a_recorder_takes_those_of_its_ranks() -> None:
    geometry = RouteGeometry((0, 1), 2, 4, TOP_K, 16, "float32")
    ring = RouteRing.create(geometry, 1)
    capturer = RoutedExpertsCapturer(ring, CPU, first_rank=1, num_ranks=2)
    ids, weights = torch.arange(8)[:, None].expand(-1, TOP_K), torch.rand(8, TOP_K)
    seq = capturer.begin(2)
    for layer in (0, 1):
        capturer.rows_of_world(layer).keep(ids, weights)
    capturer.finish()
    assert ring.rows(seq, 0, 4)[0, :, 0].tolist() == [2, 3, 4, 5]
    found = ring.weights(seq, 1, 3)
    assert found is not None and np.array_equal(found, weights[3:6].expand(2, -1, -1).numpy())


# --- ledger -----------------------------------------------------------------------------------------------------------


def pages(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


def rows_of(first: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [M, n, K] that tell tokens apart."""
    ids = np.broadcast_to(np.arange(first, first + num)[None, :, None], (LAYERS, num, TOP_K))
    layers = np.arange(LAYERS * TOP_K).reshape(LAYERS, 1, TOP_K)
    return ids.astype(np.uint8), (ids + layers / 8).astype(np.float32)


def by_token(*parts: tuple[int, int]) -> np.ndarray:
    """The weights [R, M, K] of such parts."""
    return np.concatenate([rows_of(*part)[1] for part in parts], axis=1).transpose(1, 0, 2)


def file(ledger: RouteLedger, rid: str, start: int, first: int, where: tuple[int, ...], *, plainly: bool) -> None:
    segment = Segment(rid, start, len(where), pages(*where))
    ids, weights = rows_of(first, len(where))
    if plainly:
        ledger.allocate(segment)
        ledger.file(segment, ids, "v", weights)
    else:
        ledger.file_step([segment], ids, "v", weights)


@pytest.mark.parametrize("plainly", [False, True])
def test_weights_follow_the_ids_through_hits_slices_and_retractions(plainly: bool) -> None:
    ledger = RouteLedger(32, 1, geometry_of("float32", 256))
    # Nobody asked for these, but a later request hits them.
    ledger.start("plain", keep=False)
    ledger.admit("plain", b"")
    file(ledger, "plain", 0, 10, (4, 3, 2), plainly=plainly)
    ledger.drop("plain")
    ledger.start("a", keep=True, weights=True)
    ledger.admit("a", pages(4, 3))
    file(ledger, "a", 2, 30, (7, 8), plainly=plainly)
    whole = by_token((10, 2), (30, 2))
    for start in range(6):
        found = ledger.get_topk("a", start, 5)
        assert found.weights is not None and np.array_equal(found.weights, whole[start:])
    # First filed wins, for weights as for ids.
    ledger.retract("a")
    ledger.admit("a", b"")
    file(ledger, "a", 0, 50, (11, 12, 13, 14, 15), plainly=plainly)
    found = ledger.get_topk("a", 1, 6)
    expected = by_token((11, 1), (30, 2), (54, 1))
    assert found.weights is not None and np.array_equal(found.weights, expected)
    assert found.rows[:, 0, 0].tolist() == expected[:, 0, 0].tolist()
    # A neighbour that wants ids alone gets these alone, of the forward that computed the KV.
    ledger.start("b", keep=True)
    ledger.admit("b", pages(11, 12))
    found = ledger.get_topk("b", 0, 3)
    assert found.weights is None and found.rows[:, 0, 0].tolist() == [50, 51]


def test_missing_rows_have_no_weights() -> None:
    ledger = RouteLedger(4, 1, geometry_of("float32"))
    ledger.start("a", keep=True, weights=True)
    ledger.admit("a", pages(0, 1))
    with pytest.raises(MissingRoutesError, match="2 rows are missing"):
        ledger.get_topk("a", 0, 3)
    with pytest.raises(AssertionError, match="refuses who asks"):
        RouteLedger(4, 1, geometry_of("")).start("a", keep=True, weights=True)


# --- wire -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [4, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frame_and_its_envelope_give_the_numbers_back(dtype: str, num_rows: int) -> None:
    geometry = geometry_of(dtype)
    values = torch.rand(num_rows, LAYERS, TOP_K).to(DTYPES[dtype]).float().numpy()
    ids = encode(np.zeros(values.shape, np.uint8), 2, geometry, [("v", 2, 2 + num_rows)])
    sent = encode_weights(weight_bits(values, dtype), 2, geometry, ids.meta.weight_versions)
    found = decode_weights(sent.meta, sent.frame, ids.meta)
    assert isinstance(found, RouterWeights) and (found.meta.dtype, found.meta.start) == (dtype, 2)
    assert found.as_float32().dtype == np.float32 and np.array_equal(found.as_float32(), values)
    other = msgspec.structs.replace(ids.meta, start=3)
    with pytest.raises(ValueError, match="does not fit that of the ids"):
        decode_weights(sent.meta, sent.frame, other)
    with pytest.raises(ValueError, match="router weights: checksum"):
        decode_weights(msgspec.structs.replace(sent.meta, checksum="crc32:1"), sent.frame, ids.meta)
    with pytest.raises(ValueError, match="router weights: dtype 'uint8'"):
        decode_weights(msgspec.structs.replace(sent.meta, dtype="uint8"), sent.frame, ids.meta)


def test_every_bit_pattern_of_bfloat16_survives() -> None:
    bits = np.arange(1 << 16, dtype="<u2").reshape(-1, 1, 1)
    weights = RouterWeights(bits, encode_weights(bits, 0, RouteGeometry((0,), 1, 1, 1, 2, "bfloat16"), []).meta)
    expected = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
    assert weights.as_float32().tobytes() == expected.tobytes()
    assert np.array_equal(weight_bits(weights.as_float32(), "bfloat16"), bits)
