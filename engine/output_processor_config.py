"""What the output processor is started with. Apart from it, so that who starts it need not import what it does."""

from __future__ import annotations

import msgspec

LOW_PRIORITY = 10


class OutputProcessorConfig(msgspec.Struct, frozen=True):
    """Addresses, limits and priority; the sizes of the KV pool arrive later, as `RoutingSetup`."""

    records_address: str
    frontend_address: str
    queries_address: str
    tokenizer_path: str
    lifeline_path: str
    dp_size: int
    claim_budget_bytes: int
    claim_ttl_s: float
    nice: int = LOW_PRIORITY
    log_level: str = "warning"
