"""Memory of a GPU in another process: what a trainer's process holds, by plain data alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from waybill.engine.control.tensor_buckets import CudaIpcMemory
from waybill.engine.weight_sync.colocated import FlattenedTensorBucket, describe
from waybill.engine.weight_sync.cuda_ipc import device_of

pytestmark = pytest.mark.gpu

READER = """
import sys
from waybill.engine.control.tensor_buckets import parse_bucket
from waybill.engine.weight_sync.cuda_ipc import device_of, foreign_memory
bucket = parse_bucket(sys.stdin.read())
memory = bucket.memory
with foreign_memory(memory.handle_bytes, memory.offset, bucket.num_bytes, device_of(memory.device_uuid)) as data:
    print(data.cpu().numpy().tobytes().hex())
try:
    with foreign_memory(memory.handle_bytes, memory.offset, 1 << 50, device_of(memory.device_uuid)):
        pass
except RuntimeError as error:
    print(error)
"""


def test_another_process_reads_what_is_there() -> None:
    device = torch.device("cuda", 0)
    around = torch.zeros(1000, device=device)
    tensors = [("a", torch.arange(7.0, device=device)), ("b", torch.ones(3, device=device).bfloat16())]
    bucket = FlattenedTensorBucket(tensors)
    described = describe(bucket.flattened_tensor, bucket.metadata)
    assert isinstance(described.memory, CudaIpcMemory)
    command = [sys.executable, "-c", READER]
    read = subprocess.run(command, input=described.encode(), capture_output=True, text=True, check=True, timeout=120)
    found, refusal = read.stdout.splitlines()
    assert found == bucket.flattened_tensor.cpu().numpy().tobytes().hex()
    assert "of an allocation of" in refusal
    assert (around == 0).all()


def test_a_device_that_nobody_has() -> None:
    with pytest.raises(RuntimeError, match="device_uuid='nobody'"):
        device_of("nobody")
