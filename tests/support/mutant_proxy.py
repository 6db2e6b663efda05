"""A reverse proxy on loopback that passes everything to a server and breaks one rule of its routes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from .route_mutants import Mutant, MutantTransport


@contextmanager
def mutant_proxy(upstream: str, mutant: Mutant) -> Iterator[str]:
    """Its URL."""
    with httpx.Client(
        base_url=upstream, timeout=60.0, transport=MutantTransport(httpx.HTTPTransport(), mutant)
    ) as client:

        class Handler(BaseHTTPRequestHandler):
            """One connection a request, which ends with the answer."""

            def log_message(self, format: str, *args: object) -> None:
                pass

            def pass_on(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {"Content-Type": "application/json"}
                with client.stream(self.command, self.path, content=content, headers=headers) as response:
                    self.send_response(response.status_code)
                    self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
                    self.end_headers()
                    for piece in response.iter_bytes():
                        self.wfile.write(piece)

            do_GET = do_POST = pass_on

        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}"
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()
