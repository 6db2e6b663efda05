"""The engine's configuration: small, frozen, resolved once and handed down."""

from __future__ import annotations

import msgspec

from .weight_sync.trainer_store import check_allowed_hosts

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOE_SPLITS = ("ep", "tp")
ATTENTION_BACKENDS = ("auto", "sdpa", "torch_reference")
MOE_DISPATCHERS = ("all_gather", "all_to_all")
OUTPUT_PROCESSORS = ("engine", "node")
EXPERTS_BACKENDS = ("auto", "fast", "torch_reference")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is started with. `resolve` checks it; every process of the engine gets the same one."""

    model_path: str
    tokenizer_path: str | None = None
    # Ranks that share each attention layer, and groups of them with requests of their own (data-parallel attention).
    tp_size: int = 1
    dp_size: int = 1
    # "auto": CUDA where there is one, else CPU.
    device: str = "auto"
    # "auto": the checkpoint's.
    dtype: str = "auto"
    # "ep": whole experts over the ranks. "tp": each expert's intermediate dimension over the ranks.
    moe_split: str = "ep"
    # How tokens reach their experts where there are several dp ranks.
    moe_dispatcher: str = "all_gather"
    attention_backend: str = "auto"
    experts_backend: str = "auto"
    # Longest prompt plus output, in tokens. None: the checkpoint's `max_position_embeddings`.
    context_length: int | None = None
    # Tokens of one KV page. The prefix cache works in whole pages: with 1 it keeps every token of a conversation, so that
    # the routes of earlier turns never have to be computed again.
    page_size: int = 1
    # Tokens that the KV pool holds. None: from `kv_memory_fraction` of what is free after the weights are loaded.
    kv_cache_tokens: int | None = None
    kv_memory_fraction: float = 0.25
    max_running_requests: int = 64
    max_waiting_requests: int = 4096
    # Prompt tokens that one step computes at most, over all requests; -1: no bound but the context length.
    chunked_prefill_size: int = 2048
    enable_prefix_cache: bool = True
    # Steps that may be in flight while the host plans the next one: 0 or 1.
    overlap_depth: int = 1
    enable_return_routed_experts: bool = False
    # Steps of routing that may wait to be filed before the engine waits for the output processor.
    routing_ring_slots: int = 8
    # "engine": one output processor files and ships for all. "node": one on each node, for the dp ranks there.
    output_processors: str = "engine"
    # Rows delivered by reference: how many bytes are kept, and for how long.
    claim_budget_bytes: int = 1 << 30
    claim_ttl_s: float = 600.0
    # CPU threads of one rank. None: the machine's cores shared by its ranks.
    num_threads: int | None = None
    weight_version: str = "default"
    # How long an update group may take to come together, a transfer to go on, and an update to bring its next tensor.
    weight_sync_timeout_s: float = 300.0
    # Update groups that may be joined or coming together at once.
    weight_sync_groups: int = 8
    # From where weights may come: host names, addresses, networks. None: from anywhere a client names.
    weight_sync_hosts: tuple[str, ...] | None = None
    # A process of the engine that is stopped for so long is killed, and the run ends.
    heartbeat_timeout_s: float = 20.0
    log_level: str = "warning"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size

    def __post_init__(self) -> None:
        for name, legal in (
            ("dtype", DTYPES),
            ("moe_split", MOE_SPLITS),
            ("moe_dispatcher", MOE_DISPATCHERS),
            ("attention_backend", ATTENTION_BACKENDS),
            ("experts_backend", EXPERTS_BACKENDS),
            ("output_processors", OUTPUT_PROCESSORS),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(legal)}")
        for name in (
            "tp_size",
            "dp_size",
            "page_size",
            "max_running_requests",
            "max_waiting_requests",
            "routing_ring_slots",
            "weight_sync_groups",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.moe_dispatcher == "all_to_all" and self.moe_split != "ep":
            raise ValueError(
                "moe_dispatcher='all_to_all': needs moe_split='ep'; a slice of every expert is on every rank"
            )
        if self.overlap_depth not in (0, 1):
            raise ValueError(f"overlap_depth={self.overlap_depth}: must be 0 or 1")
        if self.routing_ring_slots <= self.overlap_depth:
            raise ValueError(f"routing_ring_slots={self.routing_ring_slots}: must be more than overlap_depth")
        if self.chunked_prefill_size != -1 and self.chunked_prefill_size < 1:
            raise ValueError(f"chunked_prefill_size={self.chunked_prefill_size}: must be -1 or at least 1")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.page_size:
            raise ValueError(f"kv_cache_tokens={self.kv_cache_tokens}: must hold at least one page of {self.page_size}")
        if not 0.0 < self.kv_memory_fraction < 1.0:
            raise ValueError(f"kv_memory_fraction={self.kv_memory_fraction}: must lie between 0 and 1")
        if not 0.0 < self.weight_sync_timeout_s < 1e6:
            raise ValueError(f"weight_sync_timeout_s={self.weight_sync_timeout_s}: must lie between 0 and 1e6")
        if self.weight_sync_hosts is not None:
            check_allowed_hosts(self.weight_sync_hosts)
        if not 2.0 <= self.heartbeat_timeout_s <= 1e6:
            raise ValueError(f"heartbeat_timeout_s={self.heartbeat_timeout_s}: must lie in 2 .. 1e6")
        if self.context_length is not None and self.context_length < 1:
            raise ValueError(f"context_length={self.context_length}: must be at least 1")
