"""The files of the page, which tell nothing of the server, and its events, which do."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ..errors import error_body
from ..responses import EventStream
from .live_feed import LiveFeed

# Path, file and type.
PAGE_FILES = (
    ("/", "page.html", "text/html"),
    ("/page.js", "page.js", "text/javascript"),
    ("/drawing.js", "drawing.js", "text/javascript"),
    ("/page.css", "page.css", "text/css"),
)
PAGE_PATHS = tuple(path for path, _, _ in PAGE_FILES)
# All that the page loads is its own; nothing is inline, and no other page may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router(feed: LiveFeed) -> APIRouter:
    router = APIRouter()
    folder = files(__package__)
    for path, name, media_type in PAGE_FILES:
        router.get(path, include_in_schema=False)(file_handler(folder.joinpath(name).read_bytes(), media_type))

    @router.get("/events")
    async def events() -> Response:
        feed.join()
        return EventStream(feed.events(), refused_event, on_end=feed.leave)

    return router


def file_handler(content: bytes, media_type: str) -> Any:
    async def answer() -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=media_type)

    return answer


def refused_event(error: Exception) -> dict[str, Any]:
    return error_body(error, 503)
