"""Request bodies: from bytes to a checked model, one way for every route, at a cost that their length bounds.

FastAPI would decode and validate on the event loop, and make an error for every fault. Here a large body is read on a
thread, field by field: token ids a piece at a time, other values only when they are few enough for a decoder that holds
the interpreter's lock. The schema in `/openapi.json` is FastAPI's own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Coroutine
from functools import cache, partial
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from msgspec import UNSET, Raw, UnsetType
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..frontend.request_observer import RequestObserver
from ..frontend.work_threads import WorkThreads
from ..validation.field_error import FieldError, shown
from ..validation.json_values import count_fields, count_values
from ..validation.request_model import RequestModel, validate
from ..validation.token_ids import Prompts, parse_ids

Model = TypeVar("Model", bound=RequestModel)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

BYTE_COST_US = 0.1
# No dialect has so many fields; a body may.
MAX_FIELDS = 1_000
# A value takes two bytes at least, so shorter texts need not be counted: they are decoded within some milliseconds.
UNCOUNTED_BYTES = 64 << 10
# The status that proxies log for a client that left; nobody reads it.
CLIENT_GONE = 499

_FIELDS = msgspec.json.Decoder(dict[str, Raw])


class BodyReader:
    """Reads the bodies of all routes, and leaves their length in `http.state.body_bytes`.

    Args:
        max_values: JSON values in one field other than token ids, at most.
    """

    def __init__(self, work_threads: WorkThreads, max_values: int, observer: RequestObserver) -> None:
        self._work_threads = work_threads
        self._observer = observer
        self._max_values = max_values

    def route_class(self) -> type[APIRoute]:
        """Routes whose bodies are read here. Their endpoints take the request, a model, both or neither."""
        reader = self

        class BodyRoute(APIRoute):
            def get_route_handler(self) -> Handler:
                body = body_parameter(self.endpoint)
                return super().get_route_handler() if body is None else reader._handler(self.endpoint, *body)

        return BodyRoute

    def _handler(
        self,
        endpoint: Callable[..., Coroutine[Any, Any, Response]],
        name: str,
        model: type[RequestModel],
        optional: bool,
    ) -> Handler:
        wants_request = "http" in inspect.signature(endpoint).parameters

        async def handle(http: Request) -> Response:
            try:
                body = await self.read(http, model, optional=optional)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            return await endpoint(**{name: body}, **({"http": http} if wants_request else {}))

        return handle

    async def read(self, http: Request, model: type[Model], *, optional: bool = False) -> Model | None:
        """The body as `model`; None if there is none and it is optional.

        Raises:
            ValueError: it is no JSON object of this form.
        """
        try:
            return await self._read(http, model, optional)
        except ValueError:
            self._observer.on_refusal("refused")
            raise

    async def _read(self, http: Request, model: type[Model], optional: bool) -> Model | None:
        # Not `http.body()`, which keeps the bytes as long as the request lives.
        body = b"".join([piece async for piece in http.stream()])
        if not body and optional:
            return None
        if not body or not is_json(http.headers.get("content-type", "")):
            raise not_an_object()
        http.state.body_bytes = len(body)
        return await self._work_threads.run(BYTE_COST_US * len(body), partial(self.parse, body, model))

    def parse(self, body: bytes, model: type[Model]) -> Model:
        try:
            return self._parse(body, model)
        except NotJsonError as error:
            raise (in_words_of(body, model) if len(body) <= UNCOUNTED_BYTES else None) or error from None

    def _parse(self, body: bytes, model: type[Model]) -> Model:
        fields = {}
        for name, raw in split(body, model).items():
            if name not in model.ignored_fields:
                fields[name] = self._value(name, raw, model)
        return validate(model, fields)

    def _value(self, name: str, raw: Raw, model: type[RequestModel]) -> Any:
        text = bytes(raw)
        if name in model.id_fields and (ids := ids_in(text, name)) is not None:
            return ids
        where = shown(name)
        if len(text) > UNCOUNTED_BYTES and count_values(text, self._max_values) > self._max_values:
            raise FieldError(
                f"{where}: must have at most {self._max_values} values, also inside of lists and objects "
                "(--max-body-values)",
                where,
            )
        try:
            return msgspec.json.decode(text)
        except UnicodeDecodeError:
            raise FieldError(f"{where}: must be UTF-8", where) from None
        except msgspec.DecodeError as error:
            raise NotJsonError(f"{where}: must be JSON: {error}", where) from None
        except RecursionError:
            raise FieldError(f"{where}: is nested too deeply", where) from None


class NotJsonError(FieldError):
    """What a decoder says of a text that is no JSON."""


def in_words_of(body: bytes, model: type[RequestModel]) -> ValueError | None:
    """A better refusal of a short body that is JSON but for half surrogate pairs, NaN and infinities, which Python's
    decoder takes: by the field, where the model refuses it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    try:
        validate(model, fields)
    except ValueError as error:
        return error
    return FieldError("body: must be JSON in UTF-8, without half surrogate pairs, NaN and infinities", "body")


def split(body: bytes, model: type[RequestModel]) -> dict[str, Raw]:
    """The fields of a body, not decoded yet.

    Raises:
        FieldError: it is no JSON object.
    """
    try:
        try:
            known = msgspec.structs.asdict(head_decoder(model).decode(body))
            return {name: raw for name, raw in known.items() if raw is not UNSET}
        except msgspec.ValidationError:
            # A field that the model does not know, which null makes legal, or no object.
            if count_fields(body, MAX_FIELDS) > MAX_FIELDS:
                raise FieldError(f"body: must have at most {MAX_FIELDS} fields", "body") from None
            return _FIELDS.decode(body)
    except msgspec.ValidationError:
        raise not_an_object() from None
    except msgspec.DecodeError as error:
        raise NotJsonError(f"body: must be JSON: {error}", "body") from None
    except RecursionError:
        raise FieldError("body: is nested too deeply", "body") from None


@cache
def head_decoder(model: type[RequestModel]) -> msgspec.json.Decoder[Any]:
    """Decodes a body whose fields the model knows to its fields; stops at the first other one."""
    names = {*model.model_fields, *model.neutral_fields, *model.ignored_fields}
    fields = [(name, Raw | UnsetType, UNSET) for name in sorted(names)]
    return msgspec.json.Decoder(msgspec.defstruct(model.__name__, fields, forbid_unknown_fields=True))


def ids_in(text: bytes, field: str) -> Prompts | None:
    """Token ids; None where the text is something else that the field may be."""
    head = text[:UNCOUNTED_BYTES].translate(None, b" \t\r\n")
    return None if head[:1] != b"[" or head[1:2] == b'"' or head[:3] == b'[["' else parse_ids(text, field)


def is_json(content_type: str) -> bool:
    kind = content_type.split(";", 1)[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def not_an_object() -> FieldError:
    return FieldError("body: must be a JSON object, sent with Content-Type: application/json", "body")


def body_parameter(endpoint: Callable[..., Any]) -> tuple[str, type[RequestModel], bool] | None:
    """Name and model of an endpoint's body, and whether it may be absent."""
    for name, hint in get_type_hints(endpoint).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, RequestModel) and name != "return":
                return name, kind, type(None) in kinds
    return None
