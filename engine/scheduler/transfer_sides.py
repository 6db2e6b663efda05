"""Which side of a transfer a leader is on."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import EngineConfig
from ..ipc.sockets import Sender
from ..plan import PageMessage, PageTransfers, PeerMessage
from .decode_transfers import DecodeTransfers
from .prefill_transfers import PrefillTransfers
from .step_recorder import StepRecorder
from .transfers import NoTransfers, Transfers


def make_transfers(
    config: EngineConfig,
    own: PageTransfers | None,
    peers: Sequence[Sender[PeerMessage]],
    recorder: StepRecorder,
) -> Transfers:
    """As the configuration says; `own` moves the pages of the leader's rank."""
    if own is None:
        return NoTransfers()

    def tell(message: PageMessage) -> None:
        """In order with the steps: what is dropped belongs to somebody else in a later one."""
        own.handle(message)
        for peer in peers:
            peer.send(message)

    if config.disaggregation == "prefill":
        return PrefillTransfers(tell, config.disaggregation_timeout_s, lambda: recorder.weight_version)
    return DecodeTransfers(
        tell, config.disaggregation_timeout_s, config.tp_size, has_routes=config.enable_return_routed_experts
    )
