"""Where a server listens, what it says of it, and where its spans go."""

from __future__ import annotations

import logging
import socket
import sys

import msgspec
import pytest

from waybill.launch.frontend import allowed_hosts, listen, request_traces, url_of
from waybill.launch.serve_options import ServeCommand


def options(host: str, *allowed: str) -> ServeCommand:
    return ServeCommand(host=host, port=0, allowed_hosts=allowed, served_model_name="m", shutdown_timeout_s=1.0)


def test_loopback_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), listen(options("127.0.0.1"), has_key=False) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert not caplog.records


@pytest.mark.parametrize(("has_key", "words"), [(False, "set an API key"), (True, "an API key is asked for")])
def test_anything_else_is_warned_of(caplog: pytest.LogCaptureFixture, has_key: bool, words: str) -> None:
    with caplog.at_level(logging.WARNING), listen(options("0.0.0.0"), has_key=has_key):
        assert words in caplog.text


def test_a_server_goes_by_its_own_names_and_those_that_are_allowed() -> None:
    command = options("localhost", "waybill.example")
    with listen(command, has_key=False) as listener:
        hosts = allowed_hosts(command, listener)
    for name in ("localhost:1", "127.0.0.1:1", socket.gethostname(), "waybill.example:80"):
        assert name in hosts
    assert "example" not in hosts


@pytest.mark.parametrize("url", ["localhost:4318", "grpc://localhost:4317", "http://", "http://a b", ""])
def test_spans_go_to_an_http_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"^--otlp-traces-endpoint .*must be the http:// or https:// URL"):
        msgspec.structs.replace(options("127.0.0.1"), otlp_traces_endpoint=url)


def test_spans_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = msgspec.structs.replace(options("127.0.0.1"), otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
    module = "waybill.engine.entrypoints.request_traces"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        ValueError, match=r"^--otlp-traces-endpoint: needs OpenTelemetry, pip install 'waybill\[tracing\]'"
    ):
        request_traces(asked)
    assert request_traces(options("127.0.0.1")) is None
    assert module not in sys.modules, "nothing is imported that nobody has asked for"
