"""Refuses what a web page may send to a server in its reader's reach: from another origin, or under a name that is not the
server's (DNS rebinding).

A browser asks nobody before it sends a simple request, such as a `POST` without a body. It does add headers that the page
cannot change; a client that is no browser sends none of them. A request that holds the API key is not checked: no page has
one, and a browser adds none by itself.

A name can be made to lead anywhere, a literal address only where it says. So literal addresses pass where the server does
not listen on loopback: it may be reached through addresses that it does not know of (containers, NAT, health checks).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from .api_keys import ApiKeys
from .errors import error_response

ANY = "*"
OTHER_SITES = ("cross-site", "same-site")
# What a `GET` changes. A browser tells nothing of the page with a `GET` to an address that is not loopback.
CHANGING_GETS = ("/flush_cache",)
SHOWN_CHARS = 200


@dataclass(frozen=True)
class AllowedHosts:
    """`listening_on` is a literal address; `names` are allowed beside it: `*.DOMAIN` for all below it, `*` for any."""

    listening_on: str
    names: Sequence[str] = ()

    def __contains__(self, host: str) -> bool:
        """Whether the value of a `Host` header is one of ours; ports do not matter."""
        name = host_name(host)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or any(matches(name, pattern) for pattern in self.names)
        if not ipaddress.ip_address(self.listening_on).is_loopback:
            return True
        return address.is_loopback or any(matches(name, pattern) for pattern in self.names)


def host_name(host: str) -> str:
    """Without port, brackets and the dot of the root."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def matches(name: str, pattern: str) -> bool:
    pattern = pattern.lower()
    return pattern in (ANY, name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


class OriginGuard:
    """An ASGI middleware, before all others."""

    def __init__(
        self, app: ASGIApp, *, api_keys: ApiKeys, allowed_hosts: AllowedHosts, allowed_origins: Sequence[str]
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._hosts = allowed_hosts
        self._origins = frozenset(origin.lower() for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and not (self._api_keys and self._api_keys.are_held_by(scope)):
            refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal, 403, close=True)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        hosts, origins, sites, agents = (
            values(scope, name) for name in ("host", "origin", "sec-fetch-site", "user-agent")
        )
        # HTTP/1.0 has none; no browser speaks it.
        for host in hosts:
            if host not in self._hosts:
                return f"Host: {host[:SHOWN_CHARS]} is not this server; --allow-host allows it"
        for origin in origins:
            if not self._is_allowed(origin, hosts):
                return f"Origin: {origin[:SHOWN_CHARS]} is another site; --allow-origin allows it"
        if not origins and any(site in OTHER_SITES for site in sites):
            return "Sec-Fetch-Site: the request comes from the page of another site"
        is_browser = any(agent.startswith("Mozilla/") for agent in agents)
        if is_browser and scope["method"] == "GET" and scope["path"] in CHANGING_GETS and not sites:
            return f"{scope['path']}: must be a POST from a browser, which does not say which page sends this"
        return None

    def _is_allowed(self, origin: str, hosts: Sequence[str]) -> bool:
        if ANY in self._origins or origin.lower() in self._origins:
            return True
        # TLS may end before this server: the scheme is not compared.
        scheme, separator, place = origin.lower().partition("://")
        return bool(separator) and scheme in ("http", "https") and [place] == [host.lower() for host in hosts]


def values(scope: Scope, name: str) -> list[str]:
    """Of every header of this name."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key == wanted]
