"""What tests of weight updates share: a trainer's end, answers to compare, and streams that are recorded."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import numpy as np
import torch

from waybill import Engine
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.sender import free_port
from waybill.engine.weight_sync.update_group import UpdateGroup

HERE = "127.0.0.1"
GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 60}
TIMEOUT_S = 8.0
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_return_routed_experts": True,
    "kv_cache_tokens": 400,
    "weight_sync_timeout_s": TIMEOUT_S,
}
PROMPTS = [list(text.encode()) for text in ("start with 12", "a longer prompt, add 30", "x")]

Tensors = dict[str, torch.Tensor]


def sums(tensors: Tensors) -> dict[str, str]:
    return {name: checksum(tensor.float()) for name, tensor in tensors.items() if name != "lm_head.weight"}


def answers(engine: Engine) -> str:
    """Tokens and rows of some prompts, from an empty cache."""
    engine.flush_cache()
    found = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, return_routed_experts=True)
    return json.dumps([(a["output_ids"], a["meta_info"]["routed_experts"].tolist()) for a in found])


def runs(answer: dict[str, Any]) -> list[list[Any]]:
    return [list(run) for run in answer["meta_info"]["routed_experts_meta"]["weight_versions"]]


def rows(answer: dict[str, Any]) -> np.ndarray:
    return answer["meta_info"]["routed_experts"]


def request_of(
    names: list[str], tensors: Tensors, dtype: str = "float32"
) -> tuple[list[str], list[str], list[list[int]]]:
    return names, [dtype] * len(names), [list(tensors[name].shape) for name in names]


class LocalTrainer:
    """The trainer's end of an update group, in this process."""

    def __init__(self, engine: Engine, name: str, num_ranks: int = 2) -> None:
        port = free_port(HERE)
        cpu = torch.device("cpu")
        self.name = name
        self._engine = engine
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            own = pool.submit(UpdateGroup, HERE, port, 0, 1 + num_ranks, name, "gloo", cpu, TIMEOUT_S)
            engine.init_weights_update_group(HERE, port, 1, 1 + num_ranks, name)
            self.group = own.result()

    def send(self, names: list[str], tensors: Tensors, num_sent: int | None = None, **options: Any) -> None:
        """Announce all, broadcast the first `num_sent` of them, then be gone if that is not all."""

        def broadcast() -> None:
            for name in names[:num_sent]:
                self.group.broadcast(tensors[name].float())
            if num_sent is not None:
                self.group.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sending = pool.submit(broadcast)
            self._engine.update_weights_from_distributed(*request_of(names, tensors), self.name, **options)
            sending.result()

    def close(self) -> None:
        self._engine.destroy_weights_update_group(self.name)
        self.group.close()


def assert_serves(engine: Engine, tensors: Tensors, answer: str | None = None) -> None:
    assert engine.get_server_info()["blocked"] == ""
    assert engine.checksum_weights() == sums(tensors)
    if answer is not None:
        assert answers(engine) == answer


class Recording:
    """A stream whose rows are kept as they were made, each with the version of its chunk."""

    def __init__(self, engine: Engine, prompt: list[int], num_tokens: int, pause_at: int) -> None:
        params = {**GREEDY, "max_new_tokens": num_tokens}
        self._stream = engine.generate(
            input_ids=prompt,
            sampling_params=params,
            stream=True,
            return_routed_experts=True,
            stream_routed_experts=True,
        )
        self.chunks: list[dict[str, Any]] = []
        self.prompt = prompt
        while len(self.chunks) < pause_at:
            self.chunks.append(next(self._stream))

    def finish(self) -> None:
        self.chunks += list(self._stream)

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([rows(chunk) for chunk in self.chunks])

    @property
    def versions(self) -> list[str]:
        """By position, as the chunks said when they came."""
        found: list[str] = []
        for chunk in self.chunks:
            for version, start, end in runs(chunk):
                assert start == len(found)
                found += [version] * (end - start)
        return found

    @property
    def output_ids(self) -> list[int]:
        return self.chunks[-1]["output_ids"]


def as_runs(versions: list[str]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for position, version in enumerate(versions):
        if found and found[-1][0] == version:
            found[-1][2] = position + 1
        else:
            found.append([version, position, position + 1])
    return found
