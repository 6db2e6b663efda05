"""The mutants: at least one for each rule of the conformance kit that breaks it and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from .route_mutants import FIELD, ROUTE_KEYS, Body, Forward, Mutant, Rows, has_rows, refusal

Edit = Callable[[np.ndarray], np.ndarray]
FIRST_PAGE = 4


def on_rows(edit: Edit, only: Callable[[Body, Body], bool] = lambda body, answer: True) -> Callable[[Body, Body], None]:
    """Changes the rows of the answers that `only` picks."""

    def change(body: Body, answer: Body) -> None:
        if has_rows(answer) and only(body, answer):
            rows = Rows(body, answer)
            rows.array = edit(rows.array)
            rows.put()

    return change


def without_last(rows: np.ndarray) -> np.ndarray:
    return rows[:-1]


def rolled(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=0)


def last_layers_swapped(rows: np.ndarray) -> np.ndarray:
    rows[:, [-2, -1]] = rows[:, [-1, -2]]
    return rows


def last_padded(rows: np.ndarray) -> np.ndarray:
    rows[-1:] = 0
    return rows


def id_repeated(rows: np.ndarray) -> np.ndarray:
    rows[:, -1, 1] = rows[:, -1, 0]
    return rows


def id_out_of_range(rows: np.ndarray) -> np.ndarray:
    rows[:, -1, 0] = 200
    return rows


def finish_of(answer: Body) -> str | None:
    return (answer["meta_info"].get("finish_reason") or {}).get("type")


def is_aborted(body: Body, answer: Body) -> bool:
    return finish_of(answer) == "abort"


def is_end_of_stream(body: Body, answer: Body) -> bool:
    """Of an undisturbed one, whose rows come at its end."""
    is_whole = finish_of(answer) == "length" and not answer["meta_info"]["num_retractions"]
    return bool(body.get("stream")) and not body.get("stream_routed_experts") and is_whole


def was_retracted(body: Body, answer: Body) -> bool:
    return answer["meta_info"].get("num_retractions", 0) > 0


def is_compact(body: Body, answer: Body) -> bool:
    return body.get("routed_experts_format") == "compact"


def asks_outside(body: Body) -> bool:
    return body.get(FIELD) != "auto" and not 0 <= body.get(FIELD, 0) <= len(body["input_ids"])


def unasked_key(body: Body, answer: Body) -> None:
    if not body.get("return_routed_experts"):
        answer["meta_info"]["routed_experts"] = ""


def wrong_stated_start(body: Body, answer: Body) -> None:
    if FIELD in answer["meta_info"] and body.get(FIELD) != "auto":
        answer["meta_info"][FIELD] += 1


def key_of_queued(body: Body, answer: Body) -> None:
    if is_aborted(body, answer) and not answer["meta_info"].get("completion_tokens"):
        answer["meta_info"]["routed_experts"] = ""


def old_version(body: Body, answer: Body) -> None:
    answer["meta_info"]["weight_version"] = "old"


def short_run(body: Body, answer: Body) -> None:
    if has_rows(answer):
        for run in answer["meta_info"]["routed_experts_meta"]["weight_versions"][:1]:
            run[2] -= 1


def wrong_checksum(body: Body, answer: Body) -> None:
    if has_rows(answer) and is_compact(body, answer):
        answer["meta_info"]["routed_experts_meta"]["checksum"] = "crc32:00000000"


def start_ignored(body: Body, forward: Forward) -> httpx.Response | None:
    return None if body.get(FIELD) == "auto" or asks_outside(body) else forward({**body, FIELD: 0})


def default_is_one(body: Body, forward: Forward) -> httpx.Response | None:
    return forward({FIELD: 1, **body}) if body.get("return_routed_experts") else None


def end_refused(body: Body, forward: Forward) -> httpx.Response | None:
    return refusal(f"{FIELD} is too high") if body.get(FIELD) == len(body["input_ids"]) else None


def bounds_clamped(body: Body, forward: Forward) -> httpx.Response | None:
    return forward({**body, FIELD: min(max(body[FIELD], 0), len(body["input_ids"]))}) if asks_outside(body) else None


def streamed_bounds_clamped(body: Body, forward: Forward) -> httpx.Response | None:
    return bounds_clamped(body, forward) if body.get("stream") else None


def refused_without_a_name(body: Body, forward: Forward) -> httpx.Response | None:
    return refusal("bad request") if asks_outside(body) else None


def refused_as_a_fault(body: Body, forward: Forward) -> httpx.Response | None:
    return refusal(f"{FIELD}: index error", 500) if asks_outside(body) else None


def refused_after_prefill(body: Body, forward: Forward) -> httpx.Response | None:
    if not asks_outside(body):
        return None
    forward({**body, FIELD: 0, "stream": False}).read()
    return refusal(f"{FIELD} is out of range")


def other_server_version(path: str, content: Any) -> None:
    if "version" in path:
        content["weight_version"] = "other"


def later_choices(body: Body, answers: list[Body]) -> list[Body]:
    """Of a request that states its start."""
    return [] if body.get(FIELD) == "auto" else answers[1:]


def choices_without_rows(body: Body, answers: list[Body]) -> None:
    for answer in later_choices(body, answers):
        for name in ROUTE_KEYS:
            answer["meta_info"].pop(name, None)


def choices_of_another_prompt(body: Body, answers: list[Body]) -> None:
    for answer in later_choices(body, answers):
        on_rows(rolled)(body, answer)


def choices_lost(body: Body, answers: list[Body]) -> None:
    for answer in answers[1:]:
        on_rows(without_last)(body, answer)


class FailsAfterARefusal:
    """Bounds are refused, and the next request fails."""

    def __init__(self) -> None:
        self._refused = False

    def __call__(self, body: Body, forward: Forward) -> httpx.Response | None:
        was_refused, self._refused = self._refused, asks_outside(body)
        return refusal("internal error", 500) if was_refused and not self._refused else None


class SliceShifted:
    """A start within the prompt, behind its first page, gives rows from one before it on, as many as there should be; with
    `only_repeated` that of a prompt that comes again."""

    def __init__(self, *, only_repeated: bool = False) -> None:
        self._only_repeated = only_repeated
        self._seen: set[tuple[int, ...]] = set()
        self._applies = False

    def __call__(self, body: Body, forward: Forward) -> httpx.Response | None:
        prompt, start = tuple(body["input_ids"]), body.get(FIELD, 0)
        is_asked = not body.get("stream") and start != "auto" and FIRST_PAGE <= start < len(prompt)
        self._applies = is_asked and (prompt in self._seen or not self._only_repeated)
        self._seen.add(prompt)
        return forward({**body, FIELD: start - 1}) if self._applies else None

    def answer(self, body: Body, answer: Body) -> None:
        if has_rows(answer) and self._applies:
            rows = Rows(body, answer)
            rows.array = rows.array[:-1]
            rows.put(start=body[FIELD])


class SwappedWhenRepeated:
    """The layers of a prompt that comes again change their places."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, body: Body, answer: Body) -> None:
        prompt = tuple(body["input_ids"])
        if prompt in self._seen:
            on_rows(last_layers_swapped)(body, answer)
        if finish_of(answer) is not None:
            self._seen.add(prompt)


