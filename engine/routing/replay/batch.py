"""Recorded rows, aligned with the tensors that a trainer feeds its model.

Row i of a sequence is the routing of its token at absolute position i *as an input*. The last token of a rollout was
never an input and has none. A position without a row is never filled with a guess: there the model's own router decides.

Legend: B batch rows, S their length, P = B * S positions in memory order, R rows, M MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch

from ...io_struct import RoutedExpertsMeta
from ..wire import RoutedExperts, decode, decode_weights, raw_bytes, weight_bits

# Parts of one sequence may come separately, as the deltas of a conversation do; they may overlap where they agree.
SequenceRoutes = RoutedExperts | Sequence[RoutedExperts] | None

# torch indexes and compares int16 everywhere, uint16 not.
MAX_ID = np.iinfo(np.int16).max


@dataclass(frozen=True)
class RowCounts:
    """Positions by what routes them: a row (`replayed`), or the model's own router: where a row is `missing`, at the `last`
    tokens of sequences, which have none by definition, and at `padding`."""

    replayed: int = 0
    missing: int = 0
    last: int = 0
    padding: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.replayed + other.replayed,
            self.missing + other.missing,
            self.last + other.last,
            self.padding + other.padding,
        )


@dataclass(frozen=True)
class _Span:
    """Tokens of one sequence: flat positions [begin, end), the first of them at absolute position `first`."""

    begin: int
    end: int
    first: int = 0


@dataclass(frozen=True, eq=False)
class RoutedExpertsBatch:
    """The routes of one forward: `ids` [P, M, K], uint8 or int16, valid where `has_row` [P]; `shape` is (B, S). With
    `weights` [P, M, K], float32, valid there too, the experts' outputs are combined with these; else with those that the
    model's routers give the recorded ids."""

    ids: torch.Tensor
    has_row: torch.Tensor
    shape: tuple[int, int]
    layer_ids: tuple[int, ...]
    top_k: int
    max_id: int
    counts: RowCounts
    weights: torch.Tensor | None = None

    @classmethod
    def from_padded(
        cls,
        routes: Sequence[SequenceRoutes],
        attention_mask: torch.Tensor,
        first_positions: Sequence[int] | None = None,
        *,
        replay_weights: bool = False,
    ) -> RoutedExpertsBatch:
        """Align with a padded batch, padded left, right or both.

        Args:
            routes: of each of the B sequences; None where there are none.
            attention_mask: [B, S], 1 for tokens, 0 for padding.
            first_positions: absolute position of each sequence's first token, if the trainer cut its beginning off.
            replay_weights: replay the recorded combine weights, too; no gradient reaches a router through them.

        Raises:
            ValueError: lengths, positions or ids do not fit each other, no sequence has rows, or rows have no weights to
                replay.
        """
        if attention_mask.dim() != 2 or len(attention_mask) != len(routes):
            raise ValueError(
                f"attention_mask: has shape {tuple(attention_mask.shape)}, must be ({len(routes)}, length): one row for "
                "each item of routes"
            )
        firsts = [0] * len(routes) if first_positions is None else list(first_positions)
        if len(firsts) != len(routes) or any(first < 0 for first in firsts):
            raise ValueError(f"first_positions={firsts}: must be {len(routes)} numbers of at least 0")
        length = attention_mask.shape[1]
        spans = []
        for row, (mask, first) in enumerate(zip(attention_mask.cpu().bool().numpy(), firsts, strict=True)):
            tokens = np.flatnonzero(mask)
            if len(tokens) > 0 and tokens[-1] - tokens[0] + 1 != len(tokens):
                raise ValueError(f"attention_mask[{row}]: has padding between tokens, must be one run of ones")
            begin = row * length + (int(tokens[0]) if len(tokens) > 0 else 0)
            spans.append(_Span(begin, begin + len(tokens), first))
        return _place(routes, spans, (len(routes), length), replay_weights)

    @classmethod
    def from_packed(
        cls,
        routes: Sequence[SequenceRoutes],
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_positions: int | None = None,
        replay_weights: bool = False,
    ) -> RoutedExpertsBatch:
        """Align with sequences packed one after another, without padding between them.

        Args:
            routes: of each sequence, in the order in which they are packed.
            position_ids: [B, S], counting from 0 in every sequence; or
            cu_seqlens: [sequences + 1], where each begins and the last ends, in one row of `num_positions` (the end of
                the last if not given; what follows it is padding).
            replay_weights: as in `from_padded`.

        Raises:
            ValueError: there are not as many sequences as routes, or lengths, positions or ids do not fit.
        """
        if (position_ids is None) == (cu_seqlens is None):
            raise ValueError("position_ids, cu_seqlens: give exactly one of them")
        if position_ids is not None:
            spans = _spans_of_position_ids(position_ids)
            shape = (position_ids.shape[0], position_ids.shape[1])
        else:
            assert cu_seqlens is not None
            bounds = cu_seqlens.tolist()
            total = bounds[-1] if num_positions is None else num_positions
            if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > total:
                raise ValueError(f"cu_seqlens={bounds}: must begin with 0, not fall, and end at {total} or before")
            spans = [_Span(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]
            shape = (1, total)
        if len(spans) != len(routes):
            raise ValueError(f"routes: {len(routes)} items for {len(spans)} packed sequences, must be one for each")
        return _place(routes, spans, shape, replay_weights)

    def to(self, device: torch.device | str) -> RoutedExpertsBatch:
        """The same on another device; `accelerate` and trainers call this as they do for tensors."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, ids=self.ids.to(device), has_row=self.has_row.to(device), weights=weights)

    def layer(self, column: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [P, K] of the MoE layer with that index among MoE layers, int64, and where they are valid [P]."""
        return self.ids[:, column].to(device).long(), self.has_row.to(device)

    def with_recorded(self, column: int, computed: torch.Tensor) -> torch.Tensor:
        """Combine weights [P, K] of that layer: the recorded ones where there are any, else those `computed` [P, K]."""
        if self.weights is None:
            return computed
        recorded = self.weights[:, column].to(computed.device, computed.dtype)
        return torch.where(self.has_row.to(computed.device)[:, None], recorded, computed)


def routes_from_answer(meta_info: Mapping[str, Any]) -> RoutedExperts | None:
    """The rows of an answer in compact form, from `Engine.generate` or over HTTP, verified by their checksum, with their
    combine weights if it has them.

    None where the engine reports that it has none (`routed_experts_error`): those rows are missing.

    Raises:
        ValueError: the answer does not hold rows in compact form, or they are damaged.
    """
    if meta_info.get("routed_experts_error") is not None:
        return None
    if meta_info.get("routed_experts") is None or meta_info.get("routed_experts_meta") is None:
        raise ValueError("meta_info: has no routed_experts; ask with return_routed_experts=True")
    if meta_info.get("routed_experts_dtype") == "int32":
        raise ValueError("meta_info: routed_experts is in the form int32; ask with routed_experts_format='compact'")
    rows = meta_info["routed_experts"]
    frame = raw_bytes(np.ascontiguousarray(rows)) if isinstance(rows, np.ndarray) else base64.b64decode(rows)
    routed = decode(msgspec.convert(meta_info["routed_experts_meta"], RoutedExpertsMeta), frame)
    if meta_info.get("router_weights") is None:
        return routed
    meta = msgspec.convert(meta_info["router_weights_meta"], RoutedExpertsMeta)
    values = meta_info["router_weights"]
    # An array has the numbers; what travels, and the checksum is of, are their bits.
    is_array = isinstance(values, np.ndarray)
    frame = raw_bytes(weight_bits(values, meta.dtype)) if is_array else base64.b64decode(values)
    return replace(routed, weights=decode_weights(meta, frame, routed.meta))


def _spans_of_position_ids(position_ids: torch.Tensor) -> list[_Span]:
    if position_ids.dim() != 2 or position_ids.numel() == 0:
        raise ValueError(f"position_ids: has shape {tuple(position_ids.shape)}, must be (rows, length)")
    if bool((position_ids[:, 0] != 0).any()):
        raise ValueError("position_ids: every row must begin with position 0")
    flat = position_ids.flatten().cpu().numpy()
    starts = np.flatnonzero(flat == 0)
    ends = np.append(starts[1:], len(flat))
    expected = np.arange(len(flat)) - np.repeat(starts, ends - starts)
    if not np.array_equal(flat, expected):
        raise ValueError("position_ids: must count up by one from 0 in every packed sequence")
    return [_Span(int(begin), int(end)) for begin, end in zip(starts, ends, strict=True)]


def _place(
    routes: Sequence[SequenceRoutes], spans: list[_Span], shape: tuple[int, int], replay_weights: bool
) -> RoutedExpertsBatch:
    parts = [_as_parts(item) for item in routes]
    metas = [part.meta for items in parts for part in items]
    if not metas:
        raise ValueError("routes: no sequence has rows; pass routed_experts=None to the model for its own routing")
    layout = metas[0]
    ids = np.zeros(
        (shape[0] * shape[1], layout.num_layers, layout.top_k), np.uint8 if layout.dtype == "uint8" else np.int16
    )
    has_row = np.zeros(len(ids), dtype=bool)
    weights = np.zeros(ids.shape, np.float32) if replay_weights else None
    for index, (items, span) in enumerate(zip(parts, spans, strict=True)):
        for part in items:
            if (part.meta.layer_ids, part.meta.top_k, part.meta.dtype) != (
                layout.layer_ids,
                layout.top_k,
                layout.dtype,
            ):
                raise ValueError(f"routes[{index}]: layers, top_k and dtype must be those of the other sequences")
            _place_part(ids, weights, has_row, part, span, f"routes[{index}]")
    return RoutedExpertsBatch(
        ids=torch.from_numpy(ids),
        has_row=torch.from_numpy(has_row),
        shape=shape,
        layer_ids=tuple(layout.layer_ids),
        top_k=layout.top_k,
        max_id=int(ids.max(initial=0)),
        counts=_count(has_row, spans),
        weights=None if weights is None else torch.from_numpy(weights),
    )


def _as_parts(item: SequenceRoutes) -> list[RoutedExperts]:
    if item is None:
        return []
    return [item] if isinstance(item, RoutedExperts) else list(item)


def _place_part(
    ids: np.ndarray, weights: np.ndarray | None, has_row: np.ndarray, part: RoutedExperts, span: _Span, name: str
) -> None:
    """Write one part's rows; `ids`, `weights` and `has_row` are those of all positions."""
    rows, meta = part.rows, part.meta
    if rows.shape != (meta.rows, meta.num_layers, meta.top_k):
        raise ValueError(f"{name}: rows have shape {rows.shape}, their envelope states {meta}")
    last = span.first + span.end - span.begin
    if meta.start < span.first or meta.start + meta.rows > last:
        raise ValueError(
            f"{name}: rows of positions [{meta.start}, {meta.start + meta.rows}) for a sequence that holds "
            f"[{span.first}, {last}): must lie within"
        )
    _check_rows(rows, name)
    columns = [(ids, rows)]
    if weights is not None:
        if part.weights is None:
            raise ValueError(f"{name}: has no combine weights to replay; ask with return_router_weights=True")
        columns.append((weights, part.weights.as_float32()))
    begin = span.begin + meta.start - span.first
    known = has_row[begin : begin + meta.rows]
    for column, values in columns:
        target = column[begin : begin + meta.rows]
        if not np.array_equal(target[known], values[known]):
            raise ValueError(f"{name}: parts disagree where they overlap, must be equal there")
        target[:] = values
    known[:] = True


def _check_rows(rows: np.ndarray, name: str) -> None:
    if int(rows.max(initial=0)) > MAX_ID:
        raise ValueError(f"{name}: id {int(rows.max())} is out of range, must be at most {MAX_ID}")
    ordered = np.sort(rows, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if repeated.any():
        row, layer = (int(indices[0]) for indices in np.nonzero(repeated))
        raise ValueError(f"{name}: row {row}, MoE layer {layer} is {rows[row, layer].tolist()}: ids must be distinct")


def _count(has_row: np.ndarray, spans: list[_Span]) -> RowCounts:
    replayed = int(has_row.sum())
    num_tokens = sum(span.end - span.begin for span in spans)
    last = sum(1 for end in _last_positions(spans) if not has_row[end])
    return RowCounts(replayed, num_tokens - replayed - last, last, len(has_row) - num_tokens)


def _last_positions(spans: list[_Span]) -> Iterator[int]:
    return (span.end - 1 for span in spans if span.end > span.begin)
