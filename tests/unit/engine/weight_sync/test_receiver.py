"""One rank's half of an update, over a real model and a real group: checked first, staged, taken whole, or torn."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from waybill.engine.control.blocked import Blocked, BlockedKind
from waybill.engine.control.operations import (
    InitWeightsUpdateGroup,
    UpdateWeightsFromDisk,
    UpdateWeightsFromDistributed,
    UpdateWeightsFromTensor,
)
from waybill.engine.models import read_plan, weight_loader
from waybill.engine.models.checkpoint import Checkpoint
from waybill.engine.models.model_context import ModelContext
from waybill.engine.models.qwen3_moe import build, parse_config
from waybill.engine.models.weight_loader import read_exactly
from waybill.engine.weight_sync import transfer
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.group_registry import GroupRegistry
from waybill.engine.weight_sync.inspection import join_checksums, piece_checksums
from waybill.engine.weight_sync.manifest import UpdateProgress
from waybill.engine.weight_sync.receiver import WeightReceiver
from waybill.engine.weight_sync.report import Outcome
from waybill.engine.weight_sync.sender import free_port
from waybill.engine.weight_sync.update_group import UpdateGroup
from waybill.parallel.mesh import ParallelMesh

CPU = torch.device("cpu")
HERE = "127.0.0.1"
Tensors = dict[str, torch.Tensor]


class Trainer:
    """A receiver of one rank, and the other end of its group."""

    def __init__(self) -> None:
        hf_config = Qwen3MoeConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            mlp_only_layers=[0],
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=4,
            tie_word_embeddings=True,
            eos_token_id=0,
            dtype="float32",
        )
        self.mesh = ParallelMesh.single(CPU)
        model = build(ModelContext(parse_config(hf_config, "nowhere", "auto"), self.mesh), 8)
        self.registry = GroupRegistry(self.mesh, 10.0, 8)
        self.receiver = WeightReceiver(model, self.mesh, self.registry)
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.group: UpdateGroup | None = None
        for weight in self.receiver.weights.values():
            weight.load(torch.zeros(weight.shape))

    @property
    def names(self) -> list[str]:
        return list(self.receiver.weights)

    def tensors(self, seed: int) -> Tensors:
        torch.manual_seed(seed)
        return {name: torch.randn(weight.shape) for name, weight in self.receiver.weights.items()}

    def sums(self) -> dict[str, str]:
        return join_checksums([piece_checksums(self.receiver.weights)], self.receiver.weights)

    def join(self) -> None:
        port, done = free_port(HERE), threading.Event()
        self.registry.join(InitWeightsUpdateGroup(HERE, port, 1, 2, "g", "gloo"), lambda error: done.set())
        self.group = UpdateGroup(HERE, port, 0, 2, "g", "gloo", CPU, 10.0)
        assert done.wait(10)

    def send(
        self, names: list[str], tensors: Tensors, *, num_sent: int | None = None, in_one: bool = False, **options: Any
    ) -> Outcome:
        """A bucket; the trainer is gone after `num_sent` of its tensors."""
        group = self.group
        assert group is not None

        def broadcast() -> None:
            if in_one:
                group.send_bucket([tensors[name] for name in names])
                return
            for name in names[:num_sent]:
                group.broadcast(tensors[name])
            if num_sent is not None:
                group.close()

        sending = self.pool.submit(broadcast)
        shapes = [list(tensors[name].shape) for name in names]
        load_format = "flattened_bucket" if in_one else "auto"
        op = UpdateWeightsFromDistributed(names, ["float32"] * len(names), shapes, "g", load_format, **options)
        outcome = self.receiver.update_weights(op)
        if outcome.success:
            sending.result()
        else:
            # The receiver has left the group, which ends a broadcast that nobody takes.
            sending.exception()
        return outcome


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    yield trainer
    trainer.pool.shutdown()


def sums_of(tensors: Tensors) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("in_one", [False, True])
def test_an_update_in_buckets(trainer: Trainer, in_one: bool) -> None:
    trainer.join()
    tensors, names = trainer.tensors(1), trainer.names
    first = trainer.send(names[:7], tensors, in_one=in_one, weight_version="v1")
    assert first.success and first.weight_version is None and "are still to come" in first.message
    last = trainer.send(names[7:], tensors, in_one=in_one, weight_version="v1")
    assert last.success and last.weight_version == "v1" and trainer.receiver.progress.blocked is None
    assert trainer.sums() == sums_of(tensors)
    assert trainer.send(names, tensors).weight_version == "update-2"


@pytest.mark.parametrize("staged_bytes", [1 << 30, 0])
def test_packed_broadcasts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, staged_bytes: int) -> None:
    """As vLLM's trainers send: each ends with the tensor that brings it over the bound."""
    monkeypatch.setattr(transfer, "MAX_STAGED_BYTES", staged_bytes)
    trainer.join()
    tensors, names, bound = trainer.tensors(1), trainer.names, 1_000
    group = trainer.group
    assert group is not None
    sent: list[list[str]] = [[]]
    for name in names:
        sent[-1].append(name)
        if sum(tensors[one].nbytes for one in sent[-1]) > bound:
            sent.append([])
    assert len(sent) > 2

    def broadcast() -> None:
        for bucket in filter(None, sent):
            group.send_bucket([tensors[name] for name in bucket])

    sending = trainer.pool.submit(broadcast)
    shapes = [list(tensors[name].shape) for name in names]
    op = UpdateWeightsFromDistributed(names, ["float32"] * len(names), shapes, "g", packed_bytes=bound)
    assert trainer.receiver.update_weights(op).success
    sending.result()
    assert trainer.sums() == sums_of(tensors)


