"""Names of a request's samples, known before they are made: aborts come by them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..validation.field_error import FieldError

if TYPE_CHECKING:
    from .generate_request import GenerateReqInput


def item_rids(request: GenerateReqInput) -> list[str]:
    """A name for each prompt: the caller's, or a new one.

    Raises:
        FieldError: the caller's are not one for each, or not different ones.
    """
    num = len(request.prompts)
    if request.rid is None:
        return [uuid.uuid4().hex for _ in range(num)]
    if isinstance(request.rid, str):
        return [request.rid] if not request.is_batch else [f"{request.rid}_{i}" for i in range(num)]
    rids = per_item("rid", request.rid, num)
    if len(set(rids)) != num:
        raise FieldError("rid: the entries must differ", "rid")
    return rids


def sample_rids(rid: str, num_samples: int) -> list[str]:
    """Of the samples of a prompt of this name."""
    return [rid] if num_samples == 1 else [f"{rid}_{sample}" for sample in range(num_samples)]


def name_samples(request: GenerateReqInput, rids: Sequence[str]) -> dict[str, str | None]:
    """By the rid of each sample: what the caller calls its request, if anything. `rids` are the prompts'.

    Raises:
        FieldError: there are not sampling parameters for each prompt.
    """
    params = per_item("sampling_params", request.sampling_params, len(rids))
    return {
        sample: request.name_of(item)
        for item, (rid, one) in enumerate(zip(rids, params, strict=True))
        for sample in sample_rids(rid, one.n)
    }


def per_item(name: str, value: Any, num: int) -> list[Any]:
    """A field's value for every item: a list as it is, anything else repeated.

    Raises:
        FieldError: a list has another number of entries.
    """
    if not isinstance(value, list):
        return [value] * num
    if len(value) != num:
        raise FieldError(f"{name}: has {len(value)} entries, must have one per prompt, {num}", name)
    return value
