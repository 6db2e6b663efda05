"""Set-up before any test: threads, Hypothesis, and Triton, whose kernels run in its interpreter without a GPU."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# A machine that is busy elsewhere is no fault of the test's.
settings.register_profile("waybill", deadline=None)
settings.load_profile("waybill")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of theirs would wait for each other.
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when a kernel, also one of Triton's own library, is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