def test_an_update_may_end_without_tensors(trainer: Trainer) -> None:
    trainer.join()
    tensors, before = trainer.tensors(1), trainer.sums()
    assert trainer.send(trainer.names[:3], tensors).weight_version is None
    end = UpdateWeightsFromDistributed([], [], [], "g", is_last=True, weight_version="v2")
    assert trainer.receiver.update_weights(end).weight_version == "v2"
    assert trainer.receiver.progress.blocked is None
    assert trainer.sums() == {**before, **sums_of({name: tensors[name] for name in trainer.names[:3]})}
    nothing = UpdateWeightsFromDistributed([], [], [], "g")
    assert trainer.receiver.update_weights(nothing).message.startswith("names: must not be empty")


def test_a_bucket_that_breaks_off_changes_nothing_where_nothing_was_changed_before(trainer: Trainer) -> None:
    trainer.join()
    before = trainer.sums()
    outcome = trainer.send(trainer.names, trainer.tensors(1), num_sent=4)
    assert not outcome.success and outcome.message.endswith("group 'g' is left, join it again; nothing was changed")
    assert trainer.sums() == before and trainer.receiver.progress.blocked is None


def test_a_later_bucket_that_breaks_off_tears_the_update(trainer: Trainer) -> None:
    trainer.join()
    tensors, names = trainer.tensors(1), trainer.names
    assert trainer.send(names[:7], tensors).success
    outcome = trainer.send(names[7:], tensors, num_sent=4)
    assert not outcome.success and outcome.message.startswith("weights: a transfer was torn (the transfer broke off")
    assert trainer.receiver.progress.blocked == Blocked(BlockedKind.TORN, outcome.message)
    trainer.join()
    assert "is_last" in trainer.send(names[7:], tensors, is_last=True).message
    trainer.join()
    assert trainer.send(names[7:], tensors).success and trainer.receiver.progress.blocked is not None
    assert trainer.send(names[:7], tensors).success and trainer.receiver.progress.blocked is None
    assert trainer.sums() == sums_of(tensors)


