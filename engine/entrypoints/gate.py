"""What a request must pass before any handler sees it: an API key, a body of bearable size, an engine that is ready."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response

# Asked by load balancers and scrapers, which hold no key.
OPEN_PATHS = ("/health", "/metrics")


class Gate:
    """An ASGI middleware; it never holds a body."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, not_ready: Callable[[], str | None]
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._max_body_bytes = max_body_bytes
        self._not_ready = not_ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await error_response(*refusal)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope) -> tuple[str, int] | None:
        headers = dict(scope["headers"])
        if scope["path"] in OPEN_PATHS:
            return None
        if self._api_key is not None and not secrets.compare_digest(
            headers.get(b"authorization", b""), b"Bearer " + self._api_key.encode()
        ):
            return "Authorization: must be 'Bearer' and the server's API key", 401
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return "Content-Length: must be a number", 400
        if int(length) > self._max_body_bytes:
            return self._too_large()
        reason = self._not_ready()
        return None if reason is None else (reason, 503)

    def _too_large(self) -> tuple[str, int]:
        return f"the body is too large: must be at most {self._max_body_bytes} bytes (--max-body-bytes)", 413

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def count() -> Message:
            nonlocal received
            event = await receive()
            received += len(event.get("body", b""))
            if received > self._max_body_bytes:
                # FastAPI answers with it; any other exception it takes for a body that it cannot parse.
                message, status = self._too_large()
                raise HTTPException(status, message)
            return event

        return count
