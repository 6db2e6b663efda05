"""A rank of a benchmark's engine: `waybill.launch.worker`, with a tap on its leader (`step_log`) and, where routing is on,
the inline finish of other engines at hand (`inline_finish`). torchrun starts this file; `tapped_engine` asks it to.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from inline_finish import InlineFinish
from step_log import StepTap, log_file

from waybill.engine import replica
from waybill.engine.scheduler.scheduler import Scheduler
from waybill.launch import worker

LOG_FOLDER = "WAYBILL_BENCH_LOG_FOLDER"
WITH_INLINE = "WAYBILL_BENCH_WITH_INLINE"

make_scheduler = replica.make_scheduler


def make_tapped_scheduler(rank: replica.Rank, *wiring: Any) -> Scheduler[Any]:
    scheduler = make_scheduler(rank, *wiring)
    dp_rank, page_size = rank.mesh.dp.rank, rank.config.page_size
    if os.environ[WITH_INLINE] == "1" and dp_rank == 0:
        assert rank.geometry is not None
        InlineFinish(rank.num_pages * page_size, rank.geometry).install(scheduler, page_size)
    StepTap(scheduler, log_file(os.environ[LOG_FOLDER], dp_rank), time.monotonic).install()
    return scheduler


if __name__ == "__main__":
    replica.make_scheduler = make_tapped_scheduler
    sys.exit(worker.main())
