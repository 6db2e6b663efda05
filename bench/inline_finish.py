"""What other engines do when a request finishes, on the thread that runs the steps: gather the rows of its whole history by
slot, serialise and encode them. For comparison only; Waybill has none of it.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from waybill.engine.routing.geometry import RouteGeometry
from waybill.engine.scheduler.req import Req
from waybill.engine.scheduler.scheduler import Scheduler

# A request says by the beginning of its rid which of them it wants.
INLINE, INLINE_COMPACT = "inline", "inline_compact"
RID_SEPARATOR = "/"


class InlineFinish:
    """Host stores of the real size, `[slots, moe_layers, top_k]`, int32 and uint8, and the work of each variant."""

    def __init__(self, num_slots: int, geometry: RouteGeometry) -> None:
        shape = (num_slots, geometry.num_moe_layers, geometry.top_k)
        self._compact = np.random.default_rng(0).integers(0, geometry.num_experts, shape, dtype=np.uint8)
        self._wide = self._compact.astype(np.int32)
        self._work: dict[str, Callable[[np.ndarray], bytes]] = {
            INLINE: self.ship_wide,
            INLINE_COMPACT: self.slice_compact,
        }

    def ship_wide(self, slots: np.ndarray) -> bytes:
        """int32 rows of all slots, pickled and in base64."""
        return base64.b64encode(pickle.dumps(self._wide[slots], protocol=5))

    def slice_compact(self, slots: np.ndarray) -> bytes:
        """uint8 rows of all slots, as bytes."""
        return self._compact[slots].tobytes()

    def install(self, scheduler: Scheduler[Any], page_size: int) -> None:
        """Do the work before each finish of a request that asks for it."""
        finish = scheduler.committer.finish

        def inline_finish(req: Req) -> Any:
            work = self._work.get(req.rid.split(RID_SEPARATOR)[0])
            if work is not None:
                work(slots_of(req, page_size))
            return finish(req)

        scheduler.committer.finish = inline_finish  # type: ignore[method-assign]


def slots_of(req: Req, page_size: int) -> np.ndarray:
    """KV slots of a request's inputs, all tokens but the last one sampled."""
    pages = np.asarray(req.held.pages, dtype=np.int64)
    slots = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)
    return slots[: req.seqlen - 1]
