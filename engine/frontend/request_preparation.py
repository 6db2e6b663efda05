"""From a checked body to samples that can be sent: permits, tokens, checks against the engine; what grows with the prompt
happens off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..ipc.frontend_messages import TokenizedGenerateReqInput
from ..validation.field_error import FieldError
from .admission import Admission, OverloadedError, Permits
from .generate_request import GenerateReqInput, expand
from .grammar_checks import GrammarChecks
from .prompt_images import PinnedImages, PromptImages
from .request_limits import EngineLimits
from .request_observer import RequestObserver
from .route_delivery import RouteDelivery
from .sample_names import item_rids, name_samples
from .sample_request import SampleRequest
from .session_routes import SessionRoutes
from .text_codec import TextCodec
from .waiting_requests import WaitingRequest, WaitingRequests
from .work_threads import WorkThreads


@dataclass(frozen=True)
class PreparedRequest:
    """A request that fits the engine. It holds its permits until `release`, which whoever prepared it must call however it
    ends; a generation that has begun does so itself."""

    request: GenerateReqInput
    samples: Sequence[SampleRequest]
    permits: Permits
    waiting: WaitingRequest
    # Of a request whose session says where its rows begin.
    delivery: RouteDelivery | None = None
    images: PinnedImages | None = None

    def release(self) -> None:
        self.waiting.end()
        self.permits.release()
        if self.images is not None:
            self.images.release()

    def delivered(self) -> None:
        """The caller has the answer, to its end."""
        if self.delivery is not None:
            self.delivery.delivered()


class RequestPreparation:
    """Prepares requests, each on the threads that its length asks for."""

    def __init__(
        self,
        text: TextCodec,
        work_threads: WorkThreads,
        admission: Admission,
        observer: RequestObserver,
        grammars: GrammarChecks,
        sessions: SessionRoutes,
        waiting: WaitingRequests,
    ) -> None:
        self._text = text
        self._work_threads = work_threads
        self._admission = admission
        self._observer = observer
        self._grammars = grammars
        self._sessions = sessions
        self._waiting = waiting
        # Where there is an encoder, once it is known what for.
        self.images: PromptImages | None = None

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
            waiting, images = None, None
            try:
                rids = item_rids(request)
                waiting = self._waiting.begin(name_samples(request, rids))
                if request.has_images:
                    # Where all is aborted first, there is an answer without them.
                    pinning = self._pin_images(request, limits.disaggregation)
                    images = await waiting.unless_aborted(pinning, PinnedImages.release)
                encode = partial(
                    self._text.encode,
                    max_tokens=limits.context_length,
                    split_special_tokens=request.split_special_tokens,
                )
                by_prompt = () if images is None else images.by_prompt
                expanding = partial(expand, request, limits, encode, self._sessions.num_delivered, by_prompt, rids)
                groups = await self._work_threads.run(request.cost_us, expanding)
                await self._check_grammars(request, groups, limits)
            except BaseException:
                if waiting is not None:
                    waiting.end()
                permits.release()
                if images is not None:
                    images.release()
                raise
        except OverloadedError:
            self._observer.on_refusal("overloaded")
            raise
        except ValueError:
            self._observer.on_refusal("refused")
            raise
        samples = [sample for group in groups for sample in group]
        delivery = None
        if any(sample.is_auto for sample in samples):
            assert request.affinity is not None, "checked with the fields"
            delivery = RouteDelivery(self._sessions, request.affinity, samples)
        return PreparedRequest(request, samples, permits, waiting, delivery, images)

    async def _pin_images(self, request: GenerateReqInput, disaggregation: str) -> PinnedImages:
        """
        Raises:
            ValueError, OverloadedError, UnavailableError: as `PromptImages.pin`.
        """
        if self.images is None:
            who = "an engine that is started with --encoder HOST:PORT"
            if disaggregation != "none":
                who = f"--encoder HOST:PORT on both sides, and the {disaggregation}'s has none"
            raise FieldError(f"image_data: images need {who}", "image_data")
        return await self.images.pin(request)

    async def _check_grammars(
        self, request: GenerateReqInput, groups: list[list[SampleRequest]], limits: EngineLimits
    ) -> None:
        """
        Raises:
            ValueError: a grammar cannot be compiled, or not within its bounds.
        """
        params = request.params_by_item
        checked: set[str] = set()
        for index, group in enumerate(groups):
            field = params[index if len(params) > 1 else 0].grammar_field
            # Samples of one prompt have one, and often all prompts.
            grammar = group[0].sampling_params.grammar
            if field is None or grammar in checked:
                continue
            checked.add(grammar)
            refusal = await self._grammars.check(grammar, limits.vocab_size)
            if refusal:
                error = FieldError(f"{field}: {refusal}", field)
                raise error.of_item(index) if request.is_batch else error


def tokenized_request(
    request: GenerateReqInput, sample: SampleRequest, input_ids: bytes, cache_ids: bytes, seq: int
) -> TokenizedGenerateReqInput:
    """What a leader is sent; ids as int32 bytes."""
    return TokenizedGenerateReqInput(
        seq=seq,
        rid=sample.rid,
        input_ids=input_ids,
        sampling_params=sample.sampling_params,
        output_options=sample.output_options,
        priority=request.priority,
        extra_key=request.cache_partition,
        transfer=sample.transfer,
        images=list(sample.images),
        cache_ids=b"" if sample.cache_ids is None else cache_ids,
    )
