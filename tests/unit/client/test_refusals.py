"""What a server refuses reaches the caller as it was said."""

from __future__ import annotations

import copy
from collections.abc import Callable

import httpx
import pytest
from support.fake_routes_server import KINDS, PROMPT, FakeServer, ask, refusal

from waybill.client import ServerError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("response", "status", "message", "retry_after_s"),
    [
        (
            lambda: refusal(400, "routed_experts_start_len=9 is higher"),
            400,
            "routed_experts_start_len=9 is higher",
            None,
        ),
        (lambda: refusal(503, "the queue is full", Retry_After="7"), 503, "the queue is full", 7.0),
        (lambda: refusal(503, "later", Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"), 503, "later", None),
        (lambda: httpx.Response(502, text="<html>bad gateway</html>"), 502, "<html>bad gateway</html>", None),
        (lambda: httpx.Response(500), 500, "Internal Server Error", None),
        (lambda: httpx.Response(307, headers={"Location": "/elsewhere"}), 307, "Temporary Redirect", None),
    ],
)
def test_refusals(
    kind: str,
    response: Callable[[], httpx.Response],
    status: int,
    message: str,
    retry_after_s: float | None,
    server: FakeServer,
) -> None:
    server.refusal = response
    with pytest.raises(ServerError) as caught:
        ask(kind, server, PROMPT)
    error = caught.value
    assert (error.status, error.message, error.retry_after_s) == (status, message, retry_after_s)
    assert str(error) == f"HTTP {status}: {message}"
    # Trainers pass errors between processes, which copies them by the same protocol.
    assert str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expired_claim(kind: str, server: FakeServer) -> None:
    server.spoil = lambda meta_info: server.claims.clear()
    with pytest.raises(ServerError, match="HTTP 410: the claim has expired"):
        ask(kind, server, PROMPT, delivery="reference")
