"""Log records as JSON lines: time, level, logger, message, and the fields that a record carries, such as the rid."""

from __future__ import annotations

import logging
import time

import msgspec

from ..ipc.log_rate import log_to_stderr

# The name under which a record carries its fields: `logger.info("...", extra={FIELDS: {...}})`.
FIELDS = "fields"


class JsonLines(logging.Formatter):
    """One object a line; a traceback is a field, not lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **record.__dict__.get(FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def log_json_lines(level: str) -> None:
    """Everything that this process logs, to standard error."""
    log_to_stderr(level, JsonLines())
    # Its life is ours: we say when we listen and stop.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
