"""The options of `serve` that are the HTTP service's own; those of the engine are in `engine_options.py`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec

from ..engine.chat_formats.formats import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from ..engine.entrypoints.http_limits import HttpLimits
from .api_key import API_KEY_VARIABLE, FILE_FLAG, FLAG

# torchrun gives the ranks 30 seconds.
MAX_SHUTDOWN_TIMEOUT_S = 25.0
MAX_HEALTH_TIMEOUT_S = 3600.0
ORIGIN = re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+")
HTTP_URL = re.compile(r"https?://[^/\s]+(/\S*)?")
HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_.:-]+")


class ServeCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the HTTP service. It holds no key: it is written to the run's folder."""

    host: str
    port: int
    served_model_name: str
    shutdown_timeout_s: float
    health_timeout_s: float = 20.0
    api_key_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    limits: HttpLimits = HttpLimits()
    tool_call_parser: str = AUTO
    reasoning_parser: str = NONE
    split_special_tokens: bool = False
    otlp_traces_endpoint: str | None = None
    # The live page at `/`.
    page: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must lie in 0 .. {2**16 - 1}; 0 takes a free one")
        if not 0 < self.health_timeout_s <= MAX_HEALTH_TIMEOUT_S:
            raise ValueError(
                f"--health-timeout {self.health_timeout_s}: must be above 0 and at most {MAX_HEALTH_TIMEOUT_S}"
            )
        if not 0 <= self.shutdown_timeout_s <= MAX_SHUTDOWN_TIMEOUT_S:
            raise ValueError(
                f"--shutdown-timeout {self.shutdown_timeout_s}: must lie in 0 .. {MAX_SHUTDOWN_TIMEOUT_S}; "
                "torchrun ends the ranks by force some seconds later"
            )
        if self.otlp_traces_endpoint is not None and not HTTP_URL.fullmatch(self.otlp_traces_endpoint):
            raise ValueError(
                f"--otlp-traces-endpoint {self.otlp_traces_endpoint}: must be the http:// or https:// URL of a collector's "
                "OTLP over HTTP, as http://127.0.0.1:4318/v1/traces"
            )
        for host in self.allowed_hosts:
            if not HOST_NAME.fullmatch(host):
                raise ValueError(f"--allow-host {host}: must be a name or address without port, *.DOMAIN or *")
        for origin in self.allowed_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"--allow-origin {origin}: must be SCHEME://HOST[:PORT] without a path, null or *")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        FLAG, default=None, help=f"asked of every client; others see it for a moment, {API_KEY_VARIABLE} they do not"
    )
    parser.add_argument(
        FILE_FLAG, default=None, metavar="FILE", help="a file of keys, one a line, of which every client needs one"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which clients without a key reach the server, *.DOMAIN or *; may be repeated",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server, as https://app.example, or *; may be repeated",
    )
    parser.add_argument(
        "--served-model-name", default=None, help="as /v1/models lists it; the folder's name if not set"
    )
    parser.add_argument(
        "--health-timeout", type=float, default=20.0, help="seconds that /health_generate waits for a step"
    )
    parser.add_argument(
        "--shutdown-timeout", type=float, default=20.0, help="seconds that running requests get at SIGTERM"
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=TOOL_PARSERS,
        default=AUTO,
        help="how the model writes calls of tools; auto: as its chat template says",
    )
    parser.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        default=NONE,
        help="how the model writes reasoning, which chats then have apart; none: it is content",
    )
    parser.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="special tokens in a chat's messages are text, unless the request says otherwise",
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        default=None,
        metavar="URL",
        help="where spans of requests go, by OpenTelemetry's OTLP over HTTP; needs the extra 'tracing'",
    )
    parser.add_argument("--no-page", action="store_true", help="serve no live page at / and none of its events")
    add_limit_options(parser)


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    defaults = HttpLimits()
    parser.add_argument(
        "--max-connections", type=int, default=None, help="at once; as many as open files allow if not set, up to 8192"
    )
    parser.add_argument("--max-header-bytes", type=int, default=defaults.max_header_bytes, help="longest request head")
    parser.add_argument("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="longest request body")
    parser.add_argument(
        "--max-inflight-body-bytes",
        type=int,
        default=defaults.max_inflight_body_bytes,
        help="bytes of all bodies that have arrived and are not yet parsed",
    )
    parser.add_argument(
        "--max-body-values",
        type=int,
        default=defaults.max_body_values,
        help="most JSON values in one field of a body, token ids not counted",
    )
    for name, text in (
        ("header-timeout", "seconds for a request head to arrive"),
        ("body-timeout", "seconds for a request body to arrive"),
        ("keep-alive-timeout", "seconds that a connection may be idle between requests"),
        ("write-timeout", "seconds in which a client must take what it is sent"),
    ):
        default = getattr(defaults, name.replace("-", "_") + "_s")
        parser.add_argument(f"--{name}", type=float, default=default, help=text)


def limits_of(options: argparse.Namespace) -> HttpLimits:
    """
    Raises:
        ValueError: a bound is out of its range; the message names it.
    """
    return HttpLimits(**{name: getattr(options, name.removesuffix("_s")) for name in HttpLimits.__struct_fields__})


def serve_command(options: argparse.Namespace) -> ServeCommand:
    """
    Raises:
        ValueError: an option is wrong; the message names it and its range.
    """
    if options.api_key is not None:
        raise ValueError(f"{FLAG}: other users see a command line; set {API_KEY_VARIABLE}, or use {FILE_FLAG}")
    return ServeCommand(
        host=options.host,
        port=options.port,
        api_key_file=options.api_key_file,
        allowed_hosts=tuple(options.allow_host),
        allowed_origins=tuple(options.allow_origin),
        served_model_name=options.served_model_name or Path(options.model_path).resolve().name,
        shutdown_timeout_s=options.shutdown_timeout,
        health_timeout_s=options.health_timeout,
        limits=limits_of(options),
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        split_special_tokens=options.split_special_tokens,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
        page=not options.no_page,
    )
