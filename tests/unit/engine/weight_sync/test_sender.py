"""The trainer's half by itself: a transfer that nobody can end holds up neither the next one nor the trainer's exit."""

from __future__ import annotations

import subprocess
import sys

import torch

from waybill.engine.weight_sync.sender import may_be_cast

TRAINER = """
import threading
import torch
from waybill.engine.weight_sync import sender as module

class Group:
    def __init__(self, *args):
        pass
    def send_bucket(self, tensors):
        # As NCCL, which connects its ends at the first transfer and waits for an engine that has refused.
        threading.Event().wait()
    def close(self):
        pass

class Engine:
    def get_server_info(self):
        return {"tp_size": 1, "dp_size": 1}
    def init_weights_update_group(self, *args):
        pass
    def update_weights_from_distributed(self, *args, **options):
        raise RuntimeError("no such tensor")
    def destroy_weights_update_group(self, name):
        pass

module.UpdateGroup = Group
sender = module.WeightSender([(Engine(), 1)])
for _ in range(2):
    sender.connect()
    try:
        sender.send([("a", torch.zeros(2))])
    except RuntimeError as error:
        print(error, flush=True)
"""


def test_a_transfer_that_hangs_does_not_keep_the_trainer() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINER], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["weights were not sent: no such tensor"] * 2, done.stderr


def test_what_a_cast_would_spoil_is_left_as_it_is() -> None:
    floats = torch.ones(2)
    assert may_be_cast("model.norm.weight", floats)
    assert not may_be_cast("a.weight", floats.to(torch.float8_e4m3fn)) and not may_be_cast("a.weight_scale_inv", floats)
    assert not may_be_cast("a.mlp.gate.e_score_correction_bias", floats) and not may_be_cast("a.steps", floats.long())
