"""Set-up that must come before any test: threads, and Triton, whose kernels run in its interpreter without a GPU."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of theirs would wait for each other.
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when a kernel, also one of Triton's own library, is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
