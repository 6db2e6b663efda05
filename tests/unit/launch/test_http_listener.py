"""Where a service listens, and what it says of it."""

from __future__ import annotations

import logging
import socket

import pytest

from waybill.launch.http_listener import allowed_hosts, listen, url_of


def test_loopback_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), listen("127.0.0.1", 0, has_key=False) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert not caplog.records


@pytest.mark.parametrize(("has_key", "words"), [(False, "set an API key"), (True, "an API key is asked for")])
def test_anything_else_is_warned_of(caplog: pytest.LogCaptureFixture, has_key: bool, words: str) -> None:
    with caplog.at_level(logging.WARNING), listen("0.0.0.0", 0, has_key=has_key):
        assert words in caplog.text


def test_a_server_goes_by_its_own_names_and_those_that_are_allowed() -> None:
    with listen("localhost", 0, has_key=False) as listener:
        hosts = allowed_hosts("localhost", ["waybill.example"], listener)
    for name in ("localhost:1", "127.0.0.1:1", socket.gethostname(), "waybill.example:80"):
        assert name in hosts
    assert "example" not in hosts
