"""What the output processor is started with. Apart from it, so that who starts it need not import what it does."""

from __future__ import annotations

import msgspec

from ..disaggregation.place import RoutesPlace
from ..ipc.sockets import Endpoint

LOW_PRIORITY = 10


class OutputProcessorConfig(msgspec.Struct, frozen=True):
    """Addresses, limits and priority; the sizes of the KV pool arrive later, as `RoutingSetup`."""

    records_address: Endpoint | str
    frontend_address: Endpoint | str
    queries_address: Endpoint | str
    tokenizer_path: str
    lifeline_path: str
    claim_budget_bytes: int
    claim_ttl_s: float
    # Whose records come here; the first of them is the rank that publishes ring slots.
    first_dp_rank: int = 0
    num_dp_ranks: int = 1
    # Tells claims of this processor from those of others.
    claim_prefix: str = ""
    nice: int = LOW_PRIORITY
    log_level: str = "warning"
    # None where no run surrounds it: it beats for nobody then.
    heartbeat_timeout_s: float | None = None
    transfer: RoutesPlace | None = None
