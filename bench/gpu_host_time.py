"""What a rank's host does for a decode step: on a leader all but its wait for the device, on a peer the launch."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from waybill.engine.runner.launched_step import HostCopy


class DeviceWait:
    """Seconds that this process has waited for a step's results."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While open."""
        wait = HostCopy.wait

        def timed(copy: HostCopy) -> None:
            began = time.perf_counter()
            wait(copy)
            self.seconds += time.perf_counter() - began

        HostCopy.wait = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            HostCopy.wait = wait  # type: ignore[method-assign]


class LaunchTimes:
    """Seconds of every launch of a decode on this rank, by the number of its requests."""

    def __init__(self, runner: Any) -> None:
        self._seconds: dict[int, list[float]] = defaultdict(list)
        self._launch = runner.launch
        runner.launch = self._timed

    def _timed(self, batch: Any) -> Any:
        began = time.perf_counter()
        launched = self._launch(batch)
        if batch.is_decode:
            self._seconds[len(batch.reqs)].append(time.perf_counter() - began)
        return launched

    def medians_of_ranks(self) -> list[dict[int, float]]:
        """Of all ranks of the world, which call it together."""
        own = {batch: statistics.median(seconds) for batch, seconds in self._seconds.items()}
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        return found
