"""The KV pool's memory: named per-token tensors per layer, so that attention of other kinds (a latent, say) fits too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .shared_memory import SharedMemory

# Of each kind of tensor in the memory, in bytes.
ALIGNMENT = 512


@dataclass(frozen=True)
class KVTensorSpec:
    """One tensor of a layer: what it is called and how wide a token's entry is."""

    name: str
    width: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StackPlace:
    """Where in the pool's memory one kind of tensor lies: `[layers, slots, *width]` from byte `offset` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensors of all layers in such a memory, uint8 [bytes]."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


class KVStore:
    """`layer(i)[name]` is [(num_pages + 1) * page_size, *width]; slot = page * page_size + offset.

    All of it is one piece of memory, which another process can map as a whole: on the host where it `is_shared`, on a
    device with its driver's handles. `scratch_page`, the last one, is for the padding of a batch: written, and read by
    nobody. `generation` counts how often the memory was taken anew at another address; 0 while it is given back.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        specs: Sequence[KVTensorSpec],
        device: torch.device,
        *,
        is_shared: bool = False,
    ) -> None:
        num_slots = (num_pages + 1) * page_size
        self.scratch_page = num_pages
        self.stacks: list[StackPlace] = []
        end = 0
        for spec in specs:
            self.stacks.append(StackPlace(end, (num_layers, num_slots, *spec.width), spec.dtype))
            end += -(-self.stacks[-1].num_bytes // ALIGNMENT) * ALIGNMENT
        self.shared = SharedMemory(end, "waybill-kv-pool") if is_shared and device.type == "cpu" else None
        # Zeros, because a masked slot that holds NaN would still poison a softmax-weighted sum.
        self.memory = torch.zeros(end, dtype=torch.uint8, device=device) if self.shared is None else self.shared.tensor
        self._num_bytes = end
        self._num_made = self.generation = 1
        # Memory of a device that others have mapped is free when they have let go of it.
        self.before_release: Callable[[], None] = lambda: None
        views = {spec.name: place.of(self.memory) for spec, place in zip(specs, self.stacks, strict=True)}
        self._layers = [{name: view[layer] for name, view in views.items()} for layer in range(num_layers)]

    def layer(self, layer_id: int) -> dict[str, torch.Tensor]:
        return self._layers[layer_id]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        for layer in self._layers:
            yield from layer.values()

    def release(self) -> None:
        """Give the memory back. The tensors stay, and must not be touched."""
        self.generation = 0
        if self.shared is not None:
            self.shared.discard()
        else:
            self.before_release()
            self.memory.untyped_storage().resize_(0)

    def resume(self) -> None:
        """Take memory again, filled with zeros."""
        if self.shared is None:
            self.memory.untyped_storage().resize_(self._num_bytes)
            self.memory.zero_()
            self._num_made += 1
        self.generation = self._num_made

    @staticmethod
    def bytes_per_token(num_layers: int, specs: Sequence[KVTensorSpec]) -> int:
        return num_layers * sum(math.prod(spec.width) * spec.dtype.itemsize for spec in specs)
