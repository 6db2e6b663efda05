"""`sampling_params` as a caller writes them, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .io_struct import SamplingParams

# Bounds on what one request may ask of every step's host work.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 4096
# Scores stay finite numbers of float32, also when they are divided by the lowest temperature that is not greedy.
MAX_LOGIT_BIAS_VALUE = 1e30
MIN_REPETITION_PENALTY = 0.01
# All choices are equally likely long before; a multiple of float32's largest number would make scores of no number.
MAX_TEMPERATURE = 1e6
MAX_TOP_K = 2**31 - 1
MAX_SAMPLES = 256
# Travels as an unsigned 64-bit integer, and samples of one prompt count upwards from it.
MAX_SEED = 2**63 - 1

# Fields of the dialect that change the result and are not implemented: legal at the value that means "off".
NEUTRAL_SAMPLING_FIELDS: dict[str, Any] = {
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "stop_regex": None,
    "custom_params": None,
    "beam_width": None,
}
IGNORED_SAMPLING_FIELDS = ("spaces_between_special_tokens", "stream_interval")


def drop_dialect_fields(data: Any, neutral: dict[str, Any], ignored: tuple[str, ...]) -> Any:
    """Accept known fields that are off or change nothing; refuse the others by name."""
    if not isinstance(data, dict):
        return data
    # Null means the default, as everywhere in this API.
    kept = {name: value for name, value in data.items() if value is not None}
    for name, off in neutral.items():
        if name in kept and kept.pop(name) not in (None, off):
            raise ValueError(f"{name} is not supported: must be {off!r} or absent")
    for name in ignored:
        kept.pop(name, None)
    return kept


def has_surrogate(text: str) -> bool:
    """Whether text has half of a UTF-16 pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be an integer, not {str(value).lower()}")
    return value


def check_temperature(value: float) -> float:
    # NaN fails the comparison, too.
    if not 0.0 <= value <= MAX_TEMPERATURE:
        raise ValueError(f"must lie in 0 .. {MAX_TEMPERATURE:g}")
    return value


# JSON's true is no 1, and what travels as a message has 64 bits.
Number = Annotated[int, BeforeValidator(refuse_bool), Field(ge=-(2**63), lt=2**63)]


class SamplingParamsInput(BaseModel):
    """`sampling_params` of a request."""

    model_config = ConfigDict(extra="forbid", strict=False)

    max_new_tokens: Annotated[Number, Field(ge=0)] | None = None
    min_new_tokens: Number = Field(0, ge=0)
    temperature: Annotated[float, AfterValidator(check_temperature)] = 1.0
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: Number = Field(-1, ge=-1, le=MAX_TOP_K)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, ge=MIN_REPETITION_PENALTY, le=2.0)
    stop: str | list[str] | None = None
    stop_token_ids: list[Number] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[Number, float] | None = None
    sampling_seed: Number | None = Field(None, ge=0, le=MAX_SEED)
    n: Number = Field(1, ge=1, le=MAX_SAMPLES)

    @model_validator(mode="before")
    @classmethod
    def _drop_dialect_fields(cls, data: Any) -> Any:
        return drop_dialect_fields(data, NEUTRAL_SAMPLING_FIELDS, IGNORED_SAMPLING_FIELDS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == 0:
            raise ValueError("top_k=0: must be -1 (off) or at least 1")
        if "" in self.stop_strings:
            raise ValueError("stop: an empty string would stop everything")
        if len(self.stop_strings) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARS for stop in self.stop_strings):
            raise ValueError(f"stop: must be at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARS} characters")
        if any(map(has_surrogate, self.stop_strings)):
            raise ValueError("stop: must be text that UTF-8 can encode")
        bias = self.logit_bias or {}
        # NaN fails the comparison, too.
        if len(bias) > MAX_LOGIT_BIAS or not all(abs(value) <= MAX_LOGIT_BIAS_VALUE for value in bias.values()):
            raise ValueError(
                f"logit_bias: must be at most {MAX_LOGIT_BIAS} numbers of at most {MAX_LOGIT_BIAS_VALUE:g}"
            )
        if len(self.stop_token_ids or []) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids: must be at most {MAX_STOP_TOKEN_IDS}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must be at most max_new_tokens={self.max_new_tokens}"
            )
        return self

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
        skip_special_tokens=params.skip_special_tokens,
        no_stop_trim=params.no_stop_trim,
        logit_bias=params.logit_bias or {},
        sampling_seed=seed,
    )
