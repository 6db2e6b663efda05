"""How much memory there is, and how many KV pages it gives.

`kv_cache_tokens` and `kv_memory_fraction` decide it (vLLM: num_gpu_blocks, gpu_memory_utilization; sglang:
max_total_num_tokens, mem_fraction_static).
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from ...parallel.collectives import all_gather
from ...parallel.mesh import ParallelMesh
from ..config import KV_MEMORY_FRACTIONS, EngineConfig
from ..kv_cache.kv_store import KVStore, KVTensorSpec
from ..kv_cache.page_pool import pages_for

KIBIBYTE = 1024


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device: free GPU memory, or what the kernel calls available."""
    if device.type == "cuda":
        # What loading has left with torch's allocator is free as well.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIBIBYTE
    raise AssertionError("/proc/meminfo has no MemAvailable line")


def peak_rss_bytes() -> int:
    """Most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE


def kv_memory_fraction(config: EngineConfig, device: torch.device) -> float:
    """As configured, or the device's own."""
    if config.kv_memory_fraction is not None:
        return config.kv_memory_fraction
    return KV_MEMORY_FRACTIONS["cuda" if device.type == "cuda" else "cpu"]


def kv_pool_pages(
    config: EngineConfig, context_length: int, specs: Sequence[KVTensorSpec], num_layers: int, mesh: ParallelMesh
) -> int:
    """Pages of the KV pool: as configured, or what `kv_memory_fraction` of the memory holds, the same on every rank.

    Raises:
        ValueError: the memory does not hold one page.
    """
    if config.kv_cache_tokens is not None:
        return pages_for(config.kv_cache_tokens, config.page_size)
    # The fraction is of what is free now: weights and CUDA context are there. The rest is for what follows the pool: the
    # page table, the private pools of the decode and prefill graphs, activations and logits of steps outside of graphs,
    # workspaces of cuBLAS and NCCL, and the buckets of a weight update.
    fraction = kv_memory_fraction(config, mesh.device)
    # Ranks of one host without devices of their own share its memory.
    sharers = mesh.node.size if mesh.device.type == "cpu" else 1
    budget = int(available_bytes(mesh.device) * fraction) // sharers
    page_bytes = KVStore.bytes_per_token(num_layers, specs) * config.page_size
    # More than every running request at full length is never used.
    wanted = config.max_running_requests * pages_for(context_length, config.page_size)
    mine = torch.tensor([min(budget // page_bytes, wanted)], device=mesh.device)
    num_pages = int(all_gather(mine, mesh.world).min())
    if num_pages < 1:
        raise ValueError(f"kv_memory_fraction={fraction}: {budget} bytes do not hold one KV page")
    return num_pages
