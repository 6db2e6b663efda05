"""A step's way from its plan to the device: the tensors of a `ForwardBatch`, made from a `ScheduleBatch` once per step.

Legend: T tokens of the step, B requests, N rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...parallel.dp_attention import TokenLayout
from ...parallel.host_to_device import to_device
from ..attention.backend import AttentionBackend, AttentionBatch
from ..kv_cache.req_to_token_pool import ReqToTokenPool
from ..models.forward_batch import ForwardBatch, PlanT, VisualRows
from ..plan import ScheduleBatch, ScheduledReq
from ..vision.image_memory import ImageMemory
from ..vision.placed_image import PlacedImage, rope_positions

# See `read_inputs_torch`.
ReadInputs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], "TokenInputs"]


@dataclass(frozen=True)
class Forwarded:
    """Hidden states [T, D] of a step, valid until the next one, and which rows and requests sample."""

    hidden: torch.Tensor
    sample_rows: torch.Tensor
    sampling_req_rows: torch.Tensor


@dataclass(frozen=True)
class ImageRows:
    """Tokens `[first, last)` of an image, in the step's rows from `row` on."""

    image: PlacedImage
    row: int
    first: int
    last: int


@dataclass(frozen=True)
class HostBatch:
    """A step's tensors on the host, T tokens of B requests. An id of -1 stands for a token that only the device knows."""

    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    req_rows: np.ndarray  # [B] int64
    q_lens: list[int]
    kv_lens: list[int]
    sampling: list[int]  # indices of the requests that sample
    # Of a step with a request that has images: positions [3, T] int64, and the parts of images in it.
    rope_positions: np.ndarray | None = None
    images: Sequence[ImageRows] = ()

    @property
    def not_sampling(self) -> list[int]:
        """Indices of the others: a chunk of a prompt each."""
        return sorted(set(range(len(self.q_lens))).difference(self.sampling))


def lay_out(batch: ScheduleBatch) -> HostBatch:
    """The plan's tokens, requests in order."""
    q_lens = [req.num_tokens for req in batch.reqs]
    ids = np.full(sum(q_lens), -1, dtype=np.int64)
    positions = np.empty_like(ids)
    first = 0
    for req in batch.reqs:
        end = first + req.num_tokens
        positions[first:end] = np.arange(req.start, req.start + req.num_tokens)
        if req.input_ids:
            ids[first:end] = np.frombuffer(req.input_ids, dtype="<i4")
        first = end
    rope, images = lay_out_images(batch.reqs, positions)
    return HostBatch(
        input_ids=ids,
        positions=positions,
        req_rows=np.array([req.row for req in batch.reqs], dtype=np.int64),
        q_lens=q_lens,
        kv_lens=[req.start + req.num_tokens for req in batch.reqs],
        sampling=[i for i, req in enumerate(batch.reqs) if req.sample],
        rope_positions=rope,
        images=images,
    )


def lay_out_images(reqs: Sequence[ScheduledReq], positions: np.ndarray) -> tuple[np.ndarray | None, list[ImageRows]]:
    """Positions [3, T] for the rotation, where they are others than those in the sequence [T], and the images' rows."""
    if not any(req.images or req.rope_delta for req in reqs):
        return None, []
    # Of text, as in decodes of many requests, all at once.
    deltas = np.array([req.rope_delta for req in reqs], dtype=np.int64)
    rope = np.tile(positions + np.repeat(deltas, [req.num_tokens for req in reqs]), (3, 1))
    images: list[ImageRows] = []
    row = 0
    for req in reqs:
        end = req.start + req.num_tokens
        if req.images:
            rope[:, row : row + req.num_tokens] = rope_positions(req.start, req.num_tokens, req.rope_delta, req.images)
        for image in req.images:
            first, last = max(image.start, req.start), min(image.end, end)
            images.append(ImageRows(image, row + first - req.start, first - image.start, last - image.start))
        row += req.num_tokens
    return rope, images


def write_graph_inputs(values: np.ndarray, host: HostBatch, token_rows: np.ndarray, scratch_row: int) -> None:
    """A step's part of what a CUDA graph reads.

    Args:
        values: [3 or 4, T'] int64, for ids, positions, pool rows and, of a model that takes images, positions for the
            rotation, which are the same in time, height and width for all but images. What no token of the step needs is
            padding, on the scratch row.
        token_rows: [T], the pool rows of the tokens.
    """
    assert not host.images, "no graph has a place for what stands for an image's tokens"
    num_tokens = len(host.input_ids)
    values[:, num_tokens:] = 0
    values[2, num_tokens:] = scratch_row
    values[:3, :num_tokens] = host.input_ids, host.positions, token_rows
    if len(values) > 3:
        values[3, :num_tokens] = host.positions if host.rope_positions is None else host.rope_positions[0]


