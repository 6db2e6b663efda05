"""A step on the device: the tensors that a forward pass reads, made from a `ScheduleBatch` once per step.

Legend: T tokens of the step, B requests, N rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from .attention.backend import AttentionBackend, AttentionBatch
from .kv_cache.req_to_token_pool import ReqToTokenPool
from .schedule_batch import ScheduleBatch
from .schedule_policy import pages_for

PlanT = TypeVar("PlanT")


@dataclass(frozen=True)
class ForwardBatch(Generic[PlanT]):
    """Inputs of one forward pass. `kv_slots` are the slots that the new keys and values go to."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    kv_slots: torch.Tensor  # [T] int64
    attention_plan: PlanT
    sample_rows: torch.Tensor  # [N] int64, rows of the requests that sample
    sampling_req_rows: torch.Tensor  # [N] int64, their rows in the request pool


def make_forward_batch(
    batch: ScheduleBatch,
    pool: ReqToTokenPool,
    page_size: int,
    last_token_ids: torch.Tensor,
    attention: AttentionBackend[PlanT],
    device: torch.device,
) -> ForwardBatch[PlanT]:
    """Enter the plan's pages in the page table and lay its tokens out, requests in order.

    Args:
        last_token_ids: [max_requests] int64, the last token sampled per pool row; fed where the host knows no id yet.
    """
    for req in batch.reqs:
        if req.pages:
            pool.write(req.row, req.first_page, req.pages)
    q_lens = [req.num_tokens for req in batch.reqs]
    ends = np.cumsum(q_lens)
    ids = np.zeros(int(ends[-1]), dtype=np.int64)
    positions = np.empty_like(ids)
    in_flight: list[int] = []
    for req, end in zip(batch.reqs, ends, strict=True):
        start = end - req.num_tokens
        positions[start:end] = np.arange(req.start, req.start + req.num_tokens)
        if req.input_ids:
            ids[start:end] = np.frombuffer(req.input_ids, dtype="<i4")
        else:
            in_flight.append(int(start))
    rows = np.array([req.row for req in batch.reqs], dtype=np.int64)
    input_ids = torch.from_numpy(ids).to(device)
    positions_t = torch.from_numpy(positions).to(device)
    rows_t = torch.from_numpy(rows).to(device)
    token_rows = torch.from_numpy(np.repeat(rows, q_lens)).to(device)
    if in_flight:
        where = torch.tensor(in_flight, device=device)
        input_ids[where] = last_token_ids[token_rows[where]]
    pages = pool.page_table[token_rows, positions_t // page_size].to(torch.int64)
    max_kv_len = max(req.start + req.num_tokens for req in batch.reqs)
    sampling = [i for i, req in enumerate(batch.reqs) if req.sample]
    attention_batch = AttentionBatch(
        q_lens=q_lens,
        kv_lens=[req.start + req.num_tokens for req in batch.reqs],
        page_table=pool.page_table[:, : pages_for(max_kv_len, page_size)][rows_t],
        page_size=page_size,
    )
    return ForwardBatch(
        input_ids=input_ids,
        positions=positions_t,
        kv_slots=pages * page_size + positions_t % page_size,
        attention_plan=attention.plan(attention_batch),
        sample_rows=torch.from_numpy(ends[sampling] - 1).to(device),
        sampling_req_rows=rows_t[sampling],
    )
