"""Two engines, one for prompts and one for what follows, asked as a router asks them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from waybill import Engine
from waybill.launch.node_options import RUN_SECRET_VARIABLE

HOST = "127.0.0.1"


def start_seeing(patch: pytest.MonkeyPatch, devices: str, start: Callable[[], Engine]) -> Engine:
    patch.setenv("CUDA_VISIBLE_DEVICES", devices)
    return start()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


class EnginePair:
    """`prefill` and `decode`, with options of their own beside those of both. On CUDA the prefill has the first device and
    the decode the second."""

    def __init__(
        self,
        model: str,
        prefill: dict[str, Any],
        decode: dict[str, Any],
        secret: str = "a secret of both engines",
        **options: Any,
    ) -> None:
        self.port = free_port()
        self._rooms = itertools.count(1)
        self._threads = ThreadPoolExecutor(16)
        starts = [
            (partial(Engine, model, disaggregation=side, **{**options, **own}), devices)
            for side, own, devices in (
                ("prefill", {**prefill, "disaggregation_bootstrap_port": self.port}, "0,1"),
                ("decode", decode, "1,0"),
            )
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(RUN_SECRET_VARIABLE, secret)
            if options.get("device") == "cuda":
                # Each sees both: a driver maps memory of a device that the process sees alone. One after the other, as
                # the environment is that of this process.
                self.prefill, self.decode = (start_seeing(patch, devices, start) for start, devices in starts)
            else:
                both = [self._threads.submit(start) for start, _ in starts]
                self.prefill, self.decode = (each.result() for each in both)

    def place(self) -> dict[str, Any]:
        """The fields that a router adds."""
        return {"bootstrap_host": HOST, "bootstrap_port": self.port, "bootstrap_room": next(self._rooms)}

    def generate(self, **fields: Any) -> Any:
        """The answer of the decode's side."""
        fields |= self.place()
        prompt = self._threads.submit(self.prefill.generate, **fields)
        answer = self.decode.generate(**fields)
        prompt.result()
        return answer

    def stream(self, **fields: Any) -> list[Any]:
        fields |= self.place()
        prompt = self._threads.submit(lambda: list(self.prefill.generate(**fields, stream=True)))
        chunks = list(self.decode.generate(**fields, stream=True))
        prompt.result()
        return chunks

    def all(self, requests: list[dict[str, Any]]) -> list[Any]:
        """The answers of the decode's side to requests that come at once."""
        return [each.result() for each in [self._threads.submit(self.generate, **one) for one in requests]]

    def submit(self, engine: Engine, **fields: Any) -> Any:
        """To one side alone: a future."""
        return self._threads.submit(engine.generate, **fields)

    def shutdown(self) -> None:
        self.prefill.shutdown()
        self.decode.shutdown()
        self._threads.shutdown()
