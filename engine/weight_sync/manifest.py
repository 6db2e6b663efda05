"""What a transfer of weights brings, checked before its first byte, and how far an update has come. Pure: no torch.

An update replaces every tensor of the model, in one call or in many (buckets). Between its first tensor and its last the
model is a mixture that nobody may generate from; so it is after a transfer that broke off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

NUM_NAMES_SHOWN = 3
# Names of dtypes that may be sent, as torch has them, and their bytes.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
LOAD_FORMATS = ("auto", "flattened_bucket")


class Shaped(Protocol):
    """A tensor of the model; `check` raises a ValueError for any other shape."""

    def check(self, shape: tuple[int, ...]) -> None: ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to come, unsharded."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_values * DTYPE_BYTES[self.dtype]


def parse_specs(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[TensorSpec]:
    """The parallel lists of a request; dtypes with or without "torch.".

    Raises:
        ValueError: the lists differ in length, a name stands twice, or a dtype is none of `DTYPE_BYTES`.
    """
    if not len(names) == len(dtypes) == len(shapes):
        raise ValueError(
            f"names, dtypes, shapes: have {len(names)}, {len(dtypes)}, {len(shapes)} entries; must be equal"
        )
    if not names:
        raise ValueError("names: must not be empty")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"names: {twice!r} stands twice")
    specs = [
        TensorSpec(name, dtype.removeprefix("torch."), tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]
    for spec in specs:
        if spec.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtypes: {spec.name}: {spec.dtype!r} must be one of {', '.join(DTYPE_BYTES)}")
        if any(size < 0 for size in spec.shape):
            raise ValueError(f"shapes: {spec.name}: {list(spec.shape)} has a negative size")
    return specs


def check_specs(
    tensors: Sequence[tuple[str, tuple[int, ...]]], known: Mapping[str, Shaped], ignored: Collection[str]
) -> None:
    """Every tensor, by name and shape, must be one of the model's, in its unsharded shape.

    Raises:
        ValueError: one is not; the message names it and the legal shape.
    """
    unknown = [name for name, _ in tensors if name not in known and name not in ignored]
    if unknown:
        more = " ..." if len(unknown) > NUM_NAMES_SHOWN else ""
        raise ValueError(f"names: the model has no {', '.join(unknown[:NUM_NAMES_SHOWN])}{more}")
    for name, shape in tensors:
        if name in known:
            try:
                known[name].check(shape)
            except ValueError as error:
                raise ValueError(f"shapes: {name}: {error}") from error


@dataclass
class UpdateProgress:
    """Which tensors the update at hand still lacks, and why nobody may generate.

    A tensor that comes a second time begins another update: the one before it was given up by its sender.
    """

    all_names: frozenset[str]
    missing: set[str] = field(default_factory=set)
    torn: str | None = None
    version: str | None = None

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def receive(self, names: Collection[str], version: str | None, *, is_last: bool = False) -> None:
        """Tensors have arrived. With `is_last` those that did not come keep their values; not after a torn transfer."""
        if not names and not is_last:
            # Tensors that the model does not use: they neither begin an update nor end one.
            return
        if self.is_complete or not self.missing.issuperset(names):
            self.missing = set(self.all_names)
            self.version = None
        self.missing.difference_update(names)
        self.version = version or self.version
        if is_last and self.torn is None:
            self.missing.clear()
        if self.is_complete:
            self.torn = None

    def void(self) -> None:
        """Nothing is left of the weights."""
        self.missing = set(self.all_names)

    def tear(self, reason: str) -> None:
        """A transfer broke off when some of its tensors were in place: only a whole update makes the model whole."""
        self.torn = reason
        self.missing = set(self.all_names)

    @property
    def hold(self) -> str | None:
        """Why nobody may generate; None if the weights are whole."""
        if self.is_complete:
            return None
        shown = sorted(self.missing)[:NUM_NAMES_SHOWN]
        counts = (
            f"{len(self.missing)} of {len(self.all_names)} tensors are still to come, {', '.join(shown)} among them"
        )
        if self.torn is not None:
            return f"weights: a transfer was torn ({self.torn}); send one complete update: {counts}"
        return f"weights: an update is not complete: {counts}"
