"""What of a step is the same on all ranks, and what its tokens are drawn by."""

from __future__ import annotations

from collections.abc import Sequence

from waybill.engine.io_struct import OutputOptions, SamplingParams, Segment
from waybill.engine.ipc.frontend_messages import TokenizedGenerateReqInput
from waybill.engine.plan import Draw, GraphSizes, ScheduledReq, StepShape
from waybill.engine.scheduler.agreement import Agreement, ForwardMode, Proposal
from waybill.engine.scheduler.leader_setup import DpRankInfo
from waybill.engine.scheduler.req import Req
from waybill.engine.scheduler.step_planner import PlannedReq, StepPlan, plain_draws
from waybill.engine.vision.placed_image import PlacedImage

SIZES = GraphSizes(decode=(1, 2, 4), prefill=(64, 128))
PROMPT = 6


def agreed(*parts: tuple[int, ForwardMode]) -> Agreement:
    return Agreement(tuple(Proposal(num_tokens=num_tokens, mode=mode) for num_tokens, mode in parts))


def test_the_shape_of_a_step_follows_from_all_proposals() -> None:
    two_of_two = DpRankInfo(0, 2, 2, graph_sizes=SIZES)
    assert two_of_two.shape_of(agreed((5, ForwardMode.DECODE), (0, ForwardMode.IDLE))) == StepShape(4, True)
    # Beyond the largest graph of decodes one of prefills serves.
    assert two_of_two.shape_of(agreed((9, ForwardMode.DECODE), (1, ForwardMode.DECODE))) == StepShape(64, True)
    assert two_of_two.shape_of(agreed((2, ForwardMode.DECODE), (130, ForwardMode.PREFILL))) == StepShape(128, False)
    assert two_of_two.shape_of(agreed((2, ForwardMode.DECODE), (999, ForwardMode.PREFILL))) == StepShape(500, False)
    without = DpRankInfo(0, 2, 1)
    assert without.shape_of(agreed((3, ForwardMode.DECODE), (1, ForwardMode.DECODE))) == StepShape(3, True)
    alone = DpRankInfo(graph_sizes=SIZES)
    assert alone.shape_of(agreed((3, ForwardMode.DECODE))) == StepShape(0, True)
    assert alone.shape_of(agreed((3, ForwardMode.PREFILL))) == StepShape(0, False)
    # Tokens of images on any rank: no graph on any, so nothing is padded to one's size.
    assert two_of_two.shape_of(agreed((3, ForwardMode.DECODE), (5, ForwardMode.IMAGES))) == StepShape(3, False, True)
    assert alone.shape_of(agreed((1, ForwardMode.IMAGES))) == StepShape(0, False, True)


def planned(
    start: int,
    num_tokens: int,
    *,
    sample: bool,
    logprob: bool = False,
    top: int = 0,
    images: Sequence[PlacedImage] = (),
    **params: object,
) -> PlannedReq:
    """Of a request whose prompt has `PROMPT` tokens."""
    recv = TokenizedGenerateReqInput(
        seq=1,
        rid="r",
        input_ids=bytes(4 * PROMPT),
        sampling_params=SamplingParams(**params),  # type: ignore[arg-type]
        output_options=OutputOptions(return_logprob=logprob, top_logprobs_num=top),
    )
    req = Req(recv, tokens=bytearray(4 * PROMPT))
    scheduled = ScheduledReq(0, start, num_tokens, b"", 0, b"", sample, images=list(images))
    return PlannedReq(req, Segment("r", start, num_tokens, b""), scheduled)


def test_a_step_is_a_decode_if_each_request_brings_one_token_and_samples() -> None:
    decode, last, chunk = (planned(9, 1, sample=True), planned(5, 1, sample=True), planned(4, 1, sample=False))
    assert StepPlan().mode == ForwardMode.IDLE
    assert StepPlan([decode, last]).mode == ForwardMode.DECODE
    assert StepPlan([decode, chunk]).mode == ForwardMode.PREFILL
    assert StepPlan([decode, planned(3, 3, sample=True)]).mode == ForwardMode.PREFILL


def test_a_prompt_whose_last_token_is_an_images_is_no_decode() -> None:
    """All but that token were found in the cache: it looks like a decode, whose graph knows nothing of images."""
    image = PlacedImage(1, 4, 1, 2, 4, "/nowhere", 0, "float32")
    last = planned(5, 1, sample=True, images=[image])
    decode = planned(9, 1, sample=True)
    assert StepPlan([decode, last]).mode == ForwardMode.IMAGES
    batch = StepPlan([decode, last]).to_batch(3, DpRankInfo().shape_of(agreed((2, ForwardMode.IMAGES))))
    assert batch.has_images and not batch.is_decode
    assert SIZES.choose(2, is_decode=batch.is_decode, has_images=batch.has_images) is None


def test_draws_are_of_requests_that_ask_for_a_temperature_alone() -> None:
    random = planned(9, 1, sample=True, temperature=0.7, sampling_seed=5)
    greedy = planned(3, 3, sample=True, temperature=0.0, logprob=True)
    chunk = planned(0, 3, sample=False, top_p=0.5)
    assert plain_draws([random, chunk, greedy]) == [Draw(0.7, 5, 4), Draw(0.0, 0, 0, True)]
    for asked in (
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"logit_bias": {1: 1.0}},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"min_new_tokens": 9},
        {"logprob": True, "top": 2},
    ):
        assert plain_draws([random, planned(5, 1, sample=True, **asked)]) == [], asked
    # Its stop tokens were banned long enough; of one token nothing is filtered.
    assert plain_draws([planned(9, 1, sample=True, min_new_tokens=4, sampling_seed=1)]) == [Draw(1.0, 1, 4)]
    assert plain_draws([planned(9, 1, sample=True, top_k=1, top_p=0.5)]) == [Draw(0.0, 0, 4)]
    assert plain_draws([chunk]) == []


# Options that change no token of a request whose neighbours ask for a temperature alone: when it ends, and the draw itself.
OF_PLAIN_REQUESTS = {
    "max_new_tokens",
    "min_new_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "temperature",
    "sampling_seed",
}


def test_every_option_of_the_sampler_is_known_to_draws_or_makes_a_request_not_plain() -> None:
    """A new one that is not sorted here would be ignored where all neighbours are plain."""
    of_others = {"top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"}
    of_others |= {"grammar", "allowed_token_ids"}
    assert set(SamplingParams.__struct_fields__) == OF_PLAIN_REQUESTS | of_others | {"grammar_begins_after"}
    values: dict[str, object] = {
        "grammar": "start: /a/",
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.2,
        "logit_bias": {1: 1.0},
        "allowed_token_ids": [1],
    }
    for name in of_others:
        assert planned(9, 1, sample=True, **{name: values.get(name, 0.5)}).req.plain is None, name
