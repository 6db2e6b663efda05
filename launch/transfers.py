"""Where an engine meets another one, for prefill here and decode there."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from ..engine.config import EngineConfig
from ..engine.disaggregation.place import RoutesPlace, TransferPlace
from ..engine.ipc.sockets import CurveKeys, Endpoint
from .exchange import RunSecrets, listen
from .node_options import run_secret
from .topology import Addresses


@dataclass(frozen=True)
class Transfers:
    """What a rank and, on rank 0, the output processor are started with."""

    pages: TransferPlace
    routes: RoutesPlace | None


def transfer_keys() -> CurveKeys:
    """Of what engines tell each other. Both sides derive them, so that no key travels; those inside a run are others."""
    secret = run_secret()
    assert secret is not None, "see `check_partners`"
    return RunSecrets.derive(b"between engines " + secret).keys


def encoder_keys() -> CurveKeys:
    """Of what a frontend and its encoder tell each other, derived likewise."""
    secret = run_secret()
    assert secret is not None, "see `check_partners`"
    return RunSecrets.derive(b"images " + secret).keys


def encoder_place(config: EngineConfig) -> Endpoint | None:
    """Where this engine's images are encoded, if they are."""
    return None if config.encoder is None else Endpoint(f"tcp://{config.encoder}", encoder_keys())


def open_transfers(config: EngineConfig, rank: int, addresses: Addresses) -> Transfers | None:
    """
    Raises:
        ValueError: the address cannot be had.
    """
    if config.disaggregation == "none":
        return None
    keys, leaders, timeout_s = transfer_keys(), addresses.leaders, config.disaggregation_timeout_s
    if config.disaggregation == "decode":
        return Transfers(TransferPlace(keys=keys), RoutesPlace(keys=keys, leaders=leaders, timeout_s=timeout_s))
    host = config.disaggregation_host
    if rank > 0:
        return Transfers(TransferPlace(keys=keys, listen=listen(host, keys)), None)
    incarnation, routes = uuid.uuid4().hex, listen(host, keys)
    pages = listen(host, keys, config.disaggregation_bootstrap_port)
    return Transfers(
        TransferPlace(keys=keys, listen=pages, routes=routes.address, incarnation=incarnation),
        RoutesPlace(keys=keys, leaders=leaders, listen=routes, incarnation=incarnation, timeout_s=timeout_s),
    )
