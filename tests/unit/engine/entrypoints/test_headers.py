"""Headers that hold what a client has named."""

from __future__ import annotations

import h11
import httpx
import msgspec
import pytest
from starlette.requests import Request

from waybill.client.answer import _fetched_frame, http_options
from waybill.engine.entrypoints.native import MAX_META_HEADER_CHARS, META_HEADER, meta_header, session_key
from waybill.engine.io_struct import RoutedExpertsMeta

META = RoutedExpertsMeta(
    start=3,
    rows=2,
    num_layers=7,
    layer_ids=list(range(1, 8)),
    top_k=4,
    dtype="uint8",
    byte_order="little",
    weight_versions=[("default", 0, 5)],
    checksum="0" * 32,
)


@pytest.mark.parametrize("name", ["step-1", "schritt-ä", "第一步", "\U0001f600", "a\r\nX-Injected: 1", "\x00\x7f"])
def test_an_envelope_is_ascii_whatever_the_weights_are_called(name: str) -> None:
    meta = msgspec.structs.replace(META, weight_versions=[(name, 3, 5)])
    text = meta_header(meta)
    # h11 refuses what is no header's value.
    h11.Response(status_code=200, headers=[(META_HEADER, text)])
    assert text.isascii() and msgspec.json.decode(text, type=RoutedExpertsMeta) == meta
    assert _fetched_frame(httpx.Response(200, content=b"rows", headers={META_HEADER: text}), meta) == b"rows"


def test_many_long_names_leave_the_header_as_long_as_clients_take() -> None:
    meta = msgspec.structs.replace(META, weight_versions=[("\U0001f600" * 512, at, at + 1) for at in range(20)])
    text = meta_header(meta)
    assert len(text) <= MAX_META_HEADER_CHARS
    assert _fetched_frame(httpx.Response(200, content=b"rows", headers={META_HEADER: text}), meta) == b"rows"


@pytest.mark.parametrize(("value", "key"), [(b"abc", "abc"), ("séance".encode(), "séance"), (b"s\xe9ance", "séance")])
def test_a_session_has_one_name_in_header_and_body(value: bytes, key: str) -> None:
    assert session_key(Request({"type": "http", "headers": [(b"x-smg-routing-key", value)]})) == key
    assert session_key(Request({"type": "http", "headers": []})) is None


def test_a_client_sends_a_key_as_it_is() -> None:
    client = httpx.Client(**http_options("http://x", "schlüssel", 1.0))
    assert dict(client.build_request("GET", "/").headers.raw)[b"Authorization"] == "Bearer schlüssel".encode()
