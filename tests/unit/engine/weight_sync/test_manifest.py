"""What a transfer may bring, and how far an update has come."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.weight_sync.manifest import UpdateProgress, check_distinct, check_specs, parse_specs

NAMES = ("a", "b", "c", "d")


@dataclass
class Shape:
    shape: tuple[int, ...]

    def check(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise ValueError(f"shape {shape}: must be {self.shape}")


@pytest.mark.parametrize(
    ("names", "dtypes", "shapes", "words"),
    [
        (["a"], ["float32"], [], "names, dtypes, shapes: have 1, 1, 0 entries"),
        ([], [], [], "names: must not be empty"),
        (["a", "a"], ["float32"] * 2, [[1], [1]], "names: 'a' stands twice"),
        (["a"], ["int8"], [[1]], "dtypes: a: 'int8' must be one of"),
        (["a"], ["torch.torch.float32"], [[1]], "dtypes: a: 'torch.float32'"),
        (["a"], ["float32"], [[2, -1]], r"shapes: a: \[2, -1\] has a negative size"),
    ],
)
def test_bad_lists_are_refused_by_name(
    names: list[str], dtypes: list[str], shapes: list[list[int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        parse_specs(names, dtypes, shapes)


def test_specs_count_their_bytes() -> None:
    specs = parse_specs(["a", "b", "c"], ["torch.bfloat16", "float64", "float32"], [[2, 3], [], [4, 0]])
    assert [spec.num_bytes for spec in specs] == [12, 8, 0]
    assert specs[0].dtype == "bfloat16" and specs[0].shape == (2, 3)


def test_tensors_must_be_the_models() -> None:
    known = {"a": Shape((2, 3)), "b": Shape((1,))}
    check_specs([("a", (2, 3)), ("tied", (9,))], known, {"tied"})
    with pytest.raises(ValueError, match=r"names: the model has no w, x, y \.\.\."):
        check_specs([(name, (1,)) for name in ("w", "x", "b", "y", "z")], known, ())
    with pytest.raises(ValueError, match=r"shapes: a: shape \(3, 2\): must be \(2, 3\)"):
        check_specs([("b", (1,)), ("a", (3, 2))], known, ())


def test_a_tensor_may_not_come_alone_and_in_a_fused_one() -> None:
    check_distinct([("fused", frozenset("ab")), ("c", frozenset("c"))])
    with pytest.raises(ValueError, match="names: 'b' and 'fused' both bring b"):
        check_distinct([("fused", frozenset("ab")), ("b", frozenset("b"))])


@dataclass
class Model:
    """What an engine holds: by tensor, which update wrote it; 0 is what it was started with, None is nothing usable."""

    progress: UpdateProgress = field(default_factory=lambda: UpdateProgress(frozenset(NAMES)))
    values: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    # The values of the last moment at which the model was whole.
    whole: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))

    def bring(self, update: int, names: set[str], version: str | None, is_last: bool) -> bool:
        try:
            self.progress.check(names, version, is_last=is_last)
        except ValueError:
            return False
        self.progress.receive(names, version, is_last=is_last)
        self.values.update(dict.fromkeys(names, update))
        return True


@st.composite
def events(draw: st.DrawFn) -> list[tuple[object, ...]]:
    """Updates cut into buckets, given up at any place, torn, or emptied by a release."""
    found: list[tuple[object, ...]] = []
    for update in range(1, draw(st.integers(1, 5)) + 1):
        order = draw(st.permutations(NAMES))
        version = draw(st.sampled_from([None, f"v{update}"]))
        sent = draw(st.integers(1, len(NAMES)))
        first = 0
        while first < sent:
            size = draw(st.integers(1, sent - first))
            last = first + size == sent and draw(st.booleans())
            found.append(("bring", update, set(order[first : first + size]), version, last))
            first += size
        if draw(st.integers(0, 3)) == 0:
            found.append((draw(st.sampled_from(["tear", "void"])),))
    return found


@settings(max_examples=400, deadline=None)
@given(events())
def test_nobody_generates_from_a_mixture(history: list[tuple[object, ...]]) -> None:
    """Whatever comes in whatever order: while there is no hold, the model is one update, or one update over a whole model
    where its sender said that the rest keeps its values."""
    model = Model()
    senders: set[int] = set()
    for event in history:
        if event[0] == "bring":
            update, names, version, is_last = event[1:]
            nameless = version is None or model.progress.version is None
            if nameless and senders - {update} and not model.progress.is_complete:
                # From one source and without versions, a repeated tensor is the only sign of a new update.
                names = set(NAMES)
            if not model.bring(update, names, version, is_last):
                assert model.progress.blocked is not None, "only a model that is not whole refuses a last bucket"
                continue
            senders.add(update)
        elif event[0] == "tear":
            names = set(NAMES[:2])
            model.progress.tear("the trainer is gone")
            model.values.update(dict.fromkeys(names, None))
        else:
            model.progress.void()
            model.values = dict.fromkeys(NAMES, None)
        if model.progress.blocked is None:
            newest = max(value or 0 for value in model.values.values())
            assert None not in model.values.values()
            changed = {name for name in NAMES if model.values[name] != model.whole[name]}
            assert {model.values[name] for name in changed} <= {newest}, "of two updates, or of one and half another"
            model.whole = dict(model.values)
            senders = {newest}
        else:
            assert model.progress.missing


def test_hold_is_none_exactly_when_every_tensor_has_come() -> None:
    progress = UpdateProgress(frozenset(NAMES))
    assert progress.blocked is None
    progress.receive({"a", "b"}, "v1")
    words = "weights: an update is not complete: 2 of 4 tensors are still to come, c, d among them"
    assert progress.blocked == Blocked(BlockedKind.INCOMPLETE, words)
    progress.receive({"c"}, "v1")
    assert progress.blocked is not None
    progress.receive({"d"}, None)
    assert progress.blocked is None and progress.version == "v1"


@pytest.mark.parametrize(
    ("version", "names"), [(None, {"a"}), ("v2", {"c"})], ids=["a tensor comes again", "another version"]
)
def test_an_update_that_was_given_up_must_be_replaced_whole(version: str | None, names: set[str]) -> None:
    progress = UpdateProgress(frozenset(NAMES))
    progress.receive({"a", "b"}, "v1")
    progress.receive(names, version)
    assert progress.missing == set(NAMES) - names
    with pytest.raises(
        ValueError, match=r"is_last: an earlier update did not end; .* 2 of 4 tensors are still to come"
    ):
        progress.check(set(NAMES) - names - {"d"} - {"b"}, version, is_last=True)
    rest = set(NAMES) - names
    progress.check(rest, version, is_last=True)
    progress.receive(rest, version, is_last=True)
    assert progress.blocked is None and progress.version == version


def test_the_last_bucket_keeps_what_did_not_come() -> None:
    progress = UpdateProgress(frozenset(NAMES))
    progress.check({"a"}, "v1", is_last=True)
    progress.receive({"a"}, "v1", is_last=True)
    assert progress.blocked is None
    progress.receive({"a"}, "v2")
    progress.check({"c"}, "v2", is_last=True)
    progress.receive({"c"}, "v2", is_last=True)
    assert progress.blocked is None and progress.version == "v2"


def test_another_source_begins_another_update() -> None:
    progress = UpdateProgress(frozenset(NAMES))
    progress.receive({"a", "b"}, None, "group 1")
    progress.receive({"c"}, None, "group 1")
    progress.receive({"d"}, None, "group 2")
    assert progress.missing == {"a", "b", "c"}
    progress.receive({"a", "b", "c"}, None, "group 2")
    assert progress.blocked is None


@pytest.mark.parametrize("lose", ["tear", "void"])
def test_after_a_loss_only_a_whole_update_serves_in_one_call_or_many(lose: str) -> None:
    progress = UpdateProgress(frozenset(NAMES))
    if lose == "tear":
        progress.tear("the trainer is gone")
        assert progress.blocked is not None and progress.blocked.kind is BlockedKind.TORN
        assert "torn (the trainer is gone)" in progress.blocked.message
    else:
        progress.void()
    with pytest.raises(ValueError, match="is_last"):
        progress.check({"a"}, None, is_last=True)
    progress.receive({"a", "b"}, None)
    assert progress.blocked is not None
    with pytest.raises(ValueError, match="is_last"):
        progress.check({"c"}, None, is_last=True)
    progress.check({"c", "d"}, None, is_last=True)
    progress.receive({"c", "d"}, None, is_last=True)
    assert progress.blocked is None and progress.torn is None


def test_tensors_that_the_model_ignores_change_nothing() -> None:
    progress = UpdateProgress(frozenset(NAMES))
    progress.receive((), "v1")
    assert progress.blocked is None and progress.version is None
    progress.receive({"a"}, "v2")
    progress.receive((), None)
    assert progress.missing == {"b", "c", "d"} and progress.version == "v2"
