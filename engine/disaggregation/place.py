"""What processes are started with to move what is theirs between engines."""

from __future__ import annotations

import msgspec

from ..ipc.sockets import CurveKeys, Endpoint


class TransferPlace(msgspec.Struct, frozen=True, kw_only=True):
    """For a rank: keys that both engines have and, on a prefill's side, where it listens. Rank 0 knows the `incarnation`
    and the address of the `routes`."""

    keys: CurveKeys
    listen: Endpoint | None = None
    routes: str = ""
    incarnation: str = ""


class RoutesPlace(msgspec.Struct, frozen=True, kw_only=True):
    """The same for the output processor; `leaders` are those of its dp ranks."""

    keys: CurveKeys
    leaders: list[Endpoint]
    listen: Endpoint | None = None
    incarnation: str = ""
    timeout_s: float
