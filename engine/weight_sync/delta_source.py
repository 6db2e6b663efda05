"""Where a delta comes from: one broadcast of the trainer's, or files that every rank reads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch

from ..models.weight_loader import read_exactly
from .delta_file import DeltaFile
from .delta_manifest import DeltaManifest, DeltaPart
from .update_group import UpdateGroup


class Payload(Protocol):
    """The bytes of a delta, wherever they are."""

    def fetch(self, begin: int, num_bytes: int) -> torch.Tensor:
        """uint8.

        Raises:
            OSError, ValueError: they cannot be read.
        """
        ...


@dataclass(frozen=True)
class StagedPayload:
    """In memory."""

    data: torch.Tensor

    def fetch(self, begin: int, num_bytes: int) -> torch.Tensor:
        return self.data[begin : begin + num_bytes]


@dataclass(frozen=True)
class FilePayload:
    """In an open file."""

    descriptor: int
    begin: int

    def fetch(self, begin: int, num_bytes: int) -> torch.Tensor:
        data = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            read_exactly(self.descriptor, self.begin + begin, data)
        return data


class DeltaSource(Protocol):
    """Where a delta comes from."""

    @property
    def parts(self) -> Sequence[DeltaPart]: ...

    def open(self, files: ExitStack) -> Sequence[tuple[DeltaManifest, Payload]]:
        """Every bucket and its bytes, as long as `files` is open.

        Raises:
            ValueError, RuntimeError, OSError: it cannot be had.
        """
        ...


@dataclass(frozen=True)
class BroadcastDelta:
    """One broadcast of the trainer's."""

    group: UpdateGroup
    manifest: DeltaManifest

    @property
    def parts(self) -> Sequence[DeltaPart]:
        return self.manifest.parts

    def open(self, files: ExitStack) -> Sequence[tuple[DeltaManifest, Payload]]:
        data = torch.empty(self.manifest.num_bytes, dtype=torch.uint8, device=self.group.device)
        if len(data):
            self.group.broadcast(data)
        return [(self.manifest, StagedPayload(data))]


@dataclass(frozen=True)
class FilesDelta:
    """Files that every rank reads by itself."""

    files: Sequence[DeltaFile]

    @property
    def parts(self) -> Sequence[DeltaPart]:
        return [part for file in self.files for part in file.manifest.parts]

    def open(self, files: ExitStack) -> Sequence[tuple[DeltaManifest, Payload]]:
        return [
            (each.manifest, FilePayload(files.enter_context(each.file.open()).fileno(), each.begin))
            for each in self.files
        ]
