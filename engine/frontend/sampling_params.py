"""`sampling_params` as a caller writes them, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..grammar.grammar_text import from_ebnf, from_json_schema, from_regex, from_structural_tag
from ..io_struct import SamplingParams
from ..validation import dialect_fields
from ..validation.field_error import FieldError
from ..validation.request_model import Items, Number, Real, RequestModel, has_surrogate

# Bounds on what one request may ask of every step's host work.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 4096
MAX_ALLOWED_TOKEN_IDS = 4096
# Scores stay finite numbers of float32, also when they are divided by the lowest temperature that is not greedy.
MAX_LOGIT_BIAS_VALUE = 1e30
MIN_REPETITION_PENALTY = 0.01
# All choices are equally likely long before; a multiple of float32's largest number would make scores of no number.
MAX_TEMPERATURE = 1e6
MAX_TOP_K = 2**31 - 1
MAX_SAMPLES = 256
# Travels as an unsigned 64-bit integer, and samples of one prompt count upwards from it.
MAX_SEED = 2**63 - 1
# GBNF takes the most.
GRAMMAR_CHAR_COST_US, GRAMMAR_OBJECT_COST_US = 8.0, 10_000.0
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


def check_size(bias: Any) -> Any:
    """Before any entry is looked at."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"must have at most {MAX_LOGIT_BIAS} entries, not {len(bias)}")
    return bias


def none_if_off(seed: int) -> int | None:
    return None if seed == -1 else seed


def check_temperature(value: float) -> float:
    # NaN fails the comparison, too.
    if not 0.0 <= value <= MAX_TEMPERATURE:
        raise ValueError(f"must lie in 0 .. {MAX_TEMPERATURE:g}")
    return value


class SamplingParamsInput(RequestModel):
    """`sampling_params` of a request."""

    neutral_fields = dialect_fields.SAMPLING
    ignored_fields = dialect_fields.SAMPLING_IGNORED

    max_new_tokens: Annotated[Number, Field(ge=0)] | None = None
    min_new_tokens: Number = Field(0, ge=0)
    temperature: Annotated[Real, AfterValidator(check_temperature)] = 1.0
    top_p: Real = Field(1.0, gt=0.0, le=1.0)
    top_k: Number = Field(-1, ge=-1, le=MAX_TOP_K)
    min_p: Real = Field(0.0, ge=0.0, le=1.0)
    frequency_penalty: Real = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: Real = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: Real = Field(1.0, ge=MIN_REPETITION_PENALTY, le=2.0)
    stop: str | Annotated[Items[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[Items[Number], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: Annotated[dict[Number, Real], BeforeValidator(check_size)] | None = None
    allowed_token_ids: Annotated[Items[Number], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None = None
    # As in other engines, -1 means none.
    sampling_seed: Annotated[Number, Field(ge=-1, le=MAX_SEED), AfterValidator(none_if_off)] | None = None
    n: Number = Field(1, ge=1, le=MAX_SAMPLES)
    # What the output must follow; at most one of them.
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == 0:
            raise FieldError("top_k=0: must be -1 (off) or at least 1", "top_k")
        if "" in self.stop_strings:
            raise FieldError("stop: an empty string would stop everything", "stop")
        if any(len(stop) > MAX_STOP_CHARS for stop in self.stop_strings):
            raise FieldError(f"stop: a string must have at most {MAX_STOP_CHARS} characters", "stop")
        if any(map(has_surrogate, self.stop_strings)):
            raise FieldError("stop: must be text that UTF-8 can encode", "stop")
        # NaN fails the comparison, too.
        if not all(abs(value) <= MAX_LOGIT_BIAS_VALUE for value in (self.logit_bias or {}).values()):
            raise FieldError(f"logit_bias: must be numbers of at most {MAX_LOGIT_BIAS_VALUE:g}", "logit_bias")
        self._check_grammar()
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise FieldError(
                f"min_new_tokens={self.min_new_tokens}: must be at most max_new_tokens={self.max_new_tokens}",
                "min_new_tokens",
                mentions=("max_new_tokens",),
            )
        return self

    def _check_grammar(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise FieldError(f"{given[1]}: must be absent beside {given[0]}", given[1], mentions=(given[0],))
        for name in given:
            value = getattr(self, name)
            if isinstance(value, str) and (not value or has_surrogate(value)):
                raise FieldError(f"{name}: must be text that UTF-8 can encode, and not empty", name)

    @property
    def grammar_field(self) -> str | None:
        """The one that says what the output must follow."""
        return next((name for name in GRAMMARS if getattr(self, name) is not None), None)

    @property
    def grammar_cost_us(self) -> float:
        """About what `grammar` takes; an object has any length, and is no work for an event loop."""
        name = self.grammar_field
        value = None if name is None else getattr(self, name)
        if value is None:
            return 0.0
        return GRAMMAR_CHAR_COST_US * len(value) if isinstance(value, str) else GRAMMAR_OBJECT_COST_US

    def grammar(self, special_tokens: Collection[str]) -> str:
        """What it says, for the engine; "" if there is none.

        Raises:
            ValueError: it is not of its form. Whether it can be compiled is another question.
        """
        name = self.grammar_field
        if name is None:
            return ""
        value = getattr(self, name)
        try:
            text = value if isinstance(value, str) else json.dumps(value)
            if name == "structural_tag":
                return from_structural_tag(text, special_tokens)
            return {"json_schema": from_json_schema, "regex": from_regex, "ebnf": from_ebnf}[name](text)
        except ValueError as error:
            raise FieldError(f"{name}: {error}", name) from None
        except RecursionError:
            raise FieldError(f"{name}: is nested too deeply", name) from None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def make_sampling_params(params: SamplingParamsInput, max_new_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        stop=params.stop_strings,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias or {},
        allowed_token_ids=tuple(params.allowed_token_ids or ()),
        sampling_seed=seed,
    )
