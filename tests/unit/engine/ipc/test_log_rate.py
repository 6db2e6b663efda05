"""A client cannot fill the log."""

from __future__ import annotations

import io
import logging

import pytest

from waybill.engine.entrypoints.json_log import log_json_lines
from waybill.engine.ipc.log_rate import MAX_KINDS, LogRateLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO, Clock, LogRateLimit]:
    written, clock = io.StringIO(), Clock()
    limit = LogRateLimit(burst=3, window_s=10.0, clock=clock)
    handler = logging.StreamHandler(written)
    handler.addFilter(limit)
    logger = logging.Logger("clients")
    logger.addHandler(handler)
    return logger, written, clock, limit


def test_some_of_a_kind_pass_and_the_rest_are_counted(
    log: tuple[logging.Logger, io.StringIO, Clock, LogRateLimit],
) -> None:
    logger, written, clock, _ = log
    for number in range(1000):
        logger.warning("client %d is gone", number)
    assert written.getvalue().splitlines() == [f"client {number} is gone" for number in range(3)]
    clock.now = 10.0
    logger.warning("client %d is gone", 1000)
    assert written.getvalue().splitlines()[3:] == ["client 1000 is gone (997 more like it were not logged)"]


def test_other_kinds_and_lower_levels_pass(log: tuple[logging.Logger, io.StringIO, Clock, LogRateLimit]) -> None:
    logger, written, _, _ = log
    for number in range(5):
        logger.warning("this")
        logger.error("this")
        logger.info("request %d ended", number)
    lines = written.getvalue().splitlines()
    assert lines.count("this") == 6 and sum("ended" in line for line in lines) == 5


def test_errors_at_two_places_are_of_two_kinds(log: tuple[logging.Logger, io.StringIO, Clock, LogRateLimit]) -> None:
    logger, written, _, _ = log
    for _ in range(5):
        for text in ("1/0", "\n1/0"):
            try:
                exec(text)
            except ZeroDivisionError:
                logger.exception("a request failed")
    assert written.getvalue().count("a request failed") == 6


def test_texts_without_end_hold_no_memory(log: tuple[logging.Logger, io.StringIO, Clock, LogRateLimit]) -> None:
    logger, _, _, limit = log
    for number in range(3 * MAX_KINDS):
        logger.warning(f"kind {number}")
    assert len(limit._windows) <= MAX_KINDS


def test_a_server_logs_that_way(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        log_json_lines("info")
        for _ in range(100):
            logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    finally:
        root.handlers = handlers
    assert capfd.readouterr().err.count("Invalid HTTP request") <= 10
