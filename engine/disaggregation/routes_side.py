"""The output processor's part in transfers: the thread that serves rows and log-probabilities of prompts to another engine,
or fetches them."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from ..ipc.frontend_messages import FrontendMessage, TransferNotice
from ..ipc.sockets import Sender
from .place import RoutesPlace
from .route_client import ArrivingRoutes
from .route_server import OfferedRoutes
from .transfer_client import TransferClient
from .transfer_server import TransferServer


def serve_routes(place: RoutesPlace) -> OfferedRoutes:
    """On a prefill's side."""
    assert place.listen is not None
    offered = OfferedRoutes()
    server = TransferServer(place.listen, place.incarnation, offered, place.timeout_s)
    offered.wake = server.wake
    server.start()
    return offered


def fetch_routes(place: RoutesPlace, first_dp_rank: int) -> ArrivingRoutes:
    """On a decode's side."""
    client = TransferClient(place.keys, {})
    context = zmq.Context()
    senders: Sequence[Sender[FrontendMessage]] = [Sender(context, leader) for leader in place.leaders]

    def notify(dp_rank: int, notice: TransferNotice) -> None:
        senders[dp_rank - first_dp_rank].send(notice)

    arriving = ArrivingRoutes(client, notify)
    client.start()
    return arriving


RoutesSide = OfferedRoutes | ArrivingRoutes


def make_routes_side(place: RoutesPlace | None, first_dp_rank: int) -> RoutesSide | None:
    if place is None:
        return None
    return fetch_routes(place, first_dp_rank) if place.listen is None else serve_routes(place)
