"""Routed experts on the wire, and their combine weights: raw bytes beside an envelope that describes and verifies them.

Legend: R rows (tokens as inputs), M MoE layers, L all layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ..io_struct import RoutedExpertsMeta
from .geometry import WEIGHT_DTYPES, RouteGeometry

# Encoded at once: about a millisecond.
BLOCK_BYTES = 1 << 20
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype(np.uint8), "uint16": np.dtype("<u2")}


@dataclass(frozen=True)
class RouteRows:
    """Rows [R, M, K] of consecutive positions and their envelope."""

    rows: np.ndarray
    meta: RoutedExpertsMeta

    @property
    def frame(self) -> memoryview:
        """The rows' bytes, not copied."""
        return raw_bytes(self.rows)


@dataclass(frozen=True)
class RouterWeights(RouteRows):
    """Combine weights, in the order of their rows' ids; those of bfloat16 as its bits."""

    def as_float32(self) -> np.ndarray:
        """The numbers: those of float32 as they are, bfloat16 widened, which is exact."""
        if self.meta.dtype == "float32":
            return self.rows
        return (self.rows.astype("<u4") << 16).view("<f4")


def weight_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `as_float32`, of numbers that `dtype` has."""
    if dtype == "float32":
        return values
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2")


@dataclass(frozen=True)
class RoutedExperts(RouteRows):
    """Expert ids and, where they were asked for, the combine weights of the same rows."""

    weights: RouterWeights | None = None


def raw_bytes(rows: np.ndarray) -> memoryview:
    """A flat view of contiguous rows, of none as well."""
    return rows.reshape(-1).view(np.uint8).data


def checksum(data: bytes | memoryview) -> str:
    """CRC-32 of the raw bytes."""
    return f"crc32:{zlib.crc32(data):08x}"


def encode(
    rows: np.ndarray, start: int, geometry: RouteGeometry, weight_versions: list[tuple[str, int, int]]
) -> RoutedExperts:
    """Wrap rows [R, M, K] of the positions from `start` on."""
    rows = np.ascontiguousarray(rows, dtype=geometry.dtype)
    name = "uint8" if rows.dtype.itemsize == 1 else "uint16"
    return RoutedExperts(rows, envelope(rows, name, start, geometry, weight_versions))


def encode_weights(
    rows: np.ndarray, start: int, geometry: RouteGeometry, weight_versions: list[tuple[str, int, int]]
) -> RouterWeights:
    """Wrap the combine weights of such rows."""
    rows = np.ascontiguousarray(rows, dtype=WEIGHT_DTYPES[geometry.weights_dtype])
    return RouterWeights(rows, envelope(rows, geometry.weights_dtype, start, geometry, weight_versions))


def envelope(
    rows: np.ndarray, dtype: str, start: int, geometry: RouteGeometry, weight_versions: list[tuple[str, int, int]]
) -> RoutedExpertsMeta:
    assert rows.shape[1:] == (geometry.num_moe_layers, geometry.top_k)
    return RoutedExpertsMeta(
        start=start,
        rows=len(rows),
        num_layers=geometry.num_moe_layers,
        layer_ids=list(geometry.layer_ids),
        top_k=geometry.top_k,
        dtype=dtype,
        byte_order="little",
        weight_versions=weight_versions,
        checksum=checksum(raw_bytes(rows)),
    )


def decode(meta: RoutedExpertsMeta, frame: bytes | memoryview) -> RoutedExperts:
    """Verify a frame against its envelope and view it as rows; copies nothing.

    Raises:
        ValueError: the frame does not have the size, type or checksum that the envelope states.
    """
    return RoutedExperts(verified(meta, frame, "routed experts", DTYPES), meta)


def decode_weights(meta: RoutedExpertsMeta, frame: bytes | memoryview, of: RoutedExpertsMeta) -> RouterWeights:
    """As `decode`, for the combine weights of the rows with the envelope `of`.

    Raises:
        ValueError: as `decode`, or they are those of other rows.
    """
    same = msgspec.structs.replace(meta, dtype=of.dtype, checksum=of.checksum)
    if same != of:
        raise ValueError(f"router weights: their envelope {meta} does not fit that of the ids, {of}")
    return RouterWeights(verified(meta, frame, "router weights", WEIGHT_DTYPES), meta)


def num_bytes(meta: RoutedExpertsMeta) -> int:
    """Of the rows that an envelope describes: ids, or combine weights."""
    return int(meta.rows * meta.num_layers * meta.top_k * (DTYPES | WEIGHT_DTYPES)[meta.dtype].itemsize)


def verified(
    meta: RoutedExpertsMeta, frame: bytes | memoryview, what: str, dtypes: dict[str, np.dtype[Any]]
) -> np.ndarray:
    """The rows of a frame, of one of these types, if it is what the envelope states."""
    if meta.dtype not in dtypes or meta.byte_order != "little":
        raise ValueError(f"{what}: dtype {meta.dtype!r}, byte order {meta.byte_order!r} are not known")
    shape = (meta.rows, meta.num_layers, meta.top_k)
    expected = num_bytes(meta)
    size = memoryview(frame).nbytes
    if size != expected:
        raise ValueError(f"{what}: {size} bytes arrived, the envelope states {expected}")
    found = checksum(frame)
    if found != meta.checksum:
        raise ValueError(f"{what}: checksum {found}, the envelope states {meta.checksum}")
    return np.frombuffer(frame, dtype=dtypes[meta.dtype]).reshape(shape)


def to_base64(routed: RouteRows, num_layers_total: int | None = None) -> bytes:
    """The rows as they are, MoE layers only; with `num_layers_total` the field's form, little-endian int32 [R, L, K] over
    all layers, dense ones as zeros. No rows give b"".

    Works block by block: the interpreter is held for a millisecond at a time, so that other threads get their turn.
    """
    meta = routed.meta
    width = (num_layers_total or meta.num_layers) * meta.top_k
    # A multiple of three rows is a multiple of three bytes, so that blocks join without padding in between.
    block_rows = max(1, BLOCK_BYTES // (3 * 4 * width)) * 3
    pieces = []
    for first in range(0, meta.rows, block_rows):
        block = routed.rows[first : first + block_rows]
        if num_layers_total is not None:
            wide = np.zeros((len(block), num_layers_total, meta.top_k), dtype="<i4")
            wide[:, meta.layer_ids] = block
            block = wide
        pieces.append(base64.b64encode(raw_bytes(block)))
    return b"".join(pieces)


def to_npy_base64(routed: RoutedExperts, num_layers_total: int) -> bytes:
    """An array [R, L, K] of the rows' own dtype over all layers, dense ones as zeros, as numpy's file format has it.

    Works block by block, as `to_base64`.
    """
    meta = routed.meta
    head = io.BytesIO()
    shape = (meta.rows, num_layers_total, meta.top_k)
    dtype = routed.rows.dtype
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    # Behind the head the bytes of a block need not begin at a multiple of three.
    pieces, rest = [], head.getvalue()
    block_rows = max(1, BLOCK_BYTES // (num_layers_total * meta.top_k * dtype.itemsize))
    for first in range(0, meta.rows, block_rows):
        block = routed.rows[first : first + block_rows]
        wide = np.zeros((len(block), num_layers_total, meta.top_k), dtype=dtype)
        wide[:, meta.layer_ids] = block
        data = rest + wide.tobytes()
        whole = len(data) - len(data) % 3
        pieces.append(base64.b64encode(data[:whole]))
        rest = data[whole:]
    return b"".join([*pieces, base64.b64encode(rest)])


def stitch(existing: np.ndarray, start: int, delta: np.ndarray) -> np.ndarray:
    """Rows [0, start) of `existing` followed by `delta`, which begins at position `start`.

    Raises:
        ValueError: there is a gap, or the overlap of the two disagrees.
    """
    if start > len(existing):
        raise ValueError(f"routed experts: rows {len(existing)} to {start} are missing before the delta")
    overlap = min(len(existing) - start, len(delta))
    if not np.array_equal(existing[start : start + overlap], delta[:overlap]):
        raise ValueError(f"routed experts: the delta from {start} disagrees with rows received before")
    return np.concatenate([existing[:start], delta])


def version_runs(versions: np.ndarray, names: Sequence[str], start: int) -> list[tuple[str, int, int]]:
    """Version indices [R] of the positions from `start` on, as half-open runs of equal names."""
    if len(versions) == 0:
        return []
    cuts = np.flatnonzero(np.diff(versions)) + 1
    bounds = [0, *cuts.tolist(), len(versions)]
    return [(names[versions[a]], start + a, start + b) for a, b in zip(bounds, bounds[1:], strict=False)]
