"""Rules about the rows of one answer: who has them, how many, and which ids."""

from __future__ import annotations

import numpy as np

from .findings import NotApplicable, RuleBroken, require, require_same_rows
from .rule import Rule
from .server import Server

# Tokens of a prompt, and of its answer.
LENGTHS = ((1, 1), (7, 1), (12, 2), (40, 7))


def check_not_asked(server: Server) -> str:
    prompt = server.fresh_prompt(9)
    for asked in (False, None):
        answer = server.ask(prompt, 3, None, return_routed_experts=asked)
        require(not answer.has_rows, f"return_routed_experts {asked}: the key routed_experts is there")
    return "false, and left out"


def check_row_count(server: Server) -> str:
    num_answers = 0
    for num_prompt, new in LENGTHS:
        for start in sorted({0, num_prompt // 2}):
            answer = server.ask(server.fresh_prompt(num_prompt), new, start)
            case = f"{num_prompt} prompt tokens, start {start}"
            require(
                answer.count("prompt_tokens") == num_prompt, f"{case}: prompt_tokens is {answer.meta['prompt_tokens']}"
            )
            require(
                len(answer.output_ids) == answer.count("completion_tokens"),
                f"{case}: {len(answer.output_ids)} output_ids, completion_tokens {answer.count('completion_tokens')}",
            )
            expected, found = answer.num_inputs - start, len(answer.rows())
            require(found == expected, f"{case}, {len(answer.output_ids)} new: {found} rows, expected {expected}")
            stated = answer.meta.get("routed_experts_start_len", start)
            require(stated == start, f"{case}: routed_experts_start_len of the answer is {stated}")
            num_answers += 1
    return f"{num_answers} answers"


def check_ids(server: Server) -> str:
    shape = server.shape
    if shape.top_k is None or shape.num_layers is None:
        raise NotApplicable("layers and top_k are not known: give --num-layers and --top-k")
    answer = server.ask(server.fresh_prompt(40), 8)
    rows = answer.rows().reshape(-1, shape.num_layers, shape.top_k)
    is_dense = [not rows[:, layer].any() for layer in range(shape.num_layers)]
    if shape.layer_ids is not None:
        expected = [layer not in shape.layer_ids for layer in range(shape.num_layers)]
        require(
            shape.top_k == 1 or is_dense == expected,
            f"layers with experts are {list(shape.layer_ids)}, those with ids {list(np.flatnonzero(~np.array(is_dense)))}",
        )
        is_dense = expected
    require(not all(is_dense), "every id is zero")
    _require_in_range(rows, shape.num_experts)
    for layer in np.flatnonzero(~np.array(is_dense)):
        ids = np.sort(rows[:, layer], axis=1)
        repeated = np.flatnonzero((ids[:, 1:] == ids[:, :-1]).any(axis=1))
        if len(repeated):
            first = repeated[0]
            raise RuleBroken(f"position {first}, layer {layer}: the ids {rows[first, layer].tolist()} are not distinct")
    return f"{len(rows)} rows, {shape.num_layers} layers, top_k {shape.top_k}, {sum(is_dense)} dense" + (
        "" if shape.num_experts else "; number of experts not known: --num-experts"
    )


def _require_in_range(rows: np.ndarray, num_experts: int | None) -> None:
    bad = (rows < 0) if num_experts is None else (rows < 0) | (rows >= num_experts)
    if bad.any():
        position, layer, slot = np.argwhere(bad)[0]
        limit = "" if num_experts is None else f", must lie in 0 .. {num_experts - 1}"
        raise RuleBroken(f"position {position}, layer {layer}: {rows[position, layer, slot]} is no expert{limit}")


def check_cache_hit(server: Server) -> str:
    prompt = server.fresh_prompt(48)
    first, second = server.ask(prompt, 4), server.ask(prompt, 4)
    num_cached = second.cached_tokens
    if not num_cached:
        raise NotApplicable("the server took nothing of a repeated prompt from a prefix cache")
    # What follows is computed again, in steps of other shapes.
    require_same_rows("from the prefix cache", second.rows()[:num_cached], first.rows()[:num_cached])
    return f"{num_cached} cached positions of {len(prompt)}"


ROW_RULES = (
    Rule("not-asked", "An answer that was not asked for routes has no key for them.", check_not_asked),
    Rule("row-count", "There are prompt_tokens + completion_tokens - 1 - start rows.", check_row_count),
    Rule("ids", "Ids are experts, distinct within a row and layer; dense layers are zero.", check_ids),
    Rule("cache-hit", "Positions from the prefix cache have the rows that they had before.", check_cache_hit),
)
