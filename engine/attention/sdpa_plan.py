"""What a step's requests read and see, for attention over gathered keys."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch

from ...parallel.cpu_ops.attention import Pages
from ...parallel.host_to_device import to_device
from .backend import AttentionBatch, first_slots, slots_at, slots_of


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar length: their rows [B'], KV slots [B' * n], and mask [B', 1, 1, n] (None: nothing is padded)."""

    rows: torch.Tensor
    slots: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Prefill:
    """One request's rows [first, last) and KV slots [n]."""

    first: int
    last: int
    slots: torch.Tensor


@dataclass(frozen=True)
class SdpaPlan:
    """`tables` [B, P] are the requests' pages. What layers ask for is made once; groups of decodes for every window."""

    batch: AttentionBatch
    tables: torch.Tensor
    groups: dict[int | None, list[DecodeGroup]] = field(default_factory=dict)

    @cached_property
    def firsts(self) -> list[int]:
        """The requests' first rows."""
        return list(accumulate(self.batch.q_lens, initial=0))[:-1]

    @cached_property
    def prefills(self) -> list[Prefill]:
        """Requests that do not bring one token."""
        batch = self.batch
        return [
            Prefill(first, first + q_len, first_slots(self.tables[i], kv_len, batch.page_size))
            for i, (first, q_len, kv_len) in enumerate(zip(self.firsts, batch.q_lens, batch.kv_lens, strict=True))
            if q_len != 1
        ]

    @cached_property
    def rows(self) -> torch.Tensor:
        """First rows, numbers of rows and numbers of positions of the requests, [3, B] int64 on the host."""
        return torch.tensor([self.firsts, self.batch.q_lens, self.batch.kv_lens], dtype=torch.int64)

    @cached_property
    def pages(self) -> Pages:
        """What the operator on a CPU is told of the step."""
        return Pages(self.tables, self.rows, self.batch.page_size)

    def decodes(self, window: int | None) -> list[DecodeGroup]:
        if window not in self.groups:
            members: dict[int, list[int]] = defaultdict(list)
            for i, (q_len, kv_len) in enumerate(zip(self.batch.q_lens, self.batch.kv_lens, strict=True)):
                if q_len == 1:
                    members[min(kv_len, window or kv_len).bit_length()].append(i)
            self.groups[window] = [self._group(each, window) for each in members.values()]
        return self.groups[window]

    def _group(self, members: list[int], window: int | None) -> DecodeGroup:
        device, page_size = self.tables.device, self.batch.page_size
        ends = [self.batch.kv_lens[i] for i in members]
        lengths = [min(end, window or end) for end in ends]
        num_keys = max(lengths)
        positions = torch.arange(num_keys, device=device)
        table = self.tables[to_device(members, device)]
        rows = to_device([self.firsts[i] for i in members], device)
        if min(lengths) == max(ends):
            return DecodeGroup(rows, slots_of(table, positions, page_size).flatten(), num_keys, None)
        begins = to_device([end - length for end, length in zip(ends, lengths, strict=True)], device)[:, None]
        last = to_device(ends, device)[:, None] - 1
        wanted = begins + positions
        mask = None if min(lengths) == num_keys else (wanted <= last)[:, None, None, :]
        # Padding repeats a request's own last key: beyond it lies what others left, and no mask hides NaN.
        slots = slots_at(table, torch.minimum(wanted, last), page_size)
        return DecodeGroup(rows, slots.flatten(), num_keys, mask)


def visible_keys(
    num_rows: int, num_keys: int, window: int | None, num_sinks: int, device: torch.device
) -> torch.Tensor:
    """What each of the last `num_rows` of `num_keys` positions may see: [num_rows, num_keys]. The first `num_sinks` are
    seen by all."""
    if device.type != "cpu" and window is None:
        # A bias that the fused kernels know, so that they need no mask in memory. Importing it imports torch's compiler,
        # which is a third of what a rank imports.
        from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

        return causal_lower_right(num_rows, num_keys)
    visible = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_rows)
    if window is not None:
        visible.triu_(num_keys - num_rows - window + 1)
        visible[:, :num_sinks] = True
    return visible