class GeneratedRowsForgotten:
    """When an answer comes back as a part of a prompt, its tokens have the rows of others."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[int, ...], int] = {}

    def __call__(self, body: Body, answer: Body) -> None:
        prompt = body["input_ids"]
        if has_rows(answer):
            rows = Rows(body, answer)
            for tokens, first in self._ranges.items():
                if tuple(prompt[: len(tokens)]) == tokens:
                    cut = slice(max(first - rows.start, 0), max(len(tokens) - 1 - rows.start, 0))
                    rows.array[cut] = np.roll(rows.array[cut], 1, axis=2)
            rows.put()
        if finish_of(answer) == "length" and body.get(FIELD) != "auto":
            self._ranges[tuple(prompt + answer["output_ids"])] = len(prompt)


class NotDeliveredCounted:
    """A session's rows begin one row behind those that its caller has."""

    def __call__(self, body: Body, answer: Body) -> None:
        if body.get(FIELD) == "auto" and answer["meta_info"][FIELD]:
            rows = Rows(body, answer)
            rows.array = rows.array[1:]
            rows.put(start=rows.start + 1)


def auto_never_advances(body: Body, forward: Forward) -> httpx.Response | None:
    return forward({**body, FIELD: 0}) if body.get(FIELD) == "auto" else None


def auto_stated_wrong(body: Body, answer: Body) -> None:
    if body.get(FIELD) == "auto" and answer["meta_info"].get(FIELD):
        answer["meta_info"][FIELD] -= 1


def prefix_of_answer(body: Body, answers: list[Body]) -> None:
    for answer in answers:
        if prefix := answer["meta_info"].get("routed_experts_prefix"):
            prefix["start"] += 1


class BranchesConfused:
    """The rows of a session's branch, from the third answer on, begin where its longest answer ended."""

    def __init__(self) -> None:
        self._most: dict[str, int] = {}

    def __call__(self, body: Body, forward: Forward) -> httpx.Response | None:
        if body.get(FIELD) != "auto":
            return None
        start = min(self._most.get(body["session_id"], 0), len(body["input_ids"]) - 1)
        if body["sampling_params"].get("n", 1) > 1:
            return None
        num_tokens = len(body["input_ids"]) + body["sampling_params"]["max_new_tokens"]
        self._most[body["session_id"]] = max(self._most.get(body["session_id"], 0), num_tokens - 1)
        return forward({**body, FIELD: start})


