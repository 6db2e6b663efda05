"""Where a server listens, and what it says of it."""

from __future__ import annotations

import logging

import pytest

from waybill.launch.args import ServeCommand
from waybill.launch.frontend import listen, url_of


def options(host: str, api_key: str | None = None) -> ServeCommand:
    return ServeCommand(
        host=host,
        port=0,
        api_key=api_key,
        served_model_name="m",
        max_body_bytes=1,
        health_timeout_s=1.0,
        shutdown_timeout_s=1.0,
    )


def test_loopback_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), listen(options("127.0.0.1")) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert not caplog.records


@pytest.mark.parametrize(("api_key", "words"), [(None, "set an API key"), ("k", "an API key is asked for")])
def test_anything_else_is_warned_of(caplog: pytest.LogCaptureFixture, api_key: str | None, words: str) -> None:
    with caplog.at_level(logging.WARNING), listen(options("0.0.0.0", api_key)):
        assert words in caplog.text