def visual_rows(
    images: Sequence[ImageRows],
    num_tokens: int,
    memory: ImageMemory,
    layout: TokenLayout,
    device: torch.device,
    dtype: torch.dtype,
) -> VisualRows:
    """Those of a step's images' tokens that this rank holds between the layers, of `num_tokens` in all."""
    features = torch.cat([memory.rows(each.image, each.first, each.last) for each in images])
    # 0 stands for a row that is no image's, as for padding.
    places = torch.zeros(num_tokens, dtype=torch.int64)
    counted = 1
    for each in images:
        count = each.last - each.first
        places[each.row : each.row + count] = torch.arange(counted, counted + count)
        counted += count
    held = layout.scatter(places)
    rows = held.nonzero().flatten()
    return VisualRows(to_device(rows, device), to_device(features[held[rows] - 1], device).to(dtype))


@dataclass(frozen=True)
class TokenInputs:
    """What the device knows of T tokens: their ids and KV slots [T] int64, and how many keys each sees, [T] int32."""

    ids: torch.Tensor
    kv_slots: torch.Tensor
    kv_lens: torch.Tensor


def read_inputs_torch(
    inputs: torch.Tensor, last_token_ids: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> TokenInputs:
    """
    Args:
        inputs: [3 or 4, T] int64, as `write_graph_inputs` writes them.
        last_token_ids: [max_requests + 1] int64, the last token sampled per pool row.
    """
    ids, positions, rows = inputs[:3]
    return TokenInputs(
        known_ids(ids, rows, last_token_ids),
        slots_at(page_table, rows, positions, page_size),
        (positions + 1).to(torch.int32),
    )


def select_read_inputs(device: torch.device) -> ReadInputs:
    """The fastest for the device."""
    if device.type == "cpu":
        return read_inputs_torch
    # Triton comes with torch's CUDA builds alone.
    from .step_tensors_triton import read_inputs_triton  # noqa: PLC0415

    return read_inputs_triton


def known_ids(input_ids: torch.Tensor, token_rows: torch.Tensor, last_token_ids: torch.Tensor) -> torch.Tensor:
    """Ids [T], those of -1 replaced by the last one sampled for the token's row."""
    return torch.where(input_ids < 0, last_token_ids[token_rows], input_ids)


def slots_at(
    page_table: torch.Tensor, token_rows: torch.Tensor, positions: torch.Tensor, page_size: int
) -> torch.Tensor:
    """KV slots [T] of tokens at `positions` of the requests on `token_rows`."""
    pages = page_table[token_rows, positions // page_size].to(torch.int64)
    return pages * page_size + positions % page_size


def make_forward_batch(
    host: HostBatch,
    pool: ReqToTokenPool,
    page_size: int,
    last_token_ids: torch.Tensor,
    attention: AttentionBackend[PlanT],
    layout: TokenLayout,
    visual: VisualRows | None = None,
) -> ForwardBatch[PlanT]:
    """Bring a step to the device, in one transfer, but for images.

    Args:
        last_token_ids: [max_requests + 1] int64, the last token sampled per pool row.
    """
    device = pool.page_table.device
    sample_rows = np.cumsum(host.q_lens)[host.sampling] - 1
    parts = [
        host.input_ids,
        host.positions,
        np.repeat(host.req_rows, host.q_lens),
        host.req_rows,
        sample_rows,
        host.req_rows[host.sampling],
    ]
    packed = to_device(np.concatenate(parts).astype(np.int64), device)
    ids, positions, token_rows, req_rows, sample_rows_t, sampling_req_rows = packed.split([len(part) for part in parts])
    plan = attention.plan(AttentionBatch(host.q_lens, host.kv_lens, pool.page_table, req_rows, page_size))
    return ForwardBatch(
        input_ids=known_ids(ids, token_rows, last_token_ids),
        positions=positions,
        kv_slots=slots_at(pool.page_table, token_rows, positions, page_size),
        attention_plan=plan,
        layout=layout,
        sample_rows=sample_rows_t,
        sampling_req_rows=sampling_req_rows,
        rope_positions=None if host.rope_positions is None else to_device(host.rope_positions, device),
        visual=visual,
    )
