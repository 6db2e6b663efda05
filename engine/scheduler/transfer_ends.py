"""Requests that wait for the other side no longer: one whose prompt has arrived goes on as if it had been computed here,
the others end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..grammar.mask_maker import MaskMaker
from ..io_struct import FinishReason, FirstToken, ReqTransferred, TokenOutput
from .page_manager import PageManager
from .req import Req
from .step_committer import StepCommitter
from .step_recorder import StepRecorder
from .transfers import Settled


class Steps(Protocol):
    """Those in flight."""

    def commit_all(self) -> None: ...


class TransferEnds:
    def __init__(
        self,
        steps: Steps,
        pages: PageManager,
        committer: StepCommitter,
        recorder: StepRecorder,
        mask_maker: MaskMaker | None,
    ) -> None:
        self._steps = steps
        self._pages = pages
        self._committer = committer
        self._recorder = recorder
        self._mask_maker = mask_maker

    def apply(self, settled: Sequence[Settled]) -> None:
        for one in settled:
            if one.first is not None:
                self._go_on(one.req, one.first)
            else:
                assert one.reason is not None
                self.end(one.req, one.reason)

    def end(self, req: Req, reason: FinishReason) -> None:
        """One that was aborted may have a part in a step in flight."""
        if reason.type != "abort":
            req.finish_reason = reason
            self._recorder.note_finished(self._committer.finish(req))
            return
        self._steps.commit_all()
        if req.finish_reason is None:
            req.finish_reason = reason
            self._recorder.record_idle([self._committer.finish(req)])

    def _go_on(self, req: Req, first: FirstToken) -> None:
        """With the token that the prefill has sampled; the next step is its first one here. Nothing in flight has a part of
        it, so that nobody waits."""
        own = self._recorder.weight_version
        if first.weight_version != own:
            message = f"weight_version: the prefill's side ran with {first.weight_version!r}, this one has {own!r}"
            self.end(req, FinishReason.failed(f"{message}; weights of both sides are to be updated together"))
            return
        new_pages = req.held.pages[req.num_cached // self._pages.page_size :].tobytes()
        req.num_cached = req.num_scheduled = req.num_committed = req.num_prompt_tokens
        req.output_ids.extend(first.token_ids)
        req.append(first.token_ids)
        req.num_sampled = len(first.token_ids)
        # The prefill has scored the prompt.
        req.num_scored = req.num_prompt_tokens
        if req.constraint is not None and self._mask_maker is not None:
            self._mask_maker.advance([(req.constraint, token_id) for token_id in first.token_ids])
        reason = self._committer.check_stop(req)
        output = TokenOutput(req.rid, first.token_ids, first.logprobs)
        # The caller has not to wait for the next step with its first token.
        self._recorder.note(ReqTransferred(req.rid, new_pages, first.weight_version, output, reason))
        self._recorder.send_soon()
        if reason is None:
            self._pages.offer_full_pages(req)
        else:
            req.finish_reason = reason
            self._committer.finish(req)
