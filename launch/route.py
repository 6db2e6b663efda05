"""`torchrun.sh route`: one address in front of engines for prompts and engines for what follows.

It remembers nothing that matters: any number of routers may stand before the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from ..engine.config import ENGINE_OPTIONS
from ..engine.entrypoints.api_keys import ApiKeys
from ..engine.entrypoints.bounded_server import SPARE_CONNECTIONS, BoundedServer
from ..engine.ipc.log_rate import log_to_stderr
from .api_key import API_KEY_VARIABLE, FILE_FLAG, FLAG, read_api_keys
from .http_listener import allowed_hosts, listen, url_of
from .open_files import connections_within_limit
from .router_app import make_router
from .router_sides import CONNECT_TIMEOUT_S, DECODE, PREFILL, Side, Sides
from .run_dir import EXIT_USAGE
from .serve_options import HOST_NAME, MAX_SHUTDOWN_TIMEOUT_S, add_limit_options, limits_of

# Its connection, and one to each side.
FILES_OF_A_CALLER = 3


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="torchrun.sh route", description="Stand before engines for prompts and engines for what follows."
    )
    made.add_argument(
        "--prefill",
        required=True,
        action="append",
        nargs="+",
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="server with --disaggregation prefill, and its --disaggregation-bootstrap-port; may be repeated",
    )
    made.add_argument(
        "--decode",
        required=True,
        action="append",
        metavar="URL",
        help="server with --disaggregation decode; may be repeated",
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on")
    made.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    made.add_argument(
        "--bootstrap-host",
        default=None,
        help="where the decode's sides find those of the prefill; the host of each URL if not given",
    )
    field = ENGINE_OPTIONS["disaggregation_bootstrap_port"]
    made.add_argument("--bootstrap-port", type=int, default=field.default, help="of a --prefill that names none")
    made.add_argument(FLAG, default=None, help="asked of every client, and passed on to the engines")
    made.add_argument(FILE_FLAG, default=None, metavar="FILE", help="a file of keys, one a line")
    made.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="as for serve: a name of the router"
    )
    made.add_argument(
        "--shutdown-timeout", type=float, default=20.0, help="seconds that running requests get at SIGTERM"
    )
    add_limit_options(made)
    return made


def check(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option is out of its range.
    """
    if options.api_key is not None:
        raise ValueError(f"{FLAG}: other users see a command line; set {API_KEY_VARIABLE}, or use {FILE_FLAG}")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: must lie in 0 .. {2**16 - 1}; 0 takes a free one")
    if not 0 <= options.shutdown_timeout <= MAX_SHUTDOWN_TIMEOUT_S:
        raise ValueError(f"--shutdown-timeout {options.shutdown_timeout}: must lie in 0 .. {MAX_SHUTDOWN_TIMEOUT_S}")
    for host in options.allow_host:
        if not HOST_NAME.fullmatch(host):
            raise ValueError(f"--allow-host {host}: must be a name or address without port, *.DOMAIN or *")


def server_url(kind: str, text: str) -> str:
    """
    Raises:
        ValueError: it is none.
    """
    try:
        url = urlsplit(text)
        is_good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and not (url.query or url.fragment)
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"--{kind} {text}: must be http://HOST:PORT")
    return text.rstrip("/")


def bootstrap_port(text: str) -> int:
    """
    Raises:
        ValueError: it is none.
    """
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ValueError(f"bootstrap port {text}: must lie in 1 .. {2**16 - 1}")
    return int(text)


def sides_of(options: argparse.Namespace) -> tuple[list[Side], list[Side]]:
    """
    Raises:
        ValueError: an address is wrong, or given twice.
    """
    prefills, places = [], []
    for text, *ports in options.prefill:
        if len(ports) > 1:
            raise ValueError(f"--prefill {text} {' '.join(ports)}: must be a URL and at most one port")
        url = server_url(PREFILL, text)
        host = options.bootstrap_host or urlsplit(url).hostname or "127.0.0.1"
        port = bootstrap_port(*ports or [str(options.bootstrap_port)])
        prefills.append(Side(PREFILL, url, (host, port)))
        places.append(f"{host}:{port}")
    decodes = [Side(DECODE, server_url(DECODE, text)) for text in options.decode]
    refuse_twice("a server", [side.url for side in (*prefills, *decodes)])
    refuse_twice("a prefill's bootstrap port", places)
    return prefills, decodes


def refuse_twice(what: str, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one is there twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} is given twice: {name}")


async def serve(server: BoundedServer) -> None:
    """Until told to stop. The first signal asks, the second insists."""

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await server.serve()


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    log_to_stderr("warning", logging.Formatter("%(levelname)s router %(message)s"))
    try:
        check(options)
        limits = limits_of(options)
        prefills, decodes = sides_of(options)
        keys = read_api_keys(options.api_key_file)
        max_connections = connections_within_limit(limits.max_connections, 0, SPARE_CONNECTIONS, FILES_OF_A_CALLER)
        listener = listen(options.host, options.port, has_key=bool(keys))
    except ValueError as error:
        print(f"torchrun.sh: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"torchrun.sh: error: --host {options.host} --port {options.port}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    sides = Sides(prefills, decodes, make_client())
    hosts = allowed_hosts(options.host, options.allow_host, listener)
    app = make_router(sides, api_keys=ApiKeys(keys), allowed_hosts=hosts, limits=limits)
    server = BoundedServer(
        app, listener, limits, max_connections=max_connections, shutdown_timeout_s=options.shutdown_timeout
    )
    print(f"routing at {url_of(listener)}", file=sys.stderr, flush=True)
    asyncio.run(serve(server))
    return 0


def make_client() -> httpx.AsyncClient:
    """An answer may take as long as it likes. What the environment says of proxies is not for one's own engines."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )
