"""Every control operation, declared once.

A struct is the body of its route, the arguments of its method (`control/methods.py`) and what the ranks are told. Its tag
names the route. What is annotated beside a type binds bodies alone, see `entrypoints/control.py`; `check` is for all.

A new operation is a struct here and in `ControlOperation`, a method, and an action in `runner/rank_operations.py`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, get_args

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ..validation import dialect_fields
from ..validation.dialect_fields import Neutral
from ..validation.field_error import FieldError
from ..validation.request_model import Items, Number, check_utf8, refuse_bool
from .tensor_buckets import PickledError, parse_bucket

DEFAULT_GROUP = "weight_update_group"
PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("weights", "kv_cache")
# Goes with any of them and comes back with the last: a name that the dialect has for it, and nobody's memory here.
GRAPHS_TAG = "cuda_graph"
# "auto" is NCCL between CUDA devices, else gloo.
BACKENDS = ("auto", "gloo", "nccl")
DEFAULT_BACKEND = "auto"
LOAD_FORMATS = ("auto", "flattened_bucket", "delta")
WEIGHT_CHECKS = ("checksum", "snapshot", "compare")


class OneOf:
    """Of a body: a string that is one of these. The ranks decode any string, and refuse it in words."""

    def __init__(self, choices: Sequence[str]) -> None:
        self._choices = choices

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self._choices))


# What fits the messages to the ranks.
Count = Annotated[Number, Field(ge=0, lt=2**31)]
NumBytes = Annotated[Number, Field(ge=0)]
Port = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1, lt=2**16)]
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_utf8)]


class Operation(msgspec.Struct, frozen=True):
    """What all leaders are told under one number, do at one step, and answer once."""

    neutral_fields: ClassVar[Neutral] = dialect_fields.MESSAGE
    # It asks whether anybody has requests, or (the end of a pause) must not overtake the answer that does.
    asks_for_idle: ClassVar[bool] = False
    # It takes as long as a transfer, or as ranks need to join a group.
    is_long: ClassVar[bool] = False

    @classmethod
    def route(cls) -> str:
        return f"/{cls.__struct_config__.tag}"

    @property
    def empties_cache(self) -> bool:
        """Whether the prefix cache is empty when it was done."""
        return False

    def check(self) -> None:
        """What types do not say; a frontend asks before it tells the leaders.

        Raises:
            ValueError: the operation cannot be done.
        """


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r}: must be one of {', '.join(choices)}")


# --- generation -----------------------------------------------------------------------------------------------------


class FlushCache(Operation, frozen=True, tag="flush_cache"):
    asks_for_idle = True

    @property
    def empties_cache(self) -> bool:
        return True


class PauseGeneration(Operation, frozen=True, tag="pause_generation"):
    mode: Annotated[str, OneOf(PAUSE_MODES)] = "abort"

    def check(self) -> None:
        check_choice("mode", self.mode, PAUSE_MODES)


class ContinueGeneration(Operation, frozen=True, tag="continue_generation"):
    asks_for_idle = True


# --- weights --------------------------------------------------------------------------------------------------------


class WeightUpdate(Operation, frozen=True, kw_only=True):
    """What an update means for what is there: whether the prefix cache is emptied, what the new weights are called, and
    whether requests are aborted, not waited for."""

    neutral_fields = dialect_fields.UPDATE
    asks_for_idle = True
    is_long = True

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: Annotated[Name, Field(max_length=512)] | None = None
    # Of a delta: what the weights are called that it changes. Those who hold others refuse it.
    base_version: Annotated[Name, Field(max_length=512)] | None = None

    def check_format(self, load_format: str | None, legal: Sequence[str]) -> None:
        """
        Raises:
            ValueError: it is none of `legal`, or does not go with a base.
        """
        check_choice("load_format", load_format or "auto", legal)
        if load_format == "delta" and self.base_version is None:
            raise FieldError(
                "base_version: a delta must name the version of the weights that it changes", "base_version"
            )
        if load_format != "delta" and self.base_version is not None:
            raise FieldError("base_version: goes with load_format 'delta' alone", "base_version")

    @property
    def empties_cache(self) -> bool:
        return self.flush_cache

    @property
    def ends_update(self) -> bool:
        """Whether the update is complete with this call though it does not bring every tensor."""
        return False


class PartialWeightUpdate(WeightUpdate, frozen=True, kw_only=True):
    """Some tensors or all."""

    is_last: bool = False

    @property
    def ends_update(self) -> bool:
        return self.is_last


class UpdateWeightsFromDisk(WeightUpdate, frozen=True, tag="update_weights_from_disk"):
    """A checkpoint folder, or one of a delta's files ("delta")."""

    model_path: Name
    load_format: Name | None = None

    def check(self) -> None:
        self.check_format(self.load_format, ("auto", "delta"))


