"""`python -m waybill.rollout --run-dir RUN_DIR`: the frontend process of a rollout; started by rank 0."""

from __future__ import annotations

import sys

from .conversations import main

sys.exit(main())
