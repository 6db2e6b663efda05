"""The KV pool's memory: named per-token tensors per layer, so that attention of other kinds (a latent, say) fits too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVTensorSpec:
    """One tensor of a layer: what it is called and how wide a token's entry is."""

    name: str
    width: tuple[int, ...]
    dtype: torch.dtype


class KVStore:
    """`layer(i)[name]` is [(num_pages + 1) * page_size, *width]; slot = page * page_size + offset.

    `scratch_page`, the last one, is for the padding of a batch: written, and read by nobody.
    """

    def __init__(
        self, num_layers: int, num_pages: int, page_size: int, specs: Sequence[KVTensorSpec], device: torch.device
    ) -> None:
        num_slots = (num_pages + 1) * page_size
        self.scratch_page = num_pages
        # Zeros, because a masked slot that holds NaN would still poison a softmax-weighted sum.
        self._layers = [
            {spec.name: torch.zeros(num_slots, *spec.width, dtype=spec.dtype, device=device) for spec in specs}
            for _ in range(num_layers)
        ]

    def layer(self, layer_id: int) -> dict[str, torch.Tensor]:
        return self._layers[layer_id]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        for layer in self._layers:
            yield from layer.values()

    @staticmethod
    def bytes_per_token(num_layers: int, specs: Sequence[KVTensorSpec]) -> int:
        return num_layers * sum(math.prod(spec.width) * spec.dtype.itemsize for spec in specs)
