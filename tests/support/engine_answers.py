"""What a program asks an engine of the embedded model, and what it finds in the answers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from waybill import Engine

DIALOGUE = "<|user|>start with 12<|assistant|>12<|end|><|user|>add 30<|assistant|>"
NUM_LAYERS, NUM_MOE_LAYERS, TOP_K, NUM_EXPERTS = 7, 6, 4, 16
REST_S = 20.0


def ids(text: str) -> list[int]:
    """Byte tokens, for prompts without special ones."""
    return list(text.encode())


def greedy(num_tokens: int, **params: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True, **params}


# What most tests ask for.
GREEDY = greedy(6)


def ask(engine: Engine, input_ids: list[int], **fields: Any) -> dict[str, Any]:
    return engine.generate(input_ids=input_ids, sampling_params=GREEDY, return_routed_experts=True, **fields)


def rows_of(answer: dict[str, Any]) -> np.ndarray:
    return answer["meta_info"]["routed_experts"]


def at_rest(engine: Engine) -> dict[str, Any]:
    """The state once nothing runs, waits or is lent to another engine; every page is then free or cached, on every rank."""
    deadline = time.monotonic() + REST_S
    while time.monotonic() < deadline:
        state = engine.get_server_info()
        if state["num_running"] == state["num_waiting"] == state["num_transferring"] == 0:
            for rank in state["dp_ranks"]:
                assert rank["num_free_pages"] + rank["num_cached_pages"] == rank["num_pages"]
            return state
        time.sleep(0.02)
    raise AssertionError("the engine does not come to rest")