class UpdateWeightsFromTensor(PartialWeightUpdate, frozen=True, tag="update_weights_from_tensor"):
    """`path` of a safetensors file on the ranks' host (shared memory, say), or its bytes as base64, which a frontend puts
    into such a file: tensors, or a delta ("delta"). Or `serialized_named_tensors`, which say where a colocated trainer has
    them in memory ("flattened_bucket")."""

    path: Name | None = None
    safetensors: str | None = None
    # Buckets as text, see `tensor_buckets.py`: one for all ranks, or one a rank.
    serialized_named_tensors: Items[str] | None = None
    load_format: Name | None = None

    def check(self) -> None:
        if self.serialized_named_tensors is not None:
            self._check_buckets(self.serialized_named_tensors)
        self.check_format(self.load_format, LOAD_FORMATS)
        if [self.path, self.safetensors, self.serialized_named_tensors].count(None) != 2:
            raise ValueError("path, safetensors, serialized_named_tensors: give exactly one of them")
        in_buckets = self.serialized_named_tensors is not None
        if in_buckets and self.load_format == "delta":
            raise FieldError("load_format='delta': goes with path or safetensors", "load_format")
        if not in_buckets and self.load_format == "flattened_bucket":
            raise FieldError("load_format='flattened_bucket': goes with serialized_named_tensors", "load_format")

    def _check_buckets(self, texts: Sequence[str]) -> None:
        field = "serialized_named_tensors"
        if not texts:
            raise FieldError(f"{field}: must not be empty", field)
        for number, text in enumerate(texts):
            try:
                parse_bucket(text)
            except PickledError as error:
                raise FieldError(f"{field}: {error}", field) from None
            except ValueError as error:
                raise FieldError(f"{field}[{number}]: {error}", f"{field}[{number}]") from None

    def data(self) -> bytes:
        try:
            return base64.b64decode(self.safetensors or "", validate=True)
        except binascii.Error:
            raise FieldError("safetensors: must be base64", "safetensors") from None


class UpdateWeightsFromDistributed(PartialWeightUpdate, frozen=True, tag="update_weights_from_distributed"):
    """Tensors that the trainer broadcasts: one each in this order, all in one ("flattened_bucket"), or (`packed_bytes`) as
    many in one as come to more than that; or what has changed of them, in one ("delta"), of which `delta` is the manifest,
    in JSON. No tensors are the end of an update that brought some."""

    names: Items[Name]
    dtypes: Items[Name]
    shapes: Items[Items[Count]]
    group_name: Name = DEFAULT_GROUP
    load_format: Name | None = None
    delta: str | None = None
    packed_bytes: NumBytes = 0

    def check(self) -> None:
        self.check_format(self.load_format, LOAD_FORMATS)
        if (self.load_format == "delta") != (self.delta is not None):
            raise FieldError("delta: a manifest goes with load_format 'delta', and with nothing else", "delta")
        if self.packed_bytes and self.load_format not in (None, "auto"):
            raise FieldError("packed_bytes: goes with load_format 'auto'", "packed_bytes")


class UpdateWeightVersion(Operation, frozen=True, tag="update_weight_version"):
    """Another name for the weights that are there. As in the dialect, what runs or waits is aborted unless told
    otherwise."""

    new_version: Annotated[Name, Field(max_length=512)]
    abort_all_requests: bool = True


class InitWeightsUpdateGroup(Operation, frozen=True, tag="init_weights_update_group"):
    """The trainer is rank 0 of its group, engine ranks follow from `rank_offset`."""

    is_long = True

    master_address: Name
    master_port: Port
    rank_offset: Count
    world_size: Count
    group_name: Name = DEFAULT_GROUP
    backend: Annotated[str, OneOf(BACKENDS)] = DEFAULT_BACKEND


class DestroyWeightsUpdateGroup(Operation, frozen=True, tag="destroy_weights_update_group"):
    group_name: Name = DEFAULT_GROUP


class GetWeightsByName(Operation, frozen=True, tag="get_weights_by_name"):
    """The reply's payload is rows in JSON."""

    name: Name
    truncate_size: Count = 100

    def check(self) -> None:
        if self.truncate_size < 1:
            raise ValueError(f"truncate_size={self.truncate_size}: must be at least 1")


class CheckWeights(Operation, frozen=True, tag="weights_checker"):
    """The reply's payload is a checksum by tensor in JSON; see `engine.weight_sync.checksum`. "snapshot" keeps them, and
    "compare" succeeds where all are what they were then. Tensors whose name has one of `skip_tensor_list` in it are left
    out."""

    is_long = True
    neutral_fields = dialect_fields.CHECK_WEIGHTS

    action: Annotated[str, OneOf(WEIGHT_CHECKS)] = "checksum"
    skip_tensor_list: Items[Name] | None = None


# --- memory ---------------------------------------------------------------------------------------------------------


class MemoryOperation(Operation, frozen=True):
    is_long = True

    tags: Items[Annotated[str, OneOf((*MEMORY_TAGS, GRAPHS_TAG))]] | None = None

    @property
    def owners(self) -> Sequence[str]:
        """Whose memory it is."""
        return [tag for tag in self.tags if tag != GRAPHS_TAG] if self.tags else MEMORY_TAGS


class ReleaseMemoryOccupation(MemoryOperation, frozen=True, tag="release_memory_occupation"):
    asks_for_idle = True

    @property
    def empties_cache(self) -> bool:
        return "kv_cache" in self.owners


class ResumeMemoryOccupation(MemoryOperation, frozen=True, tag="resume_memory_occupation"):
    """The KV pool empty, the weights to be filled by one complete update."""


ControlOperation = (
    FlushCache
    | PauseGeneration
    | ContinueGeneration
    | UpdateWeightsFromDisk
    | UpdateWeightsFromTensor
    | UpdateWeightsFromDistributed
    | UpdateWeightVersion
    | InitWeightsUpdateGroup
    | DestroyWeightsUpdateGroup
    | GetWeightsByName
    | CheckWeights
    | ReleaseMemoryOccupation
    | ResumeMemoryOccupation
)
OPERATIONS: tuple[type[Operation], ...] = get_args(ControlOperation)
