"""What a request must pass before any handler sees it: an API key, a body of bearable size, an engine that is ready."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from .api_keys import ApiKeys
from .bounded_body import BodyBudget, BoundedBody, attach, too_large
from .errors import error_response
from .http_limits import HttpLimits

# Asked by load balancers and scrapers, which hold no key.
OPEN_PATHS = ("/health", "/health/", "/metrics", "/ping", "/ready")


class RequestGuard:
    """An ASGI middleware; it never holds a body. `public_paths` are of files, which no key guards and no engine makes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: ApiKeys,
        limits: HttpLimits,
        not_ready: Callable[[], str | None],
        public_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._limits = limits
        self._budget = BodyBudget(limits.max_inflight_body_bytes)
        self._not_ready = not_ready
        self._open_paths = (*OPEN_PATHS, *public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            # Where a body may follow of which nobody can say how long it is, or whether it will come, nothing may follow.
            close = is_ambiguous(headers) or b"expect" in headers
            await error_response(*refusal, close=close)(scope, receive, send)
            return
        body = BoundedBody(receive, self._limits, self._budget)
        attach(scope, body)
        try:
            await self._app(scope, body, send)
        finally:
            body.release()

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[str, int] | None:
        if is_ambiguous(headers):
            return "Content-Length, Transfer-Encoding: must not be given together", 400
        if scope["path"] in self._open_paths:
            return None
        if self._api_keys and not self._api_keys.are_held_by(scope):
            return "Authorization: must be 'Bearer' and the server's API key", 401
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return "Content-Length: must be a number", 400
        if int(length) > self._limits.max_body_bytes:
            return too_large(self._limits), 413
        reason = self._not_ready()
        return None if reason is None else (reason, 503)


def is_ambiguous(headers: dict[bytes, bytes]) -> bool:
    """Two servers in a row may read the end of such a body differently, and so what the next request is."""
    return b"content-length" in headers and b"transfer-encoding" in headers
