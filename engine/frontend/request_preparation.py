"""From a checked body to samples that can be sent: permits, tokens, checks against the engine; what grows with the prompt
happens off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..ipc.frontend_messages import TokenizedGenerateReqInput
from .admission import Admission, OverloadedError, Permits
from .generate_request import GenerateReqInput, SampleRequest, expand
from .request_limits import EngineLimits
from .request_observer import RequestObserver
from .text_codec import TextCodec
from .work_threads import WorkThreads


@dataclass(frozen=True)
class PreparedRequest:
    """A request that fits the engine. It holds its permits until `release`, which whoever prepared it must call however it
    ends; a generation that has begun does so itself."""

    request: GenerateReqInput
    samples: Sequence[SampleRequest]
    permits: Permits

    def release(self) -> None:
        self.permits.release()


class RequestPreparation:
    """Prepares requests, each on the threads that its length asks for."""

    def __init__(
        self, text: TextCodec, work_threads: WorkThreads, admission: Admission, observer: RequestObserver
    ) -> None:
        self._text = text
        self._work_threads = work_threads
        self._admission = admission
        self._observer = observer

    @property
    def num_held(self) -> int:
        """Samples that have a permit: from before they are tokenised until they end."""
        return self._admission.num_taken

    async def prepare(self, request: GenerateReqInput, limits: EngineLimits) -> PreparedRequest:
        """
        Raises:
            ValueError: it does not fit; the message names the field and its range.
            OverloadedError: there is no permit for it.
        """
        try:
            permits = self._admission.take(request.num_samples)
            try:
                encode = partial(self._text.encode, max_tokens=limits.context_length)
                groups = await self._work_threads.run(request.cost_us, partial(expand, request, limits, encode))
            except BaseException:
                permits.release()
                raise
        except OverloadedError:
            self._observer.on_refusal("overloaded")
            raise
        except ValueError:
            self._observer.on_refusal("refused")
            raise
        return PreparedRequest(request, [sample for group in groups for sample in group], permits)


def tokenized_request(
    request: GenerateReqInput, sample: SampleRequest, input_ids: bytes, seq: int
) -> TokenizedGenerateReqInput:
    """What a leader is sent; `input_ids` as int32 bytes."""
    return TokenizedGenerateReqInput(
        seq=seq,
        rid=sample.rid,
        input_ids=input_ids,
        sampling_params=sample.sampling_params,
        output_options=sample.output_options,
        priority=request.priority,
        extra_key=request.cache_partition,
    )