def test_more_than_may_be_staged_is_torn_when_it_breaks_off(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_STAGED_BYTES", 100)
    trainer.join()
    tensors = trainer.tensors(1)
    assert "torn" in trainer.send(trainer.names, tensors, num_sent=4).message
    trainer.join()
    assert trainer.send(trainer.names, tensors).success
    assert trainer.sums() == sums_of(tensors)


def load(trainer: Trainer, path: Path | str, *, whole: bool = False, **options: Any) -> Outcome:
    kind = UpdateWeightsFromDisk if whole else UpdateWeightsFromTensor
    return trainer.receiver.update_weights(kind(str(path), **options))


def test_files(trainer: Trainer, tmp_path: Path) -> None:
    tensors = trainer.tensors(1)
    save_file({**tensors, "lm_head.weight": torch.zeros(20, 8)}, tmp_path / "model.safetensors")
    assert load(trainer, tmp_path, whole=True, weight_version="disk").weight_version == "disk"
    assert trainer.sums() == sums_of(tensors)
    part = tmp_path / "part.safetensors"
    others = trainer.tensors(2)
    save_file({"model.norm.weight": others["model.norm.weight"]}, part)
    assert load(trainer, part, is_last=True, weight_version="part").weight_version == "part"
    assert trainer.sums() == sums_of({**tensors, "model.norm.weight": others["model.norm.weight"]})
    save_file({"lm_head.weight": torch.zeros(20, 8)}, part)
    outcome = load(trainer, part)
    assert outcome.success and outcome.weight_version is None, "the head is tied"


def failing_after(num_reads: int) -> Callable[..., None]:
    """Reads of a file that can be read so far, on a network file system say."""
    numbers = itertools.count()

    def read(*arguments: Any) -> None:
        if next(numbers) >= num_reads:
            raise OSError("input/output error")
        read_exactly(*arguments)

    return read


def test_a_file_that_breaks_off_in_the_middle_tears(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is right, and then it cannot be read."""
    save_file(trainer.tensors(1), tmp_path / "model.safetensors")
    before = trainer.sums()
    monkeypatch.setattr(read_plan, "MAX_READ_BYTES", 256)
    with monkeypatch.context() as patch:
        patch.setattr(weight_loader, "read_exactly", failing_after(0))
        outcome = load(trainer, tmp_path, whole=True)
        assert outcome.message == "the transfer broke off: input/output error; nothing was changed"
        assert trainer.sums() == before and trainer.receiver.progress.blocked is None
        patch.setattr(weight_loader, "read_exactly", failing_after(3))
        assert "torn (the transfer broke off: input/output error)" in load(trainer, tmp_path, whole=True).message
    assert trainer.receiver.progress.blocked is not None
    assert load(trainer, tmp_path, whole=True).success
    assert trainer.receiver.progress.blocked is None


@pytest.mark.parametrize("what", ["gone", "other", "shorter"])
def test_a_file_that_changes_after_it_was_checked(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = trainer.tensors(1)
    save_file(tensors, path)
    before = trainer.sums()

    def change(self: UpdateProgress, *arguments: Any, **options: Any) -> None:
        if what == "gone":
            path.unlink()
        elif what == "other":
            save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
        else:
            os.truncate(path, path.stat().st_size - 4)

    monkeypatch.setattr(UpdateProgress, "check", change)
    outcome = load(trainer, tmp_path, whole=True)
    words = {
        "gone": "No such file",
        "other": "it was written again since it was checked",
        "shorter": "a file ends before",
    }
    assert not outcome.success and words[what] in outcome.message
    if what != "shorter":
        assert trainer.sums() == before and trainer.receiver.progress.blocked is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "(?i)header|invalid|empty"),
        (b"\xff" * 64, "(?i)header"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "nothing|names"),
    ],
)
def test_damaged_files_change_nothing(trainer: Trainer, tmp_path: Path, content: bytes, words: str) -> None:
    before = trainer.sums()
    (tmp_path / "x.safetensors").write_bytes(content)
    outcome = load(trainer, tmp_path / "x.safetensors")
    assert trainer.sums() == before and trainer.receiver.progress.blocked is None
    if content.endswith(b"{}      "):
        assert outcome.weight_version is None, "a file without tensors names nothing"
    else:
        assert not outcome.success and outcome.message.endswith("; nothing was changed")


def probes(folder: Path) -> dict[str, str]:
    """Paths that a client may name, none of which is what it should be."""
    (folder / "secret.txt").write_text("a secret of 24 characters")
    (folder / "looks").write_bytes((30).to_bytes(8, "little") + b'{"secret": "word", "b": 123}  ')
    os.mkfifo(folder / "fifo")
    with (folder / "huge").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "loop").symlink_to(folder / "loop")
    return {
        name: str(folder / name)
        for name in ("secret.txt", "looks", "fifo", "huge", "loop", "nowhere", "a\0b", "x" * 3000)
    } | {
        "folder": str(folder),
        "zeros": "/dev/zero",
        "environment": "/proc/self/environ",
        "memory": "/proc/self/mem",
        "kernel": "/proc/kmsg",
    }


@pytest.mark.parametrize("whole", [False, True])
def test_a_path_says_nothing_of_what_is_there(trainer: Trainer, tmp_path: Path, whole: bool) -> None:
    """The same words for all, at once, with little memory."""
    before = trainer.sums()
    for path in probes(tmp_path).values():
        what, kind = ("model_path", "checkpoint folder") if whole else ("path", "safetensors file")
        assert load(trainer, path, whole=whole).message == (
            f"{what}={path!r}: must be a {kind} that every rank can read; the ranks' log says why; nothing was changed"
        )
    assert trainer.sums() == before


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, shard: str) -> None:
    (tmp_path / "elsewhere.safetensors").write_text("")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": shard}}))
    with pytest.raises(ValueError, match="shard of tensor t is not in this folder"):
        Checkpoint(str(folder))


def test_an_index_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"index\.json: must have at most \d+ bytes"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "index", ["", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x"}}', "\udcff"]
)
def test_damaged_indexes_change_nothing(trainer: Trainer, tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, errors="surrogateescape")
    outcome = load(trainer, tmp_path, whole=True)
    assert (
        not outcome.success
        and outcome.message.startswith("model_path=")
        and outcome.message.endswith("nothing was changed")
    )
