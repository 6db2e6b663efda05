"""A delta on its way into a rank's weights.

First all ranks compute what every tensor's checksum is and what it would become, each of the pieces that it holds, and
compare both with what the delta says. Only then is anything changed; so a delta for other weights, or one that would
not give what the trainer has, leaves everything as it was. A rank decodes the chunks in which it holds values, one at a
time, on its device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from ...parallel.mesh import Axis
from ...parallel.weights import ShardedWeight
from .checksum import checksum_piece
from .delta_manifest import SEND_FULL, DeltaManifest, DeltaPart
from .delta_part import BoundPart
from .delta_source import DeltaSource, Payload
from .inspection import bounds_of, join_checksums
from .report import RankReport, exchange_reports
from .transfer import TRANSFER_ERRORS, AllHaveIt, Target

# By tensor, of each piece, modulo 2^64.
Sums = dict[str, list[int]]


@dataclass
class KnownSums:
    """Checksums of this rank's pieces that are known without reading them: those that the last delta left, until anything
    else writes weights."""

    sums: Sums = field(default_factory=dict)
    # The name under which a checkpoint's tensor was written last, alone or fused.
    names: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, weight: ShardedWeight) -> list[int]:
        if name in self.sums:
            return self.sums[name]
        return [checksum_piece(piece.storage, piece.index, weight.shape) for piece in weight.pieces]

    def keep(self, name: str, covered: frozenset[str], sums: list[int]) -> None:
        """After the checkpoint's tensors `covered` were written under `name`."""
        self.lose(covered)
        self.names.update(dict.fromkeys(covered, name))
        self.sums[name] = sums

    def lose(self, covered: frozenset[str]) -> None:
        for tensor in covered:
            self.sums.pop(self.names.get(tensor, tensor), None)

    def clear(self) -> None:
        self.sums.clear()
        self.names.clear()


def check_held(parts: Sequence[DeltaPart], known: Mapping[str, ShardedWeight]) -> None:
    """Values that change one by one must be there as the trainer sends them.

    Raises:
        ValueError: this rank keeps some of them otherwise.
    """
    for part in parts:
        weight = known.get(part.name)
        for piece in () if weight is None or part.is_whole else weight.pieces:
            held = str(piece.storage.dtype).removeprefix("torch.")
            if held != part.dtype:
                raise ValueError(
                    f"delta: {part.name}: the engine keeps it in {held}, so its values in {part.dtype} cannot change one "
                    "by one; send it whole, or in the engine's dtype"
                )


@dataclass(frozen=True)
class DeltaTransfer:
    """`covered` are the checkpoint's tensors that each name stands for."""

    source: DeltaSource
    covered: Mapping[str, frozenset[str]]
    sums: KnownSums
    world: Axis

    def load(self, target: Target, all_have_it: AllHaveIt) -> None:
        with ExitStack() as files:
            parts = self._bind(self._open(files, all_have_it), target)
            bases, moves = self._verify(parts)
            for part in parts:
                covered = self.covered[part.name]
                if part.part.is_whole:
                    target.changes.any = True
                    self.sums.lose(covered)
                    part.load_whole()
                    continue
                if part.part.chunks:
                    target.changes.any = True
                    self.sums.lose(covered)
                    if part.walk(write=True) != moves[part.name]:
                        raise ValueError(f"delta: {part.name}: its bytes are not what they were when they were checked")
                sums = [base + moved for base, moved in zip(bases[part.name], moves[part.name], strict=True)]
                self.sums.keep(part.name, covered, sums)

    def _open(self, files: ExitStack, all_have_it: AllHaveIt) -> Sequence[tuple[DeltaManifest, Payload]]:
        error = None
        opened: Sequence[tuple[DeltaManifest, Payload]] = []
        try:
            opened = self.source.open(files)
        except (ValueError, *TRANSFER_ERRORS) as problem:
            error = str(problem)
        refusal = all_have_it(error)
        if refusal is not None:
            raise RuntimeError(refusal)
        return opened

    def _bind(self, opened: Sequence[tuple[DeltaManifest, Payload]], target: Target) -> list[BoundPart]:
        return [
            BoundPart(part, target.weights[part.name], payload, begin, manifest.chunk_values)
            for manifest, payload in opened
            for part, begin in manifest.placed()
            if part.name not in target.ignored
        ]

    def _verify(self, parts: Sequence[BoundPart]) -> tuple[Sums, Sums]:
        """Of tensors that do not come whole, what this rank's pieces sum up to, and by how much that will change.

        Raises:
            ValueError, RuntimeError: the delta is not for these weights, or is damaged; on all ranks.
        """
        error = None
        bases: Sums = {}
        moves: Sums = {}
        try:
            for part in parts:
                if part.part.is_whole:
                    part.check_whole()
                else:
                    bases[part.name] = self.sums.of(part.name, part.weight)
                    moves[part.name] = part.walk(write=False)
        except (ValueError, OSError) as problem:
            error = str(problem)
        weights = {part.name: part.weight for part in parts if not part.part.is_whole}
        payload = b"" if error else msgspec.msgpack.encode([encode_sums(sums, weights) for sums in (bases, moves)])
        verdict = exchange_reports(RankReport(error, payload=payload), self.world)
        if verdict.error is not None:
            raise RuntimeError(verdict.error)
        told = [msgspec.msgpack.decode(report.payload, type=list[bytes]) for report in verdict.reports]
        found, moved = (join_checksums([ranks[place] for ranks in told], weights) for place in (0, 1))
        for part in parts:
            if part.name in weights:
                check_sums(part.part, found[part.name], moved[part.name])
        return bases, moves


def encode_sums(sums: Sums, weights: Mapping[str, ShardedWeight]) -> bytes:
    """In the form of `piece_checksums`. Messages have signed integers of 64 bits."""
    found = {
        name: [
            (bounds_of(piece), (total + 2**63) % 2**64 - 2**63)
            for piece, total in zip(weight.pieces, sums[name], strict=True)
        ]
        for name, weight in weights.items()
    }
    return msgspec.msgpack.encode(found)


def check_sums(part: DeltaPart, found: str, moved: str) -> None:
    """The checksum of all ranks' pieces, and by how much it will change.

    Raises:
        ValueError: the tensor is not what the delta starts from, or would not become what the trainer has.
    """
    if found != part.base:
        raise ValueError(
            f"delta: {part.name}: its checksum here is {found}, and the delta was made for {part.base}; {SEND_FULL}"
        )
    coming = f"{(int(found, 16) + int(moved, 16)) % 2**64:016x}"
    if coming != part.checksum:
        raise ValueError(
            f"delta: {part.name}: the result would have checksum {coming}, and the trainer's is {part.checksum}; "
            f"{SEND_FULL}"
        )
