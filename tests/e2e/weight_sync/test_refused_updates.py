"""Updates that are refused or torn: nothing ever serves a mixture."""

from __future__ import annotations

import concurrent.futures
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.weight_updates import GREEDY, HERE, PROMPTS, LocalTrainer, Tensors, answers, assert_serves, request_of

from waybill import Engine
from waybill.engine.weight_sync.sender import WeightSender, free_port


def test_a_sender_passes_on_what_the_engine_refuses(replica: Engine, base: Tensors, tmp_path: Path) -> None:
    """The transfer breaks off at both ends; the reason is the engine's."""
    sender = WeightSender([(replica, 2)], group_name="refused")
    for named, words in (
        ([("model.nrom.weight", base["model.norm.weight"])], "names: the model has no model.nrom.weight"),
        ([("model.norm.weight", torch.zeros(127))], r"shape \(127,\): must be \(128,\)"),
    ):
        sender.connect()
        with pytest.raises(RuntimeError, match=f"weights were not sent: .*{words}.*nothing was changed"):
            sender.send(named)
        with pytest.raises(RuntimeError, match="call connect first"):
            sender.send(named)
    sender.close()
    assert_serves(replica, base)


def test_what_is_refused_changes_nothing(replica: Engine, base: Tensors, other: Tensors, tmp_path: Path) -> None:
    started = answers(replica)
    name = "model.norm.weight"
    fused = {"model.layers.1.mlp.experts.down_proj": torch.zeros(16, 128, 64)}
    alone = "model.layers.1.mlp.experts.0.down_proj.weight"
    for tensors, words in (
        ({"model.colour": other[name]}, "names: the model has no model.colour"),
        ({name: torch.zeros(127)}, r"shapes: model.norm.weight: shape \(127,\): must be \(128,\)"),
        ({name: torch.zeros(128, dtype=torch.int64)}, "tensor model.norm.weight: dtype I64: must be one of BF16"),
        ({**fused, alone: other[alone]}, r"both bring model\.layers\.1\.mlp\.experts\.\d+\.down_proj\.weight"),
    ):
        with pytest.raises(RuntimeError, match=f"{words}.*nothing was changed"):
            replica.update_weights_from_tensor({**{n: t for n, t in other.items() if n not in tensors}, **tensors})
        assert_serves(replica, base)
    for names, dtypes, shapes, words in (
        ([name], ["int8"], [[128]], "dtypes: model.norm.weight: 'int8'"),
        ([name] * 2, ["float32"] * 2, [[128]] * 2, "names: 'model.norm.weight' stands twice"),
        ([name], ["float32"], [[128]], "group_name: 'nobody' was not joined"),
    ):
        with pytest.raises(RuntimeError, match=words):
            replica.update_weights_from_distributed(names, dtypes, shapes, "nobody")
    with pytest.raises(RuntimeError, match=r"rank_offset=2: must lie in 1 .. 1"):
        replica.init_weights_update_group(HERE, free_port(HERE), 2, 3)
    with pytest.raises(RuntimeError, match="backend='mpi'"):
        replica.init_weights_update_group(HERE, free_port(HERE), 1, 3, "x", "mpi")
    assert_serves(replica, base, started)


def test_a_bad_checkpoint_changes_nothing(
    replica: Engine, checkpoint: str, base: Tensors, other: Tensors, tmp_path: Path
) -> None:
    started = answers(replica)
    name = "model.layers.3.self_attn.q_proj.weight"

    def write(folder: str, tensors: Tensors) -> Path:
        place = tmp_path / folder
        place.mkdir()
        save_file(tensors, place / "model.safetensors")
        return place

    lacking = write("lacking", {n: t for n, t in other.items() if n != name})
    misshaped = write("misshaped", {**other, name: other[name][:-1].clone()})
    truncated = write("truncated", other)
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:-100])
    no_index = tmp_path / "no_index"
    no_index.mkdir()
    (no_index / "model.safetensors.index.json").write_text('{"weight": 1}')
    for place, words in (
        (lacking, f"the checkpoint lacks 1 tensors: {name}"),
        (misshaped, f"tensor {name}: shape"),
        (truncated, "model_path=.*must be a checkpoint folder that every rank can read"),
        (no_index, "model_path=.*must be a checkpoint folder that every rank can read"),
        (tmp_path / "nowhere", "model_path="),
    ):
        with pytest.raises(RuntimeError, match=f"({words}).*nothing was changed"):
            replica.update_weights_from_disk(str(place))
    assert_serves(replica, base, started)


def test_a_refused_bucket_is_not_taken_for_the_next_one(replica: Engine, base: Tensors, other: Tensors) -> None:
    """Its sender may have begun to broadcast; in the same group those bytes would arrive as the next bucket's."""
    trainer = LocalTrainer(replica, "stale")
    with pytest.raises(RuntimeError, match=r"no model\.colour; nothing was changed; group 'stale' is left"):
        replica.update_weights_from_distributed(["model.colour"], ["float32"], [[1]], "stale")
    with pytest.raises(RuntimeError, match="'stale' was not joined"):
        replica.update_weights_from_distributed(*request_of(["model.norm.weight"], other), "stale")
    trainer.group.close()
    again = LocalTrainer(replica, "stale")
    again.send(list(other), other)
    again.close()
    assert_serves(replica, other)


@pytest.mark.parametrize("num_before", [0, 30])
def test_a_trainer_that_crashes(replica: Engine, base: Tensors, other: Tensors, num_before: int) -> None:
    """In its first bucket: the old weights serve. Later: nobody generates until one complete update."""
    started = answers(replica)
    trainer = LocalTrainer(replica, f"crash {num_before}")
    names = list(other)
    if num_before:
        trainer.send(names[:num_before], other, weight_version="new")
    with pytest.raises(RuntimeError) as broken:
        trainer.send(names[num_before:], other, num_sent=20, weight_version="new")
    if num_before == 0:
        assert "nothing was changed" in str(broken.value)
        assert_serves(replica, base, started)
        assert replica.get_server_info()["weight_version"] == "default"
        return
    assert "weights: a transfer was torn" in str(broken.value)
    with pytest.raises(RuntimeError, match="torn"):
        replica.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
    with pytest.raises(RuntimeError, match="is_last"):
        replica.update_weights_from_tensor({names[0]: base[names[0]]}, is_last=True)
    healing = LocalTrainer(replica, f"crash {num_before}")
    healing.send(names[40:], base, weight_version="healed")
    with pytest.raises(RuntimeError, match="torn"):
        replica.continue_generation()
    healing.send(names[:40], base, weight_version="healed")
    healing.close()
    assert_serves(replica, base, started)


def test_a_group_that_never_comes_together(replica: Engine, base: Tensors) -> None:
    """Generation goes on meanwhile; the reason comes when the time is over."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(replica.init_weights_update_group, HERE, free_port(HERE), 1, 3, "nobody")
        time.sleep(0.3)
        with pytest.raises(RuntimeError, match="'nobody' is taken"):
            replica.init_weights_update_group(HERE, free_port(HERE), 1, 3, "nobody")
        with pytest.raises(RuntimeError, match="has not come together yet"):
            replica.update_weights_from_distributed(*request_of(["model.norm.weight"], base), "nobody")
        num_answers = 0
        while not joining.done():
            replica.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
            num_answers += 1
        with pytest.raises(RuntimeError, match="group 'nobody' did not come together"):
            joining.result()
    assert num_answers > 5
    assert_serves(replica, base)