class SecondEventLost:
    """Of a stream of rows the second event has none."""

    def __init__(self) -> None:
        self._events: dict[str, int] = {}

    def __call__(self, body: Body, answer: Body) -> None:
        if body.get("stream_routed_experts"):
            rid = answer["meta_info"]["id"]
            self._events[rid] = self._events.get(rid, 0) + 1
            on_rows(lambda rows: rows[:0], lambda *_: self._events[rid] == 2)(body, answer)


def all_mutants() -> list[Mutant]:
    """New ones: some remember what they have seen."""
    shifted, shifted_again = SliceShifted(), SliceShifted(only_repeated=True)
    return [
        Mutant("unasked-key", "not-asked", answer=unasked_key),
        Mutant("stated-start", "row-count", answer=wrong_stated_start),
        Mutant(
            "last-row-lost",
            "row-count",
            ("choices", "turns", "session-auto", "stream-deltas", "abort-running", "retraction"),
            answer=on_rows(without_last),
        ),
        Mutant(
            "last-row-padded",
            "ids",
            ("turns", "session-auto", "stream-deltas", "abort-running", "retraction"),
            answer=on_rows(last_padded),
        ),
        Mutant("id-repeated", "ids", answer=on_rows(id_repeated)),
        Mutant("id-out-of-range", "ids", answer=on_rows(id_out_of_range)),
        Mutant("repeat-swapped", "cache-hit", answer=SwappedWhenRepeated()),
        Mutant("default-one", "default-start", replace=default_is_one),
        Mutant(
            "start-ignored",
            "slice",
            ("row-count", "start-at-end", "choices", "turns", "compact", "abort-running", "retraction"),
            replace=start_ignored,
        ),
        Mutant("slice-shifted", "slice", ("turns",), replace=shifted, answer=shifted.answer),
        Mutant("slice-shifted-again", "slice", replace=shifted_again, answer=shifted_again.answer),
        Mutant("end-refused", "start-at-end", replace=end_refused),
        Mutant("bounds-clamped", "bounds", replace=bounds_clamped),
        Mutant("streamed-bounds-clamped", "bounds", replace=streamed_bounds_clamped),
        Mutant("nameless-refusal", "bounds", replace=refused_without_a_name),
        Mutant("refusal-500", "bounds", replace=refused_as_a_fault),
        Mutant("refused-after-prefill", "bounds", replace=refused_after_prefill),
        Mutant("fails-after-refusal", "bounds", replace=FailsAfterARefusal()),
        Mutant("stream-shifted", "stream", answer=on_rows(rolled, is_end_of_stream)),
        Mutant("stream-short", "stream", answer=on_rows(without_last, is_end_of_stream)),
        Mutant("second-event-lost", "stream-deltas", answer=SecondEventLost()),
        Mutant("choices-without-rows", "choices", whole=choices_without_rows),
        Mutant("choices-rolled", "choices", whole=choices_of_another_prompt),
        Mutant("choices-short", "choices", ("session-auto",), whole=choices_lost),
        Mutant("generated-forgotten", "turns", answer=GeneratedRowsForgotten()),
        Mutant("auto-gap", "session-auto", answer=NotDeliveredCounted()),
        Mutant("auto-at-0", "session-auto", replace=auto_never_advances),
        Mutant("auto-stated", "session-auto", answer=auto_stated_wrong),
        Mutant("auto-branch", "session-auto", replace=BranchesConfused()),
        Mutant("auto-prefix", "session-auto", whole=prefix_of_answer),
        Mutant("compact-layers", "compact", answer=on_rows(last_layers_swapped, is_compact)),
        Mutant("compact-checksum", "compact", ("version-runs",), answer=wrong_checksum),
        Mutant("other-version", "versions", reply=other_server_version),
        Mutant("stale-version", "versions", ("version-runs",), answer=old_version),
        Mutant("short-run", "version-runs", answer=short_run),
        Mutant("abort-short", "abort-running", answer=on_rows(without_last, is_aborted)),
        Mutant("abort-rolled", "abort-running", answer=on_rows(rolled, is_aborted)),
        Mutant("queued-key", "abort-queued", answer=key_of_queued),
        Mutant("retraction-rolled", "retraction", answer=on_rows(rolled, was_retracted)),
        Mutant("retraction-short", "retraction", answer=on_rows(without_last, was_retracted)),
    ]
