"""The trainer's half of delta updates: keeps the weights that were sent last, and says what has changed since.

A `DeltaMaker` holds a copy of every tensor on the host, in the dtype that is sent: as many bytes as the engine has weights,
2 for a parameter in bfloat16, and 16 hexadecimal digits a tensor. What it makes is as large as what changed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import torch

from .checksum import checksum, place_factors, render
from .delta_codec import as_bytes, bits_of, changed_places, encode_chunk
from .delta_manifest import DEFAULT_CHUNK_VALUES, Chunk, DeltaManifest, DeltaPart

NamedTensor = tuple[str, torch.Tensor]

DEFAULT_DELTA_BYTES = 256 << 20


@dataclass(frozen=True)
class DeltaBucket:
    """Some tensors' changes; the payload is uint8, on the host."""

    manifest: DeltaManifest
    payload: torch.Tensor

    @property
    def num_full_bytes(self) -> int:
        """Of the same tensors, whole."""
        return sum(part.spec.num_bytes for part in self.manifest.parts)


@dataclass
class Sent:
    """A tensor as it was sent last, and its checksum as a sum modulo 2^64."""

    tensor: torch.Tensor
    total: int


class DeltaMaker:
    """
    Args:
        bucket_bytes: about how large a bucket's payload may become. An engine takes at most 2 GiB in one.
        whole: names whose values are sent whole always: those that the engine keeps in another dtype.
    """

    def __init__(
        self,
        *,
        bucket_bytes: int = DEFAULT_DELTA_BYTES,
        chunk_values: int = DEFAULT_CHUNK_VALUES,
        whole: Container[str] = (),
    ) -> None:
        self._bucket_bytes = bucket_bytes
        self._chunk_values = chunk_values
        self._whole = whole
        self._sent: dict[str, Sent] = {}

    @property
    def has_base(self) -> bool:
        return bool(self._sent)

    @property
    def num_held_bytes(self) -> int:
        return sum(sent.tensor.nbytes for sent in self._sent.values())

    def remember(self, named_tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Pass on what a full update sends, and keep a copy of each: the base of the next delta."""
        for name, tensor in named_tensors:
            kept = tensor.detach().to("cpu", copy=True).contiguous()
            self._sent[name] = Sent(kept, int(checksum(kept), 16))
            yield name, tensor

    def forget(self) -> None:
        """After an update that was refused or broke off: the next one must be full."""
        self._sent.clear()

    def deltas(self, named_tensors: Iterable[NamedTensor]) -> Iterator[DeltaBucket]:
        """What takes an engine from what was sent last to these, in the dtype in which it was sent. The copy moves on with
        what is made; where a bucket does not arrive, `forget`.

        Raises:
            ValueError: a tensor was not sent before, or had another shape or dtype.
        """
        parts: list[DeltaPart] = []
        data: list[torch.Tensor] = []
        num_bytes = 0
        for name, tensor in named_tensors:
            part, pieces = self._part(name, tensor.detach().contiguous())
            if parts and num_bytes + part.num_bytes > self._bucket_bytes:
                yield self._bucket(parts, data)
                parts, data, num_bytes = [], [], 0
            parts.append(part)
            data.extend(pieces)
            num_bytes += part.num_bytes
        if parts:
            yield self._bucket(parts, data)

    def _bucket(self, parts: list[DeltaPart], data: list[torch.Tensor]) -> DeltaBucket:
        payload = torch.cat(data) if data else torch.empty(0, dtype=torch.uint8)
        manifest = DeltaManifest(parts, self._chunk_values)
        assert len(payload) == manifest.num_bytes
        return DeltaBucket(manifest, payload)

    def _part(self, name: str, tensor: torch.Tensor) -> tuple[DeltaPart, list[torch.Tensor]]:
        sent = self._sent.get(name)
        if sent is None:
            raise ValueError(f"{name}: was not sent before; {sorted(self._sent)[:1]} and others were")
        if (sent.tensor.shape, sent.tensor.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name}: was sent as {sent.tensor.dtype} {tuple(sent.tensor.shape)}, "
                f"now it is {tensor.dtype} {tuple(tensor.shape)}"
            )
        base = sent.total
        chunks, data = self._advance(sent, tensor)
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if name in self._whole or sum(chunk.num_bytes for chunk in chunks) > tensor.nbytes:
            # A copy: the trainer's next step may come before the bucket goes.
            return DeltaPart(name, dtype, shape, render(sent.total)), [as_bytes(sent.tensor.clone())]
        return DeltaPart(name, dtype, shape, render(sent.total), render(base), chunks), data

    def _advance(self, sent: Sent, tensor: torch.Tensor) -> tuple[list[Chunk], list[torch.Tensor]]:
        """Chunks that take the copy to `tensor`, where it is then; compared on the tensor's device."""
        chunks: list[Chunk] = []
        data: list[torch.Tensor] = []
        old_bits, new_bits = bits_of(sent.tensor.view(-1)), bits_of(tensor.view(-1))
        for number, new in enumerate(new_bits.split(self._chunk_values)):
            kept = old_bits[number * self._chunk_values :][: len(new)]
            old = kept.to(new.device)
            places = changed_places(old, new)
            chunk, pieces = encode_chunk(old, new, places)
            chunks.append(chunk)
            if chunk.num_changed:
                data.extend(piece.cpu() for piece in pieces)
                moved = new[places].to(torch.int64) - old[places].to(torch.int64)
                sent.total += int((moved * place_factors(places + number * self._chunk_values)).sum())
                kept.copy_(new)
        if all(chunk.num_changed == 0 for chunk in chunks):
            return [], []
        return chunks, data
