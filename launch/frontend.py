"""The frontend process of a server: HTTP on one side, the engine's sockets on the other. Started by rank 0.

It listens from the first moment, and answers 503 until the engine is ready. At SIGTERM it takes no new connection, gives
what runs a bounded time, aborts the rest and tells the ranks to leave.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.chat_formats.formats import AUTO, NONE, ChatFormats, detect_tool_parser
from ..engine.config import EngineConfig
from ..engine.entrypoints.api_keys import ApiKeys
from ..engine.entrypoints.bounded_server import SPARE_CONNECTIONS, BoundedServer
from ..engine.entrypoints.http_server import make_app
from ..engine.entrypoints.json_log import log_json_lines
from ..engine.entrypoints.live_page.live_feed import LiveFeed
from ..engine.entrypoints.live_page.recent_requests import RecentRequests
from ..engine.entrypoints.service_metrics import ServiceMetrics
from ..engine.frontend.chat_template import ChatTemplate, load_chat_template
from ..engine.frontend.engine_connection import EngineDeadError, EngineStartError
from ..engine.frontend.request_observer import ObserverGroup
from ..engine.frontend.tokenizer_manager import TokenizerManager
from ..engine.ipc.critical_thread import EXIT_PART_FAILED, end_process
from ..engine.ipc.heartbeat import Heartbeat, table_of_this_run
from ..engine.ipc.lifeline import watch_lifeline
from ..engine.text.tokenizer_file import load_tokenizer
from .api_key import read_api_keys
from .http_listener import allowed_hosts, listen, url_of
from .open_files import connections_within_limit
from .run_dir import ADDRESSES, ENGINE_CONFIG, SERVE_OPTIONS, read_struct
from .serve_options import ServeCommand
from .topology import Addresses
from .transfers import encoder_place

if TYPE_CHECKING:
    from ..engine.entrypoints.request_traces import RequestTraces

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
# For aborted requests to answer.
ABORT_GRACE_S = 2.0
EXIT_NO_ENGINE = 2
EXIT_STOPPED = 130


@dataclass(frozen=True)
class Entrance:
    """Where clients come in, with which keys, and how many at once."""

    listener: socket.socket
    keys: Sequence[str]
    max_connections: int


class Frontend:
    """One server's HTTP side, from listening to the end."""

    def __init__(
        self,
        addresses: Addresses,
        config: EngineConfig,
        options: ServeCommand,
        entrance: Entrance,
    ) -> None:
        model_path = config.tokenizer_path or config.model_path
        self._options = options
        metrics, recent = ServiceMetrics(), RecentRequests()
        self._traces = request_traces(options)
        observers = [metrics, recent if options.page else None, self._traces]
        self._manager = TokenizerManager(
            config,
            load_tokenizer(model_path),
            leaders=addresses.leaders,
            frontend=addresses.frontend,
            queries=addresses.queries,
            encoder=encoder_place(config),
            observer=ObserverGroup([one for one in observers if one is not None]),
            on_failure=self._on_failure,
        )
        self._live_feed = LiveFeed(self._manager, recent, options.served_model_name) if options.page else None
        template = load_chat_template(
            model_path,
            max_chars=options.limits.max_body_bytes,
            split_special_tokens=options.split_special_tokens,
        )
        app = make_app(
            self._manager,
            template,
            metrics,
            model_name=options.served_model_name,
            api_keys=ApiKeys(entrance.keys),
            allowed_hosts=allowed_hosts(options.host, options.allowed_hosts, entrance.listener),
            allowed_origins=options.allowed_origins,
            limits=options.limits,
            health_timeout_s=options.health_timeout_s,
            formats=chat_formats(options, template),
            live_feed=self._live_feed,
        )
        self._url = url_of(entrance.listener)
        self._server = BoundedServer(
            app if self._traces is None else self._traces.around(app),
            entrance.listener,
            options.limits,
            max_connections=entrance.max_connections,
            shutdown_timeout_s=options.shutdown_timeout_s + ABORT_GRACE_S,
        )

    async def run(self) -> int:
        """Serve until told to stop; the process' exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        serving = asyncio.create_task(self._server.serve(), name="http")
        starting = asyncio.create_task(self._manager.start(START_TIMEOUT_S), name="start")
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # Told to stop while the ranks load, or unable to serve: they go when this process does.
            starting.cancel()
            serving.result()
            return EXIT_STOPPED
        try:
            starting.result()
        except (EngineStartError, EngineDeadError, TimeoutError) as error:
            print(f"waybill: {error}", file=sys.stderr, flush=True)
            self._server.should_exit = True
            await serving
            return EXIT_PART_FAILED if isinstance(error, EngineDeadError) else EXIT_NO_ENGINE
        print(f"waybill is ready: {self._url}", flush=True)
        await serving
        await self._manager.stop_engine()
        self._manager.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        return 0

    def _on_failure(self, reason: str) -> None:
        """The engine cannot be heard any more: callers get their errors, later ones 503, and then this process ends, and
        with it the run."""
        asyncio.get_running_loop().call_later(ABORT_GRACE_S, end_process, reason)

    def _stop(self) -> None:
        """The first signal asks, the second insists."""
        logger.info("stopping: %d requests run or wait", self._manager.num_unfinished)
        seconds = 0.0 if self._server.should_exit else self._options.shutdown_timeout_s
        self._server.should_exit = True
        if self._live_feed is not None:
            self._live_feed.close()
        # What is aborted still answers, with what it has.
        asyncio.get_running_loop().call_later(seconds, self._abort_all)

    def _abort_all(self) -> None:
        if self._manager.not_ready() is None:
            self._manager.abort_request(abort_all=True)


def request_traces(options: ServeCommand) -> RequestTraces | None:
    """
    Raises:
        ValueError: they are asked for, and OpenTelemetry is not installed.
    """
    if options.otlp_traces_endpoint is None:
        return None
    try:
        from ..engine.entrypoints.request_traces import RequestTraces, otlp_exporter  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"--otlp-traces-endpoint: needs OpenTelemetry, pip install 'waybill[tracing]': {error}"
        ) from None
    return RequestTraces(otlp_exporter(options.otlp_traces_endpoint), options.served_model_name)


def chat_formats(options: ServeCommand, template: ChatTemplate | None) -> ChatFormats:
    """Those that were named, or that the template shows."""
    tools = options.tool_call_parser
    if tools == AUTO:
        tools = NONE if template is None else detect_tool_parser(template.text)
    return ChatFormats(tools, options.reasoning_parser)


def main() -> int:
    parser = argparse.ArgumentParser(description="Waybill's HTTP frontend; started by rank 0")
    parser.add_argument("--run-dir", required=True)
    run_dir = parser.parse_args().run_dir
    # Until `Frontend` has its own handlers a signal ends the process; Python's for this one would raise.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Else texts are tokenised on one pool of the library, in which short ones wait for long ones.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    addresses = read_struct(run_dir, ADDRESSES, Addresses)
    watch_lifeline(addresses.lifeline)
    config = read_struct(run_dir, ENGINE_CONFIG, EngineConfig)
    options = read_struct(run_dir, SERVE_OPTIONS, ServeCommand)
    log_json_lines(config.log_level)
    try:
        keys = read_api_keys(options.api_key_file)
        max_connections = connections_within_limit(options.limits.max_connections, config.world_size, SPARE_CONNECTIONS)
        entrance = Entrance(listen(options.host, options.port, has_key=bool(keys)), keys, max_connections)
    except ValueError as error:
        print(f"waybill: {error}", file=sys.stderr)
        return EXIT_NO_ENGINE
    except OSError as error:
        print(f"waybill: --host {options.host} --port {options.port}: {error.strerror or error}", file=sys.stderr)
        return EXIT_NO_ENGINE
    try:
        frontend = Frontend(addresses, config, options, entrance)
    except ValueError as error:
        # The tokenizer cannot be read.
        print(f"waybill: {error}", file=sys.stderr)
        return EXIT_NO_ENGINE
    # From now on: reading a large tokenizer holds the interpreter for seconds.
    Heartbeat(table_of_this_run(), "frontend", config.heartbeat_timeout_s)
    return asyncio.run(frontend.run())


if __name__ == "__main__":
    sys.exit(main())
