"""What is asked of the server, and how its answer is read and verified: plain functions over requests and responses.

Legend: R rows (tokens as inputs), M MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec
import numpy as np

from ..engine.io_struct import RoutedExpertsMeta
from ..engine.routing import wire

Delivery = Literal["inline", "reference"]
# Absolute position, or where the session already has the rows.
StartLen = int | Literal["auto"]
T = TypeVar("T")

META_HEADER = "X-Routed-Experts-Meta"
MESSAGE_CHARS = 500


class RoutesError(ValueError):
    """The answer does not hold the routes that were asked for, or is no valid answer at all."""


class ServerError(RuntimeError):
    """The server refused. `retry_after_s` is set where it said when to come again (503)."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(status, message, retry_after_s)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.message}"


@dataclass(frozen=True, eq=False)
class Generation:
    """One answer. `routes` [R, M, K], read-only, are the rows of the positions from `meta.start` on; both are None where
    they were not asked for. `weights` [R, M, K], float32, are the combine weights of those rows, None without
    `return_router_weights`. `raw` is the whole `meta_info`."""

    text: str
    output_ids: list[int]
    finish_reason: dict[str, Any]
    prompt_tokens: int
    cached_tokens: int
    routes: np.ndarray | None
    meta: RoutedExpertsMeta | None
    raw: dict[str, Any]
    weights: np.ndarray | None = None


class _Prefix(msgspec.Struct, frozen=True):
    """Rows of the prompt that an earlier choice's answer has."""

    choice: int
    start: int
    end: int


class _MetaInfo(msgspec.Struct, frozen=True):
    finish_reason: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    routed_experts: str | None = None
    routed_experts_meta: RoutedExpertsMeta | None = None
    routed_experts_claim: str | None = None
    routed_experts_error: str | None = None
    routed_experts_prefix: _Prefix | None = None
    router_weights: str | None = None
    router_weights_meta: RoutedExpertsMeta | None = None


class _Answer(msgspec.Struct, frozen=True):
    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]


def http_options(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Options of either httpx client."""
    # The server queues: a limit here would only hide requests from its scheduler.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # As bytes, because httpx takes text for ASCII.
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}".encode()}
    return {"base_url": base_url, "headers": headers, "timeout": timeout_s, "limits": limits}


def build_request(
    input_ids: Sequence[int] | None,
    text: str | None,
    sampling_params: Mapping[str, Any] | None,
    routed_experts: bool,
    start_len: StartLen,
    delivery: Delivery,
    fields: Mapping[str, Any],
    n: int = 1,
) -> dict[str, Any]:
    """The body of `/generate` for one prompt and `n` samples.

    Raises:
        ValueError: there is not exactly one prompt, or a field is set by the client.
    """
    if (input_ids is None) == (text is None) or isinstance(input_ids, str):
        raise ValueError("input_ids, text: give exactly one of them, text by its name")
    params = dict(sampling_params or {})
    if params.get("n", 1) != 1:
        raise ValueError(f"n={params['n']}: a call returns one answer, must be 1 or absent")
    if n > 1:
        params["n"] = n
    own: dict[str, Any] = {
        "sampling_params": params,
        "stream": False,
        "return_routed_experts": routed_experts,
        "routed_experts_start_len": start_len,
        "routed_experts_format": "compact",
        "routed_experts_delivery": delivery,
    }
    if taken := own.keys() & fields.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: set by the client, must be absent")
    # Ids of numpy as well; anything that is no integer raises.
    prompt = {"text": text} if input_ids is None else {"input_ids": [operator.index(token) for token in input_ids]}
    return {**fields, **prompt, **own}


def check_status(response: httpx.Response) -> None:
    """
    Raises:
        ServerError: the status is not 2xx.
    """
    if response.is_success:
        return
    try:
        message = str(msgspec.json.decode(response.content, type=dict[str, Any])["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        # Not by the server itself, but by something before it.
        message = response.text[:MESSAGE_CHARS] or response.reason_phrase
    retry_after = response.headers.get("Retry-After", "")
    raise ServerError(response.status_code, message, float(retry_after) if retry_after.isdecimal() else None)


def parse(what: str, data: Any, kind: type[T]) -> T:
    """Convert JSON, as bytes or decoded.

    Raises:
        RoutesError: it does not have the form of `kind`.
    """
    try:
        return msgspec.json.decode(data, type=kind) if isinstance(data, bytes) else msgspec.convert(data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RoutesError(f"{what} has not the form expected: {error}") from None


def read_answer(request: dict[str, Any], response: httpx.Response) -> tuple[_Answer, _MetaInfo, str | None]:
    """The answer, its `meta_info`, and where its rows are to be fetched if they come by reference.

    Raises:
        ServerError: the server refused.
        RoutesError: the answer lacks a key or has another form.
    """
    check_status(response)
    answer = parse("the answer", response.content, _Answer)
    info = parse("meta_info", answer.meta_info, _MetaInfo)
    if not request["return_routed_experts"] or request["routed_experts_delivery"] != "reference":
        return answer, info, None
    claim = _present(info, "routed_experts_claim", info.routed_experts_claim)
    return answer, info, f"/routed_experts/{quote(claim, safe='')}"


def read_choices(request: dict[str, Any], response: httpx.Response, n: int) -> list[Generation]:
    """The choices of one prompt whose rows came with them.

    Raises:
        ServerError: the server refused.
        RoutesError: as `make_generation`, or a choice refers to rows that the first does not have.
    """
    if n == 1:
        answer, info, _ = read_answer(request, response)
        return [make_generation(request, answer, info, None)]
    check_status(response)
    answers = parse("the answers", response.content, list[_Answer])
    if len(answers) != n:
        raise RoutesError(f"expected {n} answers, {len(answers)} came")
    generations: list[Generation] = []
    for answer in answers:
        info = parse("meta_info", answer.meta_info, _MetaInfo)
        generation = make_generation(request, answer, info, None)
        prefix, meta = info.routed_experts_prefix, generation.meta
        first = generations[0].meta if generations else None
        if prefix is not None and (
            first is None or prefix.choice != 0 or prefix.start != first.start or first.start + first.rows < prefix.end
        ):
            raise RoutesError(f"routed experts: a choice refers to rows of another, which are not there: {prefix}")
        if first is not None and meta is not None and meta.start > (first.start if prefix is None else prefix.end):
            raise RoutesError(
                f"routed experts: the rows of a choice begin at {meta.start}, nothing says who has the others"
            )
        generations.append(generation)
    return generations


def make_generation(
    request: dict[str, Any], answer: _Answer, info: _MetaInfo, fetched: httpx.Response | None
) -> Generation:
    """Put the answer together with its rows, taken from it or from the response to its claim.

    Raises:
        ServerError: the claim was refused; 410: it has expired.
        RoutesError: the rows are missing, or not those that were asked for.
    """
    routes = meta = weights = None
    if request["return_routed_experts"]:
        meta = _present(info, "routed_experts_meta", info.routed_experts_meta)
        frame = (
            _inline_frame(info, "routed_experts", info.routed_experts)
            if fetched is None
            else _fetched_frame(fetched, meta)
        )
        routes = verify(meta, frame, request["routed_experts_start_len"], info)
        if request.get("return_router_weights"):
            weights = _weights(info, meta)
    return Generation(
        text=answer.text,
        output_ids=answer.output_ids,
        finish_reason=info.finish_reason,
        prompt_tokens=info.prompt_tokens,
        cached_tokens=info.cached_tokens,
        routes=routes,
        meta=meta,
        raw=answer.meta_info,
        weights=weights,
    )


def verify(meta: RoutedExpertsMeta, frame: bytes, start_len: StartLen, info: _MetaInfo) -> np.ndarray:
    """The rows [R, M, K] of a frame: intact, from `start_len` on, up to the last token that was an input. That is the last
    but one, as the last was sampled; of a prompt without an answer (`max_new_tokens` 0) it is the last.

    With "auto" the server states where they begin. An aborted request may have fewer rows. Where there are none, the server
    states the position at which they end.

    Raises:
        RoutesError: a size, type, checksum or position differs from what was expected.
    """
    try:
        rows = wire.decode(meta, frame).rows
    except ValueError as error:
        raise RoutesError(str(error)) from None
    start_len = meta.start if start_len == "auto" else start_len
    if meta.start != start_len and not (meta.rows == 0 and meta.start < start_len):
        raise RoutesError(f"routed experts: expected rows from position {start_len} on, they start at {meta.start}")
    aborted = info.finish_reason.get("type") == "abort"
    sampled = aborted or info.completion_tokens > 0
    expected, end = info.prompt_tokens + info.completion_tokens - sampled, meta.start + meta.rows
    if end > expected or (end < expected and not aborted):
        raise RoutesError(
            f"routed experts: expected rows [{start_len}, {expected}), [{meta.start}, {end}) arrived "
            f"(finish reason {info.finish_reason})"
        )
    return rows


def _present(info: _MetaInfo, name: str, value: T | None) -> T:
    if info.routed_experts_error is not None:
        raise RoutesError(f"the server has no routes for this answer: {info.routed_experts_error}")
    if value is None:
        raise RoutesError(f"expected {name} in meta_info, it is absent or null (finish reason {info.finish_reason})")
    return value


def _inline_frame(info: _MetaInfo, name: str, encoded: str | None) -> bytes:
    text = _present(info, name, encoded)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RoutesError(f"{name}: expected base64: {error}") from None


def _weights(info: _MetaInfo, of: RoutedExpertsMeta) -> np.ndarray:
    """The combine weights [R, M, K] of the rows with the envelope `of`, verified, as float32."""
    meta = _present(info, "router_weights_meta", info.router_weights_meta)
    frame = _inline_frame(info, "router_weights", info.router_weights)
    try:
        return wire.decode_weights(meta, frame, of).as_float32()
    except ValueError as error:
        raise RoutesError(str(error)) from None


def _fetched_frame(response: httpx.Response, stated: RoutedExpertsMeta) -> bytes:
    check_status(response)
    if META_HEADER not in response.headers:
        raise RoutesError(f"expected the header {META_HEADER} beside the rows, it is absent")
    meta = parse(META_HEADER, response.headers[META_HEADER].encode(), RoutedExpertsMeta)
    # A header has no room for the names of many weights.
    if meta != stated and meta != msgspec.structs.replace(stated, weight_versions=[]):
        raise RoutesError(f"routed experts: the answer states {stated}, its claim {meta}")
    return response.content
