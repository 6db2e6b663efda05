"""Kernels over symmetric memory, as one rank of several runs them: what the others send lies there before, so that it need
not wait, and what it sends is looked at. Compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from support.triton_twins import DEVICE, DTYPES, TOLERANCE, normal

from waybill.engine.models.norm_rope import TorchLayerOps
from waybill.parallel.best_choice import NO_CHOICE, best_choice_torch
from waybill.parallel.best_choice_triton import best_choice_triton
from waybill.parallel.mesh import Axis
from waybill.parallel.symmetric_memory import PACKET_BYTES, WORD_BYTES, RowLayout
from waybill.parallel.symmetric_triton import AddNorm, Lane, gather_routed, sum_rows

# How many ranks, and which of them runs.
PLACES = [(2, 0), (4, 2), (8, 7)]
WIDE_DTYPES = [*DTYPES, torch.float16]
BAD = {0: float("nan"), 3: float("inf"), 4: float("-inf")}


class OtherRanks:
    """The ends of a lane that the other ranks have, filled as they would fill it, and rank `rank`'s own."""

    MAX_ROWS = 6

    def __init__(self, layout: RowLayout, size: int, rank: int, *, in_packets: bool) -> None:
        self.row_bytes = layout.num_words * (PACKET_BYTES if in_packets else WORD_BYTES)
        self.others = [other for other in range(size) if other != rank]
        self._rank = rank
        self._in_packets = in_packets
        shape = (2, self.MAX_ROWS, size, self.row_bytes)
        self._memory = [torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
        self._flags = [torch.zeros(self.MAX_ROWS, size, dtype=torch.int32, device=DEVICE) for _ in range(size)]
        calls = torch.zeros(self.MAX_ROWS, dtype=torch.int32, device=DEVICE)
        addresses = [torch.tensor([x.data_ptr() for x in each], device=DEVICE) for each in (self._memory, self._flags)]
        self.lane = Lane(calls, self._flags[rank], *addresses, self.row_bytes, rank, in_packets)

    def send(self, source: int, words: torch.Tensor, call: int) -> None:
        """Words [P, W] int32 of call `call` from rank `source` to the one that runs."""
        for row, line in enumerate(words):
            place = self._memory[self._rank][call & 1, row, source]
            self._flags[self._rank][row, source] = call
            if self._in_packets:
                packets = torch.stack([line, torch.full_like(line, call)], dim=1).flatten()
                place[: packets.nbytes] = packets.view(torch.uint8)
            else:
                place[: line.nbytes] = line.view(torch.uint8)

    def received(self, other: int, num_rows: int, num_words: int, call: int) -> torch.Tensor:
        """Words [P, W] that rank `other` has got in call `call`."""
        places = self._memory[other][call & 1, :num_rows, self._rank].contiguous().view(torch.int32)
        if not self._in_packets:
            assert (self._flags[other][:num_rows, self._rank] == call).all()
            return places[:, :num_words]
        packets = places.view(num_rows, -1, 2)[:, :num_words]
        assert (packets[:, :, 1] == call).all()
        return packets[:, :, 0]


def words_of(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A row as it travels between ranks."""
    wide = weights.view(torch.int32) if weights.itemsize == 4 else weights.view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.cat([hidden.view(torch.int32), ids.to(torch.int32), wide], dim=1)


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
@pytest.mark.parametrize("in_packets", [True, False])
@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize(("size", "rank"), PLACES)
def test_sums(dtype: torch.dtype, in_packets: bool, scatter: bool, size: int, rank: int) -> None:
    """What a rank sends, and the sum with the add and norm that follow; call after call in the same places."""
    rows, width = 3, 48
    others = OtherRanks(RowLayout(width, 2, dtype), size, rank, in_packets=in_packets)
    parts = [slice(rows * place, rows * place + rows) if scatter else slice(0, rows) for place in range(size)]
    for call in range(1, 5):
        terms = [normal(parts[-1].stop, width, dtype=dtype, seed=size * call + i) for i in range(size)]
        residual, weight = normal(rows, width, dtype=dtype, seed=9), normal(width, dtype=dtype, seed=10)
        for other in others.others:
            others.send(other, terms[other][parts[rank]].view(torch.int32), call)
        summed = torch.zeros(rows, width, device=DEVICE)
        for term in terms:
            summed += term[parts[rank]].float()
        expected = summed.to(dtype)
        if call % 2:
            assert torch.equal(sum_rows(terms[rank], others.lane, scatter=scatter), expected)
        else:
            wanted, total = TorchLayerOps().add_rms_norm(expected, residual.clone(), weight, 1e-6)
            normed = sum_rows(terms[rank], others.lane, scatter=scatter, then=AddNorm(residual, weight, 1e-6))
            assert torch.equal(residual, total)
            torch.testing.assert_close(normed, wanted, **TOLERANCE[dtype])
        for other in others.others:
            sent = terms[rank][parts[other]].view(torch.int32)
            assert torch.equal(others.received(other, rows, sent.shape[1], call), sent)


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
@pytest.mark.parametrize("in_packets", [True, False])
@pytest.mark.parametrize("num_experts", [16, 384])
@pytest.mark.parametrize(("size", "rank"), PLACES)
def test_gather_of_routed_rows(dtype: torch.dtype, in_packets: bool, num_experts: int, size: int, rank: int) -> None:
    """The record has the rows of the world from the second on, as many as it holds."""
    rows, width, top_k = 3, 48, 3
    others = OtherRanks(RowLayout(width, top_k, dtype), size, rank, in_packets=in_packets)
    is_padding = torch.tensor([False, False, True], device=DEVICE)
    num_recorded = rows * size - 2
    for call in range(1, 5):
        hidden = [normal(rows, width, dtype=dtype, seed=size * call + i) for i in range(size)]
        weights = [normal(rows, top_k, dtype=dtype, seed=size * call + i) for i in range(size)]
        choices = torch.arange(rows * top_k, device=DEVICE).view(rows, top_k) * (37 + num_experts // 7)
        ids = [(choices * (1 + 2 * i) + call) % num_experts for i in range(size)]
        for other in others.others:
            others.send(other, words_of(hidden[other], ids[other], weights[other]), call)
        dtype_of_record = torch.uint8 if num_experts <= 256 else torch.uint16
        record = torch.full((num_recorded, top_k), 255, dtype=dtype_of_record, device=DEVICE)
        found = gather_routed(hidden[rank], ids[rank], weights[rank], is_padding, others.lane, record, 1)
        ids[rank] = torch.where(is_padding[:, None], -1, ids[rank])
        for given, expected in zip(found, map(torch.cat, (hidden, ids, weights)), strict=True):
            assert torch.equal(given, expected)
        assert torch.equal(record.long(), torch.cat(ids)[1 : num_recorded + 1].to(record.dtype).long())
        sent = words_of(hidden[rank], ids[rank], weights[rank])
        for other in others.others:
            assert torch.equal(others.received(other, rows, sent.shape[1], call), sent)


@pytest.mark.parametrize(("size", "rank"), PLACES)
def test_best_choice(size: int, rank: int) -> None:
    """More rows than the lane has: several travel as one. Ties, rows without a choice on one rank, or on all but one."""
    rows, candidates = 11, 5
    others = OtherRanks(RowLayout(16, 2, torch.float32), size, rank, in_packets=True)
    together = others.lane.choices_a_row(rows)
    assert together == 2
    for call in range(1, 5):
        seeds = range(size * call, size * call + size)
        scores = [normal(rows, candidates, dtype=torch.float32, seed=seed).round(decimals=1) for seed in seeds]
        ids = [torch.arange(candidates, device=DEVICE).repeat(rows, 1) * size + i for i in range(size)]
        for row, value in BAD.items():
            scores[(row + call) % size][row] = value
        for other in range(size):
            if other != (4 + call) % size:
                scores[other][4] = float("-inf")
        for other in others.others:
            packed = torch.zeros(6, 2, together, dtype=torch.int32, device=DEVICE)
            best = scores[other].nan_to_num(float("-inf"), float("inf"), float("-inf")).amax(dim=1)
            sent = torch.where(scores[other].isnan().any(dim=1), float("nan"), best)
            sent_ids = torch.where(scores[other] == best[:, None], ids[other], 999).amin(dim=1).to(torch.int32)
            for row in range(rows):
                choice = torch.stack([sent[row].view(torch.int32), sent_ids[row]])
                packed[row // together, :, row % together] = choice
            others.send(other, packed.flatten(1), call)
        found = best_choice_triton(scores[rank], ids[rank], others.lane)
        assert torch.equal(found, best_choice_torch(torch.cat(scores, 1), torch.cat(ids, 1), Axis.single()))
        assert (found[list(BAD)] == NO_CHOICE).all() and (found >= 0).sum() == rows - len(BAD)
