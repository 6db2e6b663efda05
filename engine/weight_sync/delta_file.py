"""A delta as a safetensors file: its payload is one tensor of bytes, and its manifest stands in the file's metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from ..models.safetensors_file import SafetensorsFile
from .delta_maker import DeltaBucket
from .delta_manifest import DeltaManifest, parse_manifest
from .shared_file import shared_safetensors

FORMAT = "waybill.delta"
PAYLOAD = "payload"
# Of a folder: one file, or several, which are taken as one update.
FILE_PATTERN = "delta*.safetensors"


def delta_metadata(bucket: DeltaBucket) -> dict[str, str]:
    return {"format": FORMAT, "delta": bucket.manifest.encode()}


@contextmanager
def shared_delta(bucket: DeltaBucket) -> Iterator[str]:
    """A file in memory for the ranks of this host; it is gone after the block."""
    with shared_safetensors({PAYLOAD: bucket.payload}, delta_metadata(bucket)) as path:
        yield path


def write_delta(bucket: DeltaBucket, path: Path) -> None:
    """For `update_weights_from_disk` name the files of a folder `delta*.safetensors`."""
    save_file({PAYLOAD: bucket.payload}, path, metadata=delta_metadata(bucket))


class DeltaFile:
    """The manifest of such a file, and where its payload begins.

    Raises:
        SafetensorError, OSError, ValueError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.file = SafetensorsFile(path)
        if self.file.metadata.get("format") != FORMAT or list(self.file.tensors) != [PAYLOAD]:
            raise ValueError(f"{path.name}: has no delta: its metadata must say so, and its one tensor be {PAYLOAD!r}")
        self.manifest: DeltaManifest = parse_manifest(self.file.metadata.get("delta", ""))
        stored = self.file.tensors[PAYLOAD]
        if stored.dtype != "U8" or stored.num_bytes != self.manifest.num_bytes:
            raise ValueError(
                f"{path.name}: its payload is {stored.num_bytes} bytes of {stored.dtype}, and the manifest says "
                f"{self.manifest.num_bytes} of U8"
            )
        self.begin = stored.begin


def find_delta_files(path: str, *, whole: bool) -> list[Path]:
    """The file at `path`, or with `whole` all of a folder.

    Raises:
        ValueError: there is none.
    """
    place = Path(path)
    found = sorted(place.glob(FILE_PATTERN)) if whole else [place]
    if not found or not all(file.is_file() for file in found):
        raise ValueError(f"no {FILE_PATTERN} there" if whole else "not a regular file")
    return found
