"""Set-up that must come before any import of Triton: without a GPU its kernels run in its interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel, also one of Triton's own library, is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
