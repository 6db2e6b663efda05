"""`python -m waybill.conformance URL`."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main(sys.argv[1:]))
