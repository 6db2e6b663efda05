"""What is used of NIXL: an agent of this process that registers memory, and reads that of other agents over UCX.

NIXL is no dependency: its wheel comes with the extra `nixl`, and is imported when it is chosen.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

BACKEND = "UCX"
# A thread of the agent waits for events of the sockets; it looks at them by itself so often. At 0 it would never sleep.
PROGRESS_US = 10_000
# Devices that UCX listens on, unless the environment names others: like all sockets, on loopback alone.
DEVICES_VARIABLE = "UCX_NET_DEVICES"
LOOPBACK = "lo"
INSTALL_HINT = "it is installed by the extra `nixl`: pip install 'waybill[nixl]'"


class NixlError(RuntimeError):
    """NIXL is not there, or refuses."""


class Read(Protocol):
    """One on its way."""

    def is_done(self) -> bool:
        """
        Raises:
            NixlError: it has failed, and is over.
        """
        ...

    def close(self) -> None:
        """Once it is over: an agent does not survive the end of a read that still goes on."""
        ...


class Registration(Protocol):
    def close(self) -> None: ...


class Agent(Protocol):
    """Errors are `NixlError`."""

    @property
    def name(self) -> str: ...

    def register(self, memory: torch.Tensor) -> Registration:
        """uint8 [bytes], which stays where it is until the registration is closed."""
        ...

    def metadata(self) -> bytes:
        """What another agent needs to read what is registered."""
        ...

    def add(self, metadata: bytes) -> str:
        """Know another agent, by the name that it has."""
        ...

    def remove(self, remote: str) -> None: ...

    def read(self, remote: str, memory: torch.Tensor, ours: np.ndarray, theirs: np.ndarray, device: int | None) -> Read:
        """Begin to read: rows of address and bytes, int64 [n, 2] each, `ours` in a memory that is registered, `theirs` in
        that of `remote` on its `device`; None: on its host."""
        ...

    def close(self) -> None:
        """Nobody reads what is registered any more when this returns."""
        ...


def import_nixl() -> Any:
    """
    Raises:
        NixlError: there is none.
    """
    os.environ.setdefault(DEVICES_VARIABLE, LOOPBACK)
    try:
        import nixl  # noqa: PLC0415
    except ImportError as error:
        raise NixlError(f"--disaggregation-transport nixl needs NIXL ({error}); {INSTALL_HINT}") from error
    return nixl


class NixlAgent:
    """Of one device, or of the host. One thread at a time calls it."""

    def __init__(self, device: torch.device) -> None:
        self._nixl = import_nixl()
        self._device = device
        self._errors = tuple(
            each for each in vars(self._nixl).values() if isinstance(each, type) and issubclass(each, Exception)
        )
        self._name = f"waybill-{secrets.token_hex(8)}"
        # Not by `nixl_agent`, whose thread never sleeps.
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay = PROGRESS_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        with self._ready():
            self._agent: Any = self._nixl.nixlAgent(self._name, config)
            self._backends = [self._agent.createBackend(BACKEND, {})]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        try:
            if self._device.type == "cpu":
                yield
            else:
                with torch.cuda.device(self._device):
                    # torch makes the device's context when it is first used, and a thread takes it.
                    torch.cuda.synchronize(self._device)
                    yield
        except self._errors as error:
            raise NixlError(f"NIXL: {error}") from error

    @property
    def name(self) -> str:
        return self._name

    def register(self, memory: torch.Tensor) -> Registration:
        place = (memory.data_ptr(), memory.nbytes, device_number(memory) or 0, "")
        with self._ready():
            regions = self._nixl.nixlRegDList(self._segment(device_number(memory)), [place])
            self._agent.registerMem(regions, self._backends)
        return _Registration(self, regions)

    def deregister(self, regions: Any) -> None:
        with self._ready():
            self._agent.deregisterMem(regions, self._backends)

    def metadata(self) -> bytes:
        with self._ready():
            return bytes(self._agent.getLocalMD())

    def add(self, metadata: bytes) -> str:
        with self._ready():
            name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode(errors="replace")

    def remove(self, remote: str) -> None:
        with self._ready():
            self._agent.invalidateRemoteMD(remote)

    def read(self, remote: str, memory: torch.Tensor, ours: np.ndarray, theirs: np.ndarray, device: int | None) -> Read:
        lists = [self._ranges(ours, device_number(memory)), self._ranges(theirs, device)]
        with self._ready():
            handle = self._agent.createXferReq(self._nixl.NIXL_READ, *lists, remote, b"", self._backends)
        read = _Read(self, handle)
        read.begin()
        return read

    def _ranges(self, ranges: np.ndarray, device: int | None) -> Any:
        rows = np.full((len(ranges), 3), device or 0, dtype=np.uint64)
        rows[:, :2] = ranges
        return self._nixl.nixlXferDList(self._segment(device), rows)

    def _segment(self, device: int | None) -> Any:
        return self._nixl.DRAM_SEG if device is None else self._nixl.VRAM_SEG

    def post(self, handle: int) -> bool:
        with self._ready():
            return bool(self._agent.postXferReq(handle, b"") == self._nixl.NIXL_SUCCESS)

    def is_done(self, handle: int) -> bool:
        with self._ready():
            return bool(self._agent.getXferStatus(handle) == self._nixl.NIXL_SUCCESS)

    def free(self, handle: int) -> None:
        with self._ready():
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Its connections and its thread end with the last reference."""
        with self._ready():
            self._agent = None


class _Registration:
    def __init__(self, agent: NixlAgent, regions: Any) -> None:
        self._agent = agent
        self._regions = regions

    def close(self) -> None:
        self._agent.deregister(self._regions)


class _Read:
    def __init__(self, agent: NixlAgent, handle: int) -> None:
        self._agent = agent
        self._handle: int | None = handle
        self._is_done = False

    def begin(self) -> None:
        assert self._handle is not None
        try:
            self._is_done = self._agent.post(self._handle)
        except NixlError:
            self.close()
            raise

    def is_done(self) -> bool:
        if not self._is_done and self._handle is not None:
            self._is_done = self._agent.is_done(self._handle)
        return self._is_done

    def close(self) -> None:
        """Once: a handle that is freed twice is another read's."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._agent.free(handle)


def device_number(memory: torch.Tensor) -> int | None:
    """Of a CUDA device; None on the host."""
    return None if memory.device.type == "cpu" else memory.device.index
