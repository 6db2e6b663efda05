"""The trainer's half of a weight update: buckets of tensors, broadcast to all ranks of one engine or several.

    with WeightSender([(engine, 2)]) as sender:    # trainer rank 0; an `Engine` or a `client.EngineControl` of two ranks
        sender.send(named_tensors, weight_version="step-1")

With a sharded trainer every rank iterates over the parameters, because gathering one is a collective; rank 0 alone sends:
see `gathered_tensors`.
"""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...parallel.fp8 import SCALE_ENDING
from ..control.operations import DEFAULT_BACKEND, DEFAULT_GROUP
from .delta_maker import DeltaBucket
from .manifest import TensorSpec
from .update_group import SOURCE, UpdateGroup, resolve_backend

NamedTensor = tuple[str, torch.Tensor]
Future = concurrent.futures.Future[Any]
# Makes a parameter whole on this rank for as long as the block lasts, e.g. deepspeed.zero.GatheredParameters([p]).
Gather = Callable[[nn.Parameter], AbstractContextManager[object]]

DEFAULT_BUCKET_BYTES = 512 << 20
# When a transfer breaks off here, the engine that broke it off is about to say why.
ANSWER_TIMEOUT_S = 10.0
CORRECTION_ENDING = "e_score_correction_bias"


def may_be_cast(name: str, tensor: torch.Tensor) -> bool:
    """Not FP8 and its scales, each nothing without the other, nor corrections of routers, which choices hang on."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and not name.endswith((SCALE_ENDING, CORRECTION_ENDING))


class ControlledEngine(Protocol):
    """The part of an engine that a sender drives; every method raises where the engine refuses."""

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        *,
        load_format: str | None = None,
        delta: str | None = None,
        flush_cache: bool = True,
        weight_version: str | None = None,
        base_version: str | None = None,
    ) -> None: ...

    def destroy_weights_update_group(self, group_name: str) -> None: ...

    def get_server_info(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SendReport:
    """What an update took."""

    num_tensors: int
    num_bytes: int
    seconds: float


class WeightSender:
    """Holds the group with the engines. Use as a context, or call `connect` and `close`.

    Args:
        engines: each with its number of ranks, in the order of their ranks in the group.
        address: of this host, as the engines reach it.
        device: where tensors travel from: a GPU that no rank of the engines is on, for NCCL; by way of the host if None.
        dtype: what floating-point tensors are cast to before they travel; None: as they are. FP8 and its scales are not,
            nor the corrections of routers.
        bucket_bytes: how much travels in one broadcast, and is held twice meanwhile.
    """

    def __init__(
        self,
        engines: Sequence[tuple[ControlledEngine, int]],
        *,
        address: str = "127.0.0.1",
        backend: str = DEFAULT_BACKEND,
        device: torch.device | None = None,
        group_name: str = DEFAULT_GROUP,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        timeout_s: float = 300.0,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes}: must be at least 1")
        self._engines = engines
        self._address = address
        self._device = device or torch.device("cpu")
        # Engines are told: they may be on other devices.
        self._backend = resolve_backend(backend, self._device)
        self._group_name = group_name
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._group: UpdateGroup | None = None

    def connect(self) -> None:
        """Form the group with all engines.

        Raises:
            ValueError: an engine has another number of ranks.
            RuntimeError: it did not come together in time, or an engine refused.
        """
        for number, (engine, num_ranks) in enumerate(self._engines):
            info = engine.get_server_info()
            if info["tp_size"] * info["dp_size"] != num_ranks:
                raise ValueError(
                    f"engines[{number}]: it has {info['dp_size']} x {info['tp_size']} ranks (dp x tp), not {num_ranks}"
                )
        port = free_port(self._address)
        world_size = 1 + sum(num_ranks for _, num_ranks in self._engines)
        offset = 1
        joining = []
        for engine, num_ranks in self._engines:
            joining.append(
                start_call(
                    engine.init_weights_update_group,
                    self._address,
                    port,
                    offset,
                    world_size,
                    self._group_name,
                    self._backend,
                )
            )
            offset += num_ranks
        own = start_call(
            UpdateGroup,
            self._address,
            port,
            SOURCE,
            world_size,
            self._group_name,
            self._backend,
            self._device,
            self._timeout_s,
        )
        self._settle(own, joining)
        self._group = own.result()

    def send(
        self, tensors: Iterable[NamedTensor], *, weight_version: str | None = None, flush_cache: bool = True
    ) -> SendReport:
        """One update. The engine generates again when every tensor of its model has come.

        Raises:
            RuntimeError: an engine refused a bucket, or the transfer broke off; the group is left then, and `connect`
                forms it again.
        """
        began = time.perf_counter()
        num_tensors = num_bytes = 0
        for bucket in self._buckets(tensors):
            if self._device.type == "cuda":
                # The thread that sends has another stream than the caller, on whose the tensors were made.
                torch.cuda.current_stream(self._device).synchronize()
            self._send_bucket(bucket, weight_version, flush_cache)
            num_tensors += len(bucket)
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        return SendReport(num_tensors, num_bytes, time.perf_counter() - began)

    def _buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
        bucket: list[NamedTensor] = []
        size = 0
        for name, tensor in tensors:
            whole = tensor.detach().to(device=self._device, dtype=self._dtype if may_be_cast(name, tensor) else None)
            if bucket and size + whole.nbytes > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, whole))
            size += whole.nbytes
        if bucket:
            yield bucket

    def _send_bucket(self, bucket: list[NamedTensor], weight_version: str | None, flush_cache: bool) -> None:
        specs = [
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in bucket
        ]
        self._broadcast(
            specs,
            [tensor for _, tensor in bucket],
            load_format="flattened_bucket",
            flush_cache=flush_cache,
            weight_version=weight_version,
        )

    def send_delta(
        self, buckets: Iterable[DeltaBucket], *, base_version: str, weight_version: str, flush_cache: bool = True
    ) -> SendReport:
        """One update by what has changed since `base_version`; see `DeltaSender`.

        Raises:
            RuntimeError: as `send`. An engine whose weights are others refuses before it changes anything.
        """
        began = time.perf_counter()
        num_tensors = num_bytes = 0
        for bucket in buckets:
            payload = bucket.payload.to(self._device)
            self._broadcast(
                [part.spec for part in bucket.manifest.parts],
                [payload] if len(payload) else [],
                load_format="delta",
                delta=bucket.manifest.encode(),
                flush_cache=flush_cache,
                weight_version=weight_version,
                base_version=base_version,
            )
            num_tensors += len(bucket.manifest.parts)
            num_bytes += len(payload)
        return SendReport(num_tensors, num_bytes, time.perf_counter() - began)

    def _broadcast(self, specs: Sequence[TensorSpec], data: list[torch.Tensor], **options: Any) -> None:
        """Tell the engines what comes, and send it in one; nothing, if it is nothing."""
        if self._group is None:
            raise RuntimeError("the sender is in no group: call connect first, also after a failure")
        calls = [
            start_call(
                engine.update_weights_from_distributed,
                [spec.name for spec in specs],
                [spec.dtype for spec in specs],
                [list(spec.shape) for spec in specs],
                self._group_name,
                **options,
            )
            for engine, _ in self._engines
        ]
        send: Callable[..., None] = self._group.send_bucket if data else no_broadcast
        self._settle(start_call(send, data), calls)

    def _settle(self, own: Future, answers: Sequence[Future]) -> None:
        """Wait for our own end and all engines'. When one fails the others would wait in vain: everybody leaves.

        Raises:
            RuntimeError: what the engines said, or, where none said anything, what broke off here.
        """
        concurrent.futures.wait([own, *answers], return_when=concurrent.futures.FIRST_EXCEPTION)
        if not any(future.done() and future.exception() for future in (own, *answers)):
            return
        # First what the engine that broke it off has to say, then the others, which our leaving sets free.
        concurrent.futures.wait(answers, ANSWER_TIMEOUT_S, return_when=concurrent.futures.FIRST_EXCEPTION)
        self._close_group()
        concurrent.futures.wait(answers, ANSWER_TIMEOUT_S)
        said = [
            f"engines[{number}]: {future.exception()}" if len(answers) > 1 else str(future.exception())
            for number, future in enumerate(answers)
            if future.done() and future.exception()
        ]
        self._leave_engines()
        raise RuntimeError(f"weights were not sent: {'; '.join(said) or own.exception()}")

    def _leave_engines(self) -> None:
        """One that is not in the group refuses, and one that is gone cannot be reached: either is what is wanted."""
        for engine, _ in self._engines:
            with suppress(Exception):
                engine.destroy_weights_update_group(self._group_name)

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def __enter__(self) -> WeightSender:
        self.connect()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group, and let the engines leave it."""
        try:
            if self._group is not None:
                for engine, _ in self._engines:
                    engine.destroy_weights_update_group(self._group_name)
        finally:
            self._close_group()


def no_broadcast(data: Sequence[torch.Tensor]) -> None:
    """Of nothing."""


def start_call(function: Callable[..., Any], *args: Any, **options: Any) -> Future:
    """In a thread of its own. One that never returns - NCCL may wait for who will not come - holds up nothing: neither the
    next call nor, as a pool's threads would, the end of the process."""
    future: Future = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:
            # Not swallowed: it is raised where the result is taken.
            future.set_exception(error)

    threading.Thread(target=call, name="weight sender", daemon=True).start()
    return future


def gathered_tensors(model: nn.Module, gather: Gather | None = None) -> Iterator[NamedTensor]:
    """Every parameter of a model by its name, whole for as long as it is the current one. Tied ones come once. What a
    checkpoint has beside them comes last: a router's correction of its scores is a buffer, which every rank has whole.

    With a gather that is a collective, every rank of the trainer must iterate to the end; who does not send discards.
    """
    for name, parameter in model.named_parameters():
        with nullcontext() if gather is None else gather(parameter):
            yield name, parameter.detach()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer.detach()


def free_port(address: str) -> int:
    """A port that nobody listens on at the moment."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])
