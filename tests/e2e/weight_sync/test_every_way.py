"""Every way that brings weights to a running engine brings all of them."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.field_trainer import FieldTrainer
from support.weight_updates import HERE, Tensors, answers, assert_serves, request_of
from transformers import AutoModelForCausalLM

from waybill import Engine
from waybill.engine.weight_sync.delta_file import write_delta
from waybill.engine.weight_sync.delta_maker import DeltaMaker
from waybill.engine.weight_sync.delta_sender import DeltaSender, MemorySender
from waybill.engine.weight_sync.sender import WeightSender, free_port, gathered_tensors


def test_every_way_brings_every_tensor(
    engine: Engine, checkpoint: str, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    """There on one way, back on another: the answers are those of the engine as it was started, byte for byte."""
    started = answers(engine)
    assert_serves(engine, base)
    engine.update_weights_from_tensor(other, weight_version="by tensor")
    assert_serves(engine, other)
    changed = answers(engine)
    assert changed != started
    sender = WeightSender([(engine, 2)], bucket_bytes=300_000, group_name="buckets")
    sender.connect()
    report = sender.send(base.items(), weight_version="by group")
    assert report.num_tensors == len(base) and report.num_bytes == sum(t.nbytes for t in base.values())
    assert_serves(engine, base, started)
    assert engine.get_server_info()["weight_version"] == "by group"
    sender.send(other.items())
    assert_serves(engine, other, changed)
    assert engine.get_server_info()["weight_version"].startswith("update-")
    sender.close()
    engine.update_weights_from_disk(checkpoint, weight_version="by disk")
    assert_serves(engine, base, started)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    fused = dict(gathered_tensors(model))
    assert any(name.endswith("experts.gate_up_proj") for name in fused), "as transformers holds them"
    engine.update_weights_from_tensor(other)
    half = len(fused) // 2
    for number, part in enumerate((list(fused)[:half], list(fused)[half:])):
        engine.update_weights_from_tensor({name: fused[name] for name in part}, weight_version="fused")
        assert bool(engine.get_server_info()["blocked"]) == (number == 0)
    assert_serves(engine, base, started)


@pytest.mark.parametrize("way", ["group", "memory", pytest.param("folder", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("engine", ["tp2", pytest.param("dp2", marks=pytest.mark.matrix)], indirect=True)
def test_deltas_bring_what_a_full_update_would(engine: Engine, base: Tensors, way: str, tmp_path: Path) -> None:
    """From the checkpoint to weights of which some values moved, one way each; on another base nothing happens."""
    base = {name: tensor.float() for name, tensor in base.items() if name != "lm_head.weight"}
    moved = {name: torch.where(torch.rand(t.shape) < 0.05, t * (1 + 2**-7), t) for name, t in base.items()}
    sender = WeightSender([(engine, 2)], group_name=f"delta {way}") if way == "group" else MemorySender([engine])
    updates = DeltaSender(sender, DeltaMaker(chunk_values=5000, bucket_bytes=20_000))
    with sender if isinstance(sender, WeightSender) else nullcontext():
        full = updates.send(base.items(), weight_version="full")
        assert not updates.sends_full
        if way == "folder":
            maker = DeltaMaker()
            dict(maker.remember(base.items()))
            for number, bucket in enumerate(maker.deltas(moved.items())):
                write_delta(bucket, tmp_path / f"delta-{number}.safetensors")
            engine.update_weights_from_disk(
                str(tmp_path), load_format="delta", base_version="full", weight_version="moved"
            )
        else:
            delta = updates.send(moved.items(), weight_version="moved")
            assert delta.num_bytes < 0.1 * full.num_bytes and delta.num_tensors == full.num_tensors
        assert_serves(engine, moved)
        assert engine.get_server_info()["weight_version"] == "moved"
        engine.update_weight_version("theirs")
        with pytest.raises(
            RuntimeError, match=r"base_version='(full|moved)': the weights here are 'theirs'; send a full"
        ):
            updates.send(base.items(), weight_version="again")
        assert_serves(engine, moved)
        assert engine.get_server_info()["weight_version"] == "theirs" and updates.sends_full
        if isinstance(sender, WeightSender):
            sender.connect()
        updates.send(base.items(), weight_version="again")
    assert_serves(engine, base)


def test_a_trainer_of_the_field(
    replica: Engine, checkpoint: str, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    """It joins with torch's own helper, sends one tensor a name, and is killed in the middle of its second bucket."""
    started = answers(replica)
    path = str(tmp_path / "other.safetensors")
    save_file(other, path)
    trainer = FieldTrainer()
    try:
        port = free_port(HERE)
        trainer.tell("join", port, 3, "field")
        replica.init_weights_update_group(HERE, port, 1, 3, "field")
        trainer.wait()
        names = list(other)
        trainer.tell("broadcast", path, names, "float32")
        replica.update_weights_from_distributed(*request_of(names, other), "field", weight_version="field-1")
        trainer.wait()
        assert_serves(replica, other)
        assert replica.generate(input_ids=[1])["meta_info"]["weight_version"] == "field-1"
        half = len(names) // 2
        trainer.tell("broadcast", path, names[:half], "float32")
        replica.update_weights_from_distributed(*request_of(names[:half], other), "field", weight_version="field-2")
        trainer.wait()
        trainer.tell("broadcast", path, names[half:-2], "float32")
        kill = threading.Timer(1.0, trainer.kill)
        kill.start()
        with pytest.raises(RuntimeError, match="weights: a transfer was torn"):
            replica.update_weights_from_distributed(*request_of(names[half:], other), "field", weight_version="field-2")
        kill.join()
    finally:
        trainer.stop()
    with pytest.raises(RuntimeError, match="send one complete update"):
        replica.generate(input_ids=[1])
    with pytest.raises(RuntimeError, match="torn"):
        replica.continue_generation()
    replica.update_weights_from_disk(checkpoint, weight_version="healed")
    assert_serves(replica, base, started)
