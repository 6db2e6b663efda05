"""Collectives between real GPUs. One start of processes serves all checks."""

from __future__ import annotations

import pytest
import torch
from distributed.ranks import run_ranks


@pytest.mark.gpu
def test_symmetric_memory_does_what_nccl_does() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    # Triton comes with torch's CUDA builds alone.
    from distributed.gpu_checks import check_symmetric_memory  # noqa: PLC0415

    run_ranks(check_symmetric_memory, 2, backend="cpu:gloo,cuda:nccl")
