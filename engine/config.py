"""The engine's configuration: small, frozen, resolved once and handed down."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from .validation.core_groups import check_core_groups
from .validation.host_names import check_allowed_hosts
from .validation.option import Bounds, Option, option_fields

DTYPES = ("auto", "float32", "bfloat16", "float16")
COLLECTIVES_BACKENDS = ("auto", "torch")
LOAD_FORMATS = ("auto", "dummy")
MOE_SPLITS = ("ep", "tp")
ATTENTION_BACKENDS = ("auto", "sdpa", "torch_reference")
MOE_DISPATCHERS = ("all_gather", "all_to_all")
OUTPUT_PROCESSORS = ("engine", "node")
FP8_ACTIVATIONS = ("auto", "e4m3", "exact")
ROUTER_WEIGHTS_DTYPES = ("auto", "bfloat16", "float32")
EXPERTS_BACKENDS = ("auto", "fast", "torch_reference")
DISAGGREGATION = ("none", "prefill", "decode")
DISAGGREGATION_TRANSPORTS = ("auto", "shared", "tcp", "nixl")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# `kv_memory_fraction` by type of device. A GPU is the engine's own; the memory of a host is not, and what is taken from it
# is missing elsewhere.
KV_MEMORY_FRACTIONS = {"cuda": 0.85, "cpu": 0.25}

ONE_OR_MORE = Bounds(at_least=1)
ZERO_OR_MORE = Bounds(at_least=0)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is started with, checked on construction; every process of the engine gets the same one.

    A field's `Option` is all that is said of it: a program's `Engine(...)`, the command lines and their help have it from
    here.
    """

    model_path: Annotated[str, Option("checkpoint folder in Hugging Face format", "model")]
    tokenizer_path: Annotated[
        str | None, Option("folder with the tokenizer.json; the checkpoint's if not given", metavar="FOLDER")
    ] = None
    tp_size: Annotated[
        int, Option("ranks that share each attention layer (tensor parallel)", "tp", bounds=ONE_OR_MORE)
    ] = 1
    dp_size: Annotated[
        int, Option("groups of such ranks, each with requests of its own (dp attention)", "dp", bounds=ONE_OR_MORE)
    ] = 1
    device: Annotated[str, Option("auto, cpu or cuda; auto is CUDA where there is one")] = "auto"
    dtype: Annotated[str, Option("of weights and KV cache; auto is the checkpoint's", choices=DTYPES)] = "auto"
    load_format: Annotated[
        str,
        Option(
            "auto: the checkpoint's safetensors; dummy: random weights, for measurements, or until an update brings others",
            choices=LOAD_FORMATS,
        ),
    ] = "auto"
    moe_split: Annotated[
        str,
        Option("over the ranks: whole experts (ep), or a slice of every expert's inner width (tp)", choices=MOE_SPLITS),
    ] = "ep"
    moe_dispatcher: Annotated[
        str,
        Option(
            "how tokens reach their experts where there are several dp ranks; in CUDA graphs, within a node, all_to_all is "
            "all_gather",
            choices=MOE_DISPATCHERS,
        ),
    ] = "all_gather"
    collectives_backend: Annotated[
        str,
        Option(
            "within a host; auto is symmetric memory where its GPUs reach each other, and shared memory for what is on the "
            "CPU; torch, and between hosts, is torch.distributed's",
            choices=COLLECTIVES_BACKENDS,
        ),
    ] = "auto"
    attention_backend: Annotated[str, Option("auto is the device's fastest", choices=ATTENTION_BACKENDS)] = "auto"
    experts_backend: Annotated[str, Option("auto is the device's fastest", choices=EXPERTS_BACKENDS)] = "auto"
    fp8_activations: Annotated[
        str,
        Option(
            "of a model whose weights are FP8: e4m3 with a scale for 128 numbers of a token, or exact; auto is e4m3 on "
            "CUDA, exact on a CPU",
            choices=FP8_ACTIVATIONS,
        ),
    ] = "auto"
    context_length: Annotated[
        int | None,
        Option("longest prompt plus answer, in tokens; the checkpoint's if not given", bounds=ONE_OR_MORE),
    ] = None
    # The prefix cache works in whole pages: with 1 it keeps every token of a conversation, so that the routes of earlier
    # turns never have to be computed again.
    page_size: Annotated[int, Option("tokens of one KV page", bounds=ONE_OR_MORE)] = 1
    kv_cache_tokens: Annotated[
        int | None,
        Option("tokens that the KV pool holds; as --kv-memory-fraction allows if not given", bounds=ONE_OR_MORE),
    ] = None
    # None: see `KV_MEMORY_FRACTIONS`; resolved by `kv_cache_size.kv_memory_fraction`, which knows the device.
    kv_memory_fraction: Annotated[
        float | None,
        Option(
            "share for the KV pool of the memory that is free once the weights are loaded; "
            f"{KV_MEMORY_FRACTIONS['cuda']} on CUDA and {KV_MEMORY_FRACTIONS['cpu']} on CPU if not given",
            bounds=Bounds(above=0, below=1),
        ),
    ] = None
    max_running_requests: Annotated[int, Option("requests that run, for each dp rank", bounds=ONE_OR_MORE)] = 64
    max_waiting_requests: Annotated[int, Option("more than these are refused with 503", bounds=ONE_OR_MORE)] = 4096
    chunked_prefill_size: Annotated[
        int,
        Option(
            "prompt tokens that one step computes at most, over all requests; -1: whole prompts",
            bounds=Bounds(at_least=1, also=-1),
        ),
    ] = 2048
    enable_prefix_cache: Annotated[bool, Option("compute every prompt anew", "disable-prefix-cache")] = True
    overlap_depth: Annotated[
        int, Option("steps that may be in flight while the next one is planned", choices=(0, 1))
    ] = 1
    enable_return_routed_experts: Annotated[bool, Option("record routes, for requests that ask for them")] = False
    enable_return_router_weights: Annotated[
        bool, Option("record the combine weights beside the routes, for requests that ask for them")
    ] = False
    router_weights_dtype: Annotated[
        str,
        Option(
            "of recorded combine weights; auto is the one that the experts' outputs are weighed in, float32 in place of "
            "float16; bfloat16 rounds others to the nearest, ties to even",
            choices=ROUTER_WEIGHTS_DTYPES,
        ),
    ] = "auto"
    routing_ring_slots: Annotated[
        int, Option("steps of routes that may wait to be filed before the engine waits", bounds=ONE_OR_MORE)
    ] = 8
    output_processors: Annotated[
        str,
        Option(
            "which file and ship for the dp ranks: one for the engine, or one on each node", choices=OUTPUT_PROCESSORS
        ),
    ] = "engine"
    claim_budget_bytes: Annotated[int, Option("bytes of routes by reference that are kept", bounds=ZERO_OR_MORE)] = (
        1 << 30
    )
    claim_ttl_s: Annotated[float, Option("seconds that routes by reference are kept", bounds=ZERO_OR_MORE)] = 600.0
    route_sessions: Annotated[
        int,
        Option(
            "sessions of which is remembered what rows their callers have, for routed_experts_start_len='auto'",
            bounds=ZERO_OR_MORE,
        ),
    ] = 16_384
    route_session_tokens: Annotated[
        int,
        Option(
            "tokens that are remembered for that, four bytes each, all sessions together; a branch counts as 100",
            bounds=ZERO_OR_MORE,
        ),
    ] = 1 << 24
    num_threads: Annotated[
        int | None,
        Option(
            "CPU threads of one rank; if not given the cores that it is bound to, or that the node's ranks share",
            bounds=ONE_OR_MORE,
        ),
    ] = None
    cpu_threads_bind: Annotated[
        str | None,
        Option(
            "cores, as 0-3, that each rank of a node keeps to, one group a rank; the engine's other processes keep to "
            "those of no rank, if there are any; nothing is bound if not given",
            metavar="CORES|CORES",
        ),
    ] = None
    weight_version: Annotated[str, Option("what the weights are called until an update")] = "default"
    weight_sync_timeout_s: Annotated[
        float,
        Option(
            "seconds for an update group to come together, a transfer to go on, an update to bring its next tensor",
            bounds=Bounds(above=0, below=1e6),
        ),
    ] = 300.0
    weight_sync_groups: Annotated[
        int, Option("update groups at once, joined or still to come together", bounds=ONE_OR_MORE)
    ] = 8
    weight_sync_hosts: Annotated[
        tuple[str, ...] | None,
        Option(
            "names, addresses and networks at which update groups may be joined; anywhere if not given",
            metavar="HOST,...",
        ),
    ] = None
    disaggregation: Annotated[
        str,
        Option(
            "of requests with a bootstrap_room: prefill computes prompts for another engine, decode goes on with them; "
            "both have the same WAYBILL_RUN_SECRET; none: they are refused",
            choices=DISAGGREGATION,
        ),
    ] = "none"
    disaggregation_host: Annotated[
        str, Option("address of this node at which a prefill's side listens for others", metavar="ADDRESS")
    ] = "127.0.0.1"
    disaggregation_bootstrap_port: Annotated[
        int,
        Option(
            "port at which a prefill's side listens for others, and at which they look for it where a request names none; "
            "it takes free ones beside it",
            bounds=Bounds(at_least=1, at_most=2**16 - 1),
        ),
    ] = 8998
    disaggregation_allowed_hosts: Annotated[
        tuple[str, ...] | None,
        Option(
            "names, addresses and networks beside loopback that a request's bootstrap_host may be, of a decode's side; "
            "loopback alone if not given",
            metavar="HOST,...",
        ),
    ] = None
    disaggregation_transport: Annotated[
        str,
        Option(
            "how keys and values go from one side to the other: shared, by memory that both map, within a host; tcp; nixl, "
            "over UCX, neither encrypted nor authenticated; auto: shared where both sides can, else tcp",
            choices=DISAGGREGATION_TRANSPORTS,
        ),
    ] = "auto"
    disaggregation_timeout_s: Annotated[
        float,
        Option(
            "seconds that a prompt may take from one side to the other, on either side",
            bounds=Bounds(above=0, below=1e6),
        ),
    ] = 60.0
    encoder: Annotated[
        str | None,
        Option(
            "where `torchrun.sh encode` encodes the images of this model's prompts; both have the same WAYBILL_RUN_SECRET; "
            "images are refused if not given",
            metavar="HOST:PORT",
        ),
    ] = None
    encoder_timeout_s: Annotated[
        float, Option("seconds that an image may take to be encoded", bounds=Bounds(above=0, below=1e6))
    ] = 60.0
    image_memory_bytes: Annotated[
        int, Option("bytes of encoded images that are kept in shared memory", bounds=ONE_OR_MORE)
    ] = 1 << 30
    heartbeat_timeout_s: Annotated[
        float,
        Option(
            "seconds after which a stopped process is killed and the run ends", bounds=Bounds(at_least=2, at_most=1e6)
        ),
    ] = 20.0
    log_level: Annotated[str, Option("what is logged", choices=LOG_LEVELS)] = "warning"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size

    def __post_init__(self) -> None:
        for name, field in ENGINE_OPTIONS.items():
            field.option.check(name, getattr(self, name))
        # What concerns several fields.
        if self.moe_dispatcher == "all_to_all" and self.moe_split != "ep":
            raise ValueError(
                "moe_dispatcher='all_to_all': needs moe_split='ep'; a slice of every expert is on every rank"
            )
        if self.enable_return_router_weights and not self.enable_return_routed_experts:
            raise ValueError(
                "enable_return_router_weights: needs enable_return_routed_experts, they stand beside the routes"
            )
        if self.routing_ring_slots <= self.overlap_depth:
            raise ValueError(f"routing_ring_slots={self.routing_ring_slots}: must be more than overlap_depth")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.page_size:
            raise ValueError(f"kv_cache_tokens={self.kv_cache_tokens}: must hold at least one page of {self.page_size}")
        if self.disaggregation != "none" and self.output_processors != "engine":
            raise ValueError("output_processors='node': must be 'engine' with disaggregation")
        if self.encoder is not None:
            check_host_port(self.encoder)
        if self.cpu_threads_bind is not None:
            check_core_groups(self.cpu_threads_bind, self.num_threads)
        if self.weight_sync_hosts is not None:
            check_allowed_hosts("weight_sync_hosts", self.weight_sync_hosts)
        if self.disaggregation_allowed_hosts is not None:
            check_allowed_hosts("disaggregation_allowed_hosts", self.disaggregation_allowed_hosts)


def check_host_port(place: str) -> None:
    """
    Raises:
        ValueError: it does not say where an encoder is.
    """
    if (
        not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}", place)
        or not 0 < int(place.rpartition(":")[2]) < 2**16
    ):
        raise ValueError(f"encoder={place!r}: must be HOST:PORT, an IPv6 host in brackets")


ENGINE_OPTIONS = option_fields(EngineConfig)
