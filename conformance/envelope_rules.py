"""Rules about the compact form with its envelope, and about weight versions."""

from __future__ import annotations

import msgspec
import numpy as np

from ..engine.io_struct import RoutedExpertsMeta
from ..engine.routing import wire
from .answer import Answer
from .findings import NotApplicable, RuleBroken, require, require_comparable, require_same_rows
from .rule import Rule
from .server import Refused, Server

NUM_PROMPT, NEW, START = 20, 5, 3


def check_compact(server: Server) -> str:
    prompt = server.warm_prompt(NUM_PROMPT, NEW)
    wide = server.ask(prompt, NEW, START)
    narrow = ask_compact(server, prompt, START)
    require_comparable(wide, narrow)
    envelope, rows = decode_compact(narrow)
    require(envelope.start == START, f"the envelope's start is {envelope.start}, expected {START}")
    num_layers, remainder = divmod(server.shape.width, envelope.top_k)
    require(
        remainder == 0 and max(envelope.layer_ids) < num_layers, f"layers {envelope.layer_ids} are not those of int32"
    )
    by_layer = wide.rows().reshape(-1, num_layers, envelope.top_k)
    expected = by_layer[:, envelope.layer_ids].reshape(len(by_layer), -1)
    require_same_rows("compact and int32", rows.reshape(len(rows), -1), expected, START)
    return f"{envelope.dtype} [{', '.join(map(str, rows.shape))}]"


def check_versions(server: Server) -> str:
    expected = current_version(server)
    answer = server.ask(server.fresh_prompt(NUM_PROMPT), NEW)
    found = answer.meta.get("weight_version")
    require(found == expected, f"meta_info.weight_version is {found!r}, the server says {expected!r}")
    return repr(expected)


def current_version(server: Server) -> str:
    """
    Raises:
        NotApplicable: the server does not say it.
    """
    for path in ("/get_weight_version", "/model_info", "/get_model_info"):
        response = server.get(path)
        if response.is_success and "weight_version" in (content := response.json()):
            return str(content["weight_version"])
    raise NotApplicable("neither /get_weight_version nor /model_info says a weight_version")


def check_version_runs(server: Server) -> str:
    prompt = server.fresh_prompt(NUM_PROMPT)
    for start in (0, START):
        answer = ask_compact(server, prompt, start)
        envelope, rows = decode_compact(answer)
        runs, end = envelope.weight_versions, envelope.start + len(rows)
        bounds = [envelope.start, *(run[2] for run in runs)]
        starts_meet = [run[1] for run in runs] == bounds[:-1]
        require(starts_meet and bounds[-1] == end, f"runs {runs} do not cover the positions {envelope.start} to {end}")
        require(all(first < last for _, first, last in runs), f"a run of {runs} is empty")
        last = answer.meta.get("weight_version")
        require(runs[-1][0] == last, f"the last row has version {runs[-1][0]!r}, the answer {last!r}")
    return f"starts 0 and {START}"


def ask_compact(server: Server, prompt: list[int], start: int) -> Answer:
    """
    Raises:
        NotApplicable: the server has no compact form.
    """
    try:
        answer = server.ask(prompt, NEW, start, routed_experts_format="compact")
    except Refused as refusal:
        raise NotApplicable(f"routed_experts_format is refused: {refusal}") from None
    if "routed_experts_meta" not in answer.meta:
        raise NotApplicable("routed_experts_format is ignored: the answer has no routed_experts_meta")
    return answer


def decode_compact(answer: Answer) -> tuple[RoutedExpertsMeta, np.ndarray]:
    """The envelope, and the rows [R, layers with experts, top_k], which are as it says."""
    try:
        envelope = msgspec.convert(answer.meta["routed_experts_meta"], RoutedExpertsMeta)
        return envelope, wire.decode(envelope, answer.raw_bytes()).rows
    except ValueError as error:
        raise RuleBroken(f"routed_experts_meta: {error}") from None


ENVELOPE_RULES = (
    Rule(
        "compact",
        "The compact form has the same ids in the layers with experts, beside an envelope that fits.",
        check_compact,
        is_extension=True,
    ),
    Rule("versions", "An answer has the weight_version that the server says.", check_versions),
    Rule(
        "version-runs",
        "weight_versions of the envelope are runs that cover every row.",
        check_version_runs,
        is_extension=True,
    ),
)
