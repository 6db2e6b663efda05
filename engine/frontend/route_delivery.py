"""What a session's answers bring to its caller, until the caller has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..io_struct import RequestOutput
from .sample_request import SampleRequest
from .session_routes import SessionRoutes


class _OnItsWay:
    """One sample's tokens, and the rows [start, end) that came with them."""

    def __init__(self, sample: SampleRequest) -> None:
        self._input_ids = sample.keys
        self._output_ids: list[int] = []
        self.start = self._end = sample.output_options.routed_experts_start_len

    def add(self, output: RequestOutput) -> None:
        self._output_ids += output.token_ids
        meta = output.routed_experts
        # A stream of rows goes on where it was; rows that were missing leave a gap, behind which nothing counts.
        if meta is not None and meta.start == self._end:
            self._end += meta.rows

    def tokens(self) -> np.ndarray:
        """int32, those whose rows the caller then has, if it had those before `start`."""
        tokens = np.concatenate([self._input_ids, np.array(self._output_ids, dtype=np.int32)])
        return tokens[: self._end].astype(np.int32)


class RouteDelivery:
    """The samples of one request of a session. Until `delivered` the session knows nothing of them."""

    def __init__(self, sessions: SessionRoutes, session_id: str, samples: Sequence[SampleRequest]) -> None:
        self._sessions = sessions
        self._session_id = session_id
        self._samples = {sample.rid: _OnItsWay(sample) for sample in samples if sample.is_auto}

    def add(self, output: RequestOutput) -> None:
        """An output has become a part of the answer."""
        if output.rid in self._samples:
            self._samples[output.rid].add(output)

    def delivered(self) -> None:
        """The caller has the answer. A prompt's first sample comes first, whose rows the others refer to."""
        for sample in self._samples.values():
            self._sessions.add(self._session_id, sample.tokens(), sample.start)
