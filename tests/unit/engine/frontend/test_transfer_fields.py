"""The fields of a request that two engines answer: where the other one is, and what both must be asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.expanded_requests import LIMITS, take

from waybill.engine.frontend.request_limits import check_transfer
from waybill.engine.vision.image_store import Room, StoredImage


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_the_decode_answers_with_what_is_known_of_the_prompt(side: str) -> None:
    fields = {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 0}
    limits = replace(LIMITS, disaggregation=side)
    asked = take(limits, **fields, bootstrap_room=1, bootstrap_host="127.0.0.1")[0][0]
    assert asked.returns_prompt == (side == "decode") and asked.output_options.returns_prompt_logprobs
    # Without a room either side is an engine.
    assert take(limits, **fields)[0][0].returns_prompt


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_prompts_of_a_batch_have_rooms_of_their_own(side: str) -> None:
    limits = replace(LIMITS, disaggregation=side)
    fields = {"input_ids": [[1], [2]], "bootstrap_host": "127.0.0.1"}
    with pytest.raises(ValueError, match="item 1: bootstrap_room=5: item 0 has it"):
        take(limits, **fields, bootstrap_room=[5, 5])
    with pytest.raises(ValueError, match=r"item 1: bootstrap_room=9223372036854775808: must lie in 0 .. 2\*\*63 - 1"):
        take(limits, **fields, bootstrap_room=2**63 - 1)
    groups = take(limits, **fields, bootstrap_room=5, sampling_params={"n": 2})
    assert [sample.transfer.key for group in groups for sample in group] == ["5.0", "5.1", "6.0", "6.1"]


def test_a_digest_is_of_what_both_sides_must_be_asked() -> None:
    def digest(side: str, **fields: Any) -> bytes:
        fields = {"input_ids": [1, 2], "bootstrap_room": 5, "bootstrap_host": "127.0.0.1", **fields}
        return take(replace(LIMITS, disaggregation=side), **fields)[0][0].transfer.digest

    same = digest("prefill")
    assert same == digest("decode") == digest("decode", sampling_params={"temperature": 0, "max_new_tokens": 2})
    others = [{"input_ids": [1, 3]}, {"return_logprob": True}, {"return_logprob": True, "logprob_start_len": 0}]
    assert len({same, *(digest("decode", **other) for other in others)}) == 4


def test_a_digest_is_of_images_whose_tokens_are_alike() -> None:
    """And not of the numbers and places that they have on one side."""

    def digest(side: str, *images: StoredImage) -> bytes:
        limits = replace(LIMITS, disaggregation=side, image_token_id=9)
        fields = {"input_ids": [1, 9, 2, 9], "bootstrap_room": 5, "bootstrap_host": "127.0.0.1"}
        return take(limits, images=[images], **fields)[0][0].transfer.digest

    def stored(number: int, content: bytes) -> StoredImage:
        return StoredImage(number, content, 2, 2, "float32", f"/{number}", Room(number, 64))

    one, two = stored(1, b"a"), stored(2, b"b")
    same = digest("prefill", one, two)
    assert same == digest("decode", stored(7, b"a"), stored(6, b"b"))
    assert (
        len({same, digest("decode", two, one), digest("decode", one, one), digest("decode", one, stored(2, b"c"))}) == 4
    )


@pytest.mark.parametrize(
    ("host", "allowed", "is_refused"),
    [
        ("127.0.0.2", (), False),
        ("localhost", (), False),
        ("::1", (), False),
        ("10.1.2.3", ("prefill-0", "10.1.0.0/16"), False),
        ("PREFILL-0", ("prefill-0",), False),
        ("10.2.0.1", ("10.1.0.0/16",), True),
        ("169.254.169.254", (), True),
        ("localhost.evil.example", (), True),
        ("127.0.0.1@evil.example", (), True),
        ("x" * 9999, (), True),
    ],
)
def test_a_decode_connects_to_hosts_that_are_allowed(host: str, allowed: tuple[str, ...], is_refused: bool) -> None:
    limits = replace(LIMITS, disaggregation="decode", bootstrap_hosts=allowed)
    if not is_refused:
        check_transfer(host, None, 1, limits)
        return
    with pytest.raises(ValueError, match="must be loopback or one of --disaggregation-allowed-hosts") as refusal:
        check_transfer(host, None, 1, limits)
    assert len(str(refusal.value)) < 400
    # The other side connects to nobody.
    check_transfer(host, None, 1, replace(limits, disaggregation="prefill"))
