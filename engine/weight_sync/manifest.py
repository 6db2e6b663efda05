"""What a transfer of weights brings, checked before its first byte, and how far an update has come. Pure: no torch.

An update replaces every tensor of the model, in one call or in many (buckets). Between its first tensor and its last the
model is a mixture that nobody may generate from; so it is after a transfer that broke off.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..control.blocked import Blocked, BlockedKind

NUM_NAMES_SHOWN = 3
# Names of dtypes that may be sent, as torch has them, and their bytes.
SENT_FP8 = "float8_e4m3fn"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, SENT_FP8: 1}


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


def parse_specs(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, may_be_empty: bool = False
) -> list[TensorSpec]:
    """The parallel lists of a request; dtypes with or without "torch.".

    Raises:
        ValueError: the lists differ in length, a name stands twice, or a dtype is none of `DTYPE_BYTES`.
    """
    if not len(names) == len(dtypes) == len(shapes):
        raise ValueError(
            f"names, dtypes, shapes: have {len(names)}, {len(dtypes)}, {len(shapes)} entries; must be equal"
        )
    if not names and not may_be_empty:
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
    tensors: Sequence[tuple[str, tuple[int, ...]]], known: Mapping[str, Shaped], ignored: Container[str]
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


def check_distinct(tensors: Sequence[tuple[str, frozenset[str]]]) -> None:
    """Each name with the model's tensors that it stands for: none may come twice, as one of its own and in a fused one.

    Raises:
        ValueError: one does.
    """
    came_in: dict[str, str] = {}
    for name, covered in tensors:
        for tensor in covered:
            if came_in.setdefault(tensor, name) != name:
                raise ValueError(f"names: {name!r} and {came_in[tensor]!r} both bring {tensor}")


@dataclass
class UpdateProgress:
    """Which tensors the update at hand still lacks, and why nobody may generate.

    An update begins with a tensor that comes a second time, with another version or from another source: the one before it
    was given up by its sender. What that left behind must be replaced, as must what a torn transfer or released memory
    left: until then a tensor that does not come cannot keep its value.
    """

    all_names: frozenset[str]
    # Weights in FP8 by name, and the names of their scales: an update that ends early must bring both or none.
    scales: Mapping[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    torn: str | None = None
    version: str | None = None
    source: str = ""
    # Whether every tensor that is still missing has the value of one complete model.
    is_base_whole: bool = True

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def check(self, names: Collection[str], version: str | None, source: str = "", *, is_last: bool = False) -> None:
        """
        Raises:
            ValueError: these tensors cannot be the last ones: others must be replaced, too.
        """
        begins = self._begins_update(names, version, source)
        is_base_whole = self.is_complete if begins else self.is_base_whole
        still_missing = (self.all_names if begins else self.missing) - frozenset(names)
        if is_last and still_missing and not is_base_whole:
            raise ValueError(
                f"is_last: an earlier update did not end; this one must bring it all: {self._lacks(still_missing)}"
            )
        alone = [name for name, scale in self.scales.items() if (name in still_missing) != (scale in still_missing)]
        if is_last and alone:
            raise ValueError(f"is_last: {alone[0]} and {self.scales[alone[0]]} must come in the same update")

    def receive(self, names: Collection[str], version: str | None, source: str = "", *, is_last: bool = False) -> None:
        """Tensors have arrived. With `is_last` those that did not come keep their values; `check` says whether they may."""
        if not names and not is_last:
            # Tensors that the model does not use: they neither begin an update nor end one.
            return
        if self._begins_update(names, version, source):
            self.is_base_whole = self.is_complete
            self.missing = set(self.all_names)
            self.version = None
        self.missing.difference_update(names)
        self.source = source
        self.version = version or self.version
        if is_last and self.is_base_whole:
            self.missing.clear()
        if self.is_complete:
            self.torn = None
            self.is_base_whole = True

    def _begins_update(self, names: Collection[str], version: str | None, source: str) -> bool:
        if self.is_complete or self.missing == self.all_names:
            return self.is_complete
        other_version = None not in (version, self.version) and version != self.version
        return other_version or source != self.source or not self.missing.issuperset(names)

    def void(self) -> None:
        """Nothing is left of the weights."""
        self._lose_everything()

    def tear(self, reason: str) -> None:
        """A transfer broke off when some of its tensors were in place: only a whole update makes the model whole."""
        self.torn = reason
        self._lose_everything()

    def _lose_everything(self) -> None:
        self.missing = set(self.all_names)
        self.version = None
        self.is_base_whole = False

    @property
    def blocked(self) -> Blocked | None:
        """Why nobody may generate; None if the weights are whole."""
        if self.is_complete:
            return None
        if self.torn is not None:
            words = f"a transfer was torn ({self.torn}); send one complete update"
            return Blocked(BlockedKind.TORN, f"weights: {words}: {self._lacks(self.missing)}")
        return Blocked(BlockedKind.INCOMPLETE, f"weights: an update is not complete: {self._lacks(self.missing)}")

    def _lacks(self, missing: Collection[str]) -> str:
        shown = ", ".join(sorted(missing)[:NUM_NAMES_SHOWN])
        return f"{len(missing)} of {len(self.all_names)} tensors are still to come, {shown} among them"
