"""Where a server's spans go."""

from __future__ import annotations

import sys

import msgspec
import pytest

from waybill.launch.frontend import request_traces
from waybill.launch.serve_options import ServeCommand


def options(host: str, *allowed: str) -> ServeCommand:
    return ServeCommand(host=host, port=0, allowed_hosts=allowed, served_model_name="m", shutdown_timeout_s=1.0)


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
