"""A rank's part in transfers: the thread that serves its pages to another engine, or fetches them from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import msgspec
import zmq

from ...parallel.collectives import gather_bytes
from ...parallel.mesh import ParallelMesh
from ..config import EngineConfig
from ..ipc.frontend_messages import FrontendMessage, TransferNotice
from ..ipc.sockets import Endpoint, Sender
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from ..models.model_config import GroupedQueryConfig, ModelConfig, RopeConfig
from ..plan import PageTransfers
from .mapped_pool import MappedPool, SharedExport
from .nixl_agent import NixlAgent
from .nixl_pool import NixlExport, NixlReader
from .page_client import FetchedPrompts, RankShape, page_address
from .page_copy import make_page_copy
from .page_server import SharedPrompts
from .place import TransferPlace
from .pool_export import ExportedMemory, PoolExport
from .remote_pool import OpenPool
from .remote_pools import RemotePools
from .transfer_client import TransferClient
from .transfer_server import TransferServer
from .wire import Release, Welcome

RELEASED = "released"


@dataclass(frozen=True)
class RankPool:
    """A rank's pages, of what model they are, and its place among the others."""

    kv_store: KVStore
    specs: Sequence[KVTensorSpec]
    model: ModelConfig
    mesh: ParallelMesh

    @property
    def num_kv_heads(self) -> int:
        """Of all ranks together; 0 where there are latents."""
        attention = self.model.attention
        return attention.num_kv_heads if isinstance(attention, GroupedQueryConfig) else 0

    def facts(self, config: EngineConfig) -> dict[str, str]:
        """What must be alike in engines that share pages: all that keys, values and routes follow from but the weights."""
        model = self.model
        attention = msgspec.structs.asdict(model.attention) | {"rope": rope_facts(model.attention.rope)}
        facts = {
            "model_type": model.model_type,
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            "vocab_size": model.vocab_size,
            "dtype": model.dtype_name,
            "rms_norm_eps": model.rms_norm_eps,
            "kv_cache": ", ".join(f"{spec.name} {spec.width[-1]} {spec.dtype}" for spec in self.specs),
            "enable_return_routed_experts": config.enable_return_routed_experts,
            "enable_return_router_weights": config.enable_return_router_weights,
            "router_weights_dtype": config.router_weights_dtype if config.enable_return_router_weights else "",
            "moe_layers": model.moe.layer_ids,
            **{f"attention.{name}": value for name, value in attention.items()},
            **{f"router.{name}": value for name, value in asdict(model.moe.router).items()},
        }
        return {name: str(value) for name, value in facts.items()}


def rope_facts(rope: RopeConfig) -> str:
    """Short, and the same where the last bits of frequencies are not."""
    first, last, total = (f"{value:.6g}" for value in (rope.inv_freq[0], rope.inv_freq[-1], sum(rope.inv_freq)))
    return (
        f"{len(rope.inv_freq)} frequencies, {first} to {last}, {total} in all, scaled by {rope.attention_scaling:.6g}"
    )


def make_page_transfers(
    config: EngineConfig, pool: RankPool, place: TransferPlace | None, leader: Endpoint
) -> PageTransfers | None:
    """Starts the rank's thread. All ranks of a prefill's side call it at the same time."""
    if place is None:
        return None
    copy, facts = make_page_copy(pool.kv_store, config.page_size, pool.mesh.device), pool.facts(config)
    notify = notifier(leader)
    if place.listen is None:
        shape = RankShape(pool.mesh.tp.rank, pool.mesh.tp.size, pool.num_kv_heads)
        pools = RemotePools(make_opener(config, pool), config.disaggregation_transport)
        client = TransferClient(place.keys, facts, lambda welcome, source: page_address(welcome, source)[0], pools)
        client.start()
        return FetchedPrompts(client, shape, copy, pools, notify)

    def on_release(message: Release) -> None:
        notify(TransferNotice(message.key, RELEASED, error=message.error))

    export = make_export(config, pool)
    prompts = SharedPrompts(copy, on_release, export, config.disaggregation_transport)
    welcome = _welcome(pool.mesh, place)
    server = TransferServer(
        place.listen,
        welcome.incarnation,
        prompts,
        config.disaggregation_timeout_s,
        welcome=welcome if pool.mesh.world.rank == 0 else None,
        facts=facts,
        pool_generation=prompts.pool_generation,
    )
    prompts.wake = server.wake
    if export is not None:
        export.has_holders = server.has_holders
    server.start()
    return prompts


def make_opener(config: EngineConfig, pool: RankPool) -> OpenPool:
    """How a rank of a decode's side reaches pools.

    Raises:
        NixlError: it is to be by NIXL, which is not there.
    """
    if config.disaggregation_transport == "nixl":
        return NixlReader(pool.kv_store, config.page_size, NixlAgent(pool.mesh.device)).open
    return partial(MappedPool, kv_store=pool.kv_store, page_size=config.page_size)


def make_export(config: EngineConfig, pool: RankPool) -> PoolExport | None:
    """How others reach the pool of a rank of a prefill's side; None: not at all.

    Raises:
        NixlError: it is to be by NIXL, which is not there.
    """
    if config.disaggregation_transport == "tcp":
        return None
    memory: ExportedMemory = (
        NixlExport(pool.kv_store, partial(NixlAgent, pool.mesh.device))
        if config.disaggregation_transport == "nixl"
        else SharedExport(pool.kv_store)
    )
    return PoolExport(pool.kv_store, config.page_size, memory)


def _welcome(mesh: ParallelMesh, place: TransferPlace) -> Welcome:
    assert place.listen is not None
    own = msgspec.json.encode((place.listen.address, place.routes, place.incarnation))
    told = [msgspec.json.decode(each, type=tuple[str, str, str]) for each in gather_bytes(own, mesh.world)]
    addresses, tp_size = [address for address, _, _ in told], mesh.tp.size
    pages = [addresses[first : first + tp_size] for first in range(0, len(addresses), tp_size)]
    return Welcome(told[0][2], pages, told[0][1])


def notifier(leader: Endpoint | str) -> Callable[[TransferNotice], None]:
    """Tells a leader; for one thread, and in a context of its own, which lasts as long as that."""
    sender: Sender[FrontendMessage] = Sender(zmq.Context(), leader)
    return sender.send
