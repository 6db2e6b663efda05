"""Updates that send what has changed, where there is a base, and everything where there is none.

    with WeightSender([(engine, 2)]) as sender:
        updates = DeltaSender(sender)
        updates.send(gathered_tensors(model, gather), weight_version=f"step-{step}")

The first update is full, and so is the one after a failure. A `MemorySender` in place of the `WeightSender` serves engines
on the trainer's host.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from .delta_file import shared_delta
from .delta_maker import DeltaBucket, DeltaMaker, NamedTensor
from .sender import DEFAULT_BUCKET_BYTES, SendReport, may_be_cast
from .shared_file import shared_safetensors


class Sender(Protocol):
    """Either way to an engine."""

    def send(
        self, tensors: Iterable[NamedTensor], *, weight_version: str | None = None, flush_cache: bool = True
    ) -> SendReport: ...

    def send_delta(
        self, buckets: Iterable[DeltaBucket], *, base_version: str, weight_version: str, flush_cache: bool = True
    ) -> SendReport: ...


class FileEngine(Protocol):
    """An `Engine` or a `client.EngineControl`; it raises a RuntimeError where the engine refuses."""

    def update_weights_from_file(
        self,
        path: str,
        *,
        load_format: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        base_version: str | None = None,
    ) -> None: ...


class MemorySender:
    """Through shared memory, to engines of this host and user, one after the other."""

    def __init__(self, engines: Sequence[FileEngine], *, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._engines = engines
        self._bucket_bytes = bucket_bytes

    def send(
        self, tensors: Iterable[NamedTensor], *, weight_version: str | None = None, flush_cache: bool = True
    ) -> SendReport:
        began = time.perf_counter()
        num_tensors = num_bytes = 0
        for bucket in self._buckets(tensors):
            with shared_safetensors(bucket) as path:
                for engine in self._engines:
                    engine.update_weights_from_file(path, flush_cache=flush_cache, weight_version=weight_version)
            num_tensors += len(bucket)
            num_bytes += sum(tensor.nbytes for tensor in bucket.values())
        return SendReport(num_tensors, num_bytes, time.perf_counter() - began)

    def _buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, torch.Tensor]]:
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in tensors:
            if bucket and size + tensor.nbytes > self._bucket_bytes:
                yield bucket
                bucket, size = {}, 0
            # A copy: the tensor is whole for as long as it is the current one.
            bucket[name] = tensor.detach().to("cpu", copy=True)
            size += tensor.nbytes
        if bucket:
            yield bucket

    def send_delta(
        self, buckets: Iterable[DeltaBucket], *, base_version: str, weight_version: str, flush_cache: bool = True
    ) -> SendReport:
        began = time.perf_counter()
        num_tensors = num_bytes = 0
        for bucket in buckets:
            with shared_delta(bucket) as path:
                for engine in self._engines:
                    engine.update_weights_from_file(
                        path,
                        load_format="delta",
                        flush_cache=flush_cache,
                        weight_version=weight_version,
                        base_version=base_version,
                    )
            num_tensors += len(bucket.manifest.parts)
            num_bytes += len(bucket.payload)
        return SendReport(num_tensors, num_bytes, time.perf_counter() - began)


class DeltaSender:
    """
    Args:
        maker: what keeps the weights that were sent last; see there for the memory that it takes.
        dtype: what tensors are cast to before they are compared and sent; the engine's. None: they are in it.
    """

    def __init__(self, sender: Sender, maker: DeltaMaker | None = None, *, dtype: torch.dtype | None = None) -> None:
        self._sender = sender
        self._maker = maker or DeltaMaker()
        self._dtype = dtype
        self._version = ""

    @property
    def sends_full(self) -> bool:
        """Whether the next update brings everything."""
        return not self._maker.has_base

    def send(self, tensors: Iterable[NamedTensor], *, weight_version: str, flush_cache: bool = True) -> SendReport:
        """One update, of every tensor of the model. After one that fails the next is full.

        Raises:
            RuntimeError: an engine refused, or the transfer broke off.
            ValueError: a tensor is not what it was at the last update, by name, shape or dtype.
        """
        cast = (
            (name, tensor.detach().to(self._dtype) if may_be_cast(name, tensor) else tensor.detach())
            for name, tensor in tensors
        )
        try:
            if self.sends_full:
                report = self._sender.send(
                    self._maker.remember(cast), weight_version=weight_version, flush_cache=flush_cache
                )
            else:
                report = self._sender.send_delta(
                    self._maker.deltas(cast),
                    base_version=self._version,
                    weight_version=weight_version,
                    flush_cache=flush_cache,
                )
        except BaseException:
            # Where the engines are now, nobody here knows.
            self._maker.forget()
            raise
        self._version = weight_version
        return report
