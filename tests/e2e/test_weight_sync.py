"""Weight updates of real engines: what arrives, what waits, what is refused, and that nothing ever serves a mixture."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.field_trainer import FieldTrainer
from transformers import AutoModelForCausalLM

from waybill import Engine
from waybill.engine.weight_sync.checksum import checksum
from waybill.engine.weight_sync.delta_file import write_delta
from waybill.engine.weight_sync.delta_maker import DeltaMaker
from waybill.engine.weight_sync.delta_sender import DeltaSender, MemorySender
from waybill.engine.weight_sync.sender import WeightSender, free_port, gathered_tensors
from waybill.engine.weight_sync.update_group import UpdateGroup

HERE = "127.0.0.1"
GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 60}
TIMEOUT_S = 8.0
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enable_return_routed_experts": True,
    "kv_cache_tokens": 400,
    "weight_sync_timeout_s": TIMEOUT_S,
}
PROMPTS = [list(text.encode()) for text in ("start with 12", "a longer prompt, add 30", "x")]

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(checkpoint: str) -> Tensors:
    return load_file(f"{checkpoint}/model.safetensors")


@pytest.fixture(scope="module")
def other(base: Tensors) -> Tensors:
    """Other weights, which answer and route otherwise."""
    torch.manual_seed(7)
    return {name: (t + torch.randn(t.shape) * 0.3 * t.float().std()).to(t.dtype) for name, t in base.items()}


@pytest.fixture(scope="module")
def tp2(checkpoint: str) -> Iterator[Engine]:
    with Engine(checkpoint, tp_size=2, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def dp2(checkpoint: str) -> Iterator[Engine]:
    with Engine(checkpoint, tp_size=1, dp_size=2, **OPTIONS) as engine:
        yield engine


@pytest.fixture(params=["tp2", "dp2"])
def engine(request: pytest.FixtureRequest, checkpoint: str) -> Engine:
    """Each with the weights of the checkpoint, whatever the test before did."""
    engine: Engine = request.getfixturevalue(request.param)
    return with_base(engine, checkpoint)


@pytest.fixture
def replica(tp2: Engine, checkpoint: str) -> Engine:
    return with_base(tp2, checkpoint)


def with_base(engine: Engine, checkpoint: str) -> Engine:
    engine.abort_request(abort_all=True)
    if engine.get_server_info()["blocked"].startswith("memory"):
        engine.resume_memory_occupation()
    if engine.get_server_info()["weight_version"] != "default" or engine.get_server_info()["blocked"]:
        engine.update_weights_from_disk(checkpoint, weight_version="default")
    engine.continue_generation()
    engine.flush_cache()
    return engine


def sums(tensors: Tensors) -> dict[str, str]:
    return {name: checksum(tensor.float()) for name, tensor in tensors.items() if name != "lm_head.weight"}


def answers(engine: Engine) -> str:
    """Tokens and rows of some prompts, from an empty cache."""
    engine.flush_cache()
    found = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, return_routed_experts=True)
    return json.dumps([(a["output_ids"], a["meta_info"]["routed_experts"].tolist()) for a in found])


def runs(answer: dict[str, Any]) -> list[list[Any]]:
    return [list(run) for run in answer["meta_info"]["routed_experts_meta"]["weight_versions"]]


def rows(answer: dict[str, Any]) -> np.ndarray:
    return answer["meta_info"]["routed_experts"]


def request_of(
    names: list[str], tensors: Tensors, dtype: str = "float32"
) -> tuple[list[str], list[str], list[list[int]]]:
    return names, [dtype] * len(names), [list(tensors[name].shape) for name in names]


class LocalTrainer:
    """The trainer's end of an update group, in this process."""

    def __init__(self, engine: Engine, name: str, num_ranks: int = 2) -> None:
        port = free_port(HERE)
        cpu = torch.device("cpu")
        self.name = name
        self._engine = engine
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            own = pool.submit(UpdateGroup, HERE, port, 0, 1 + num_ranks, name, "gloo", cpu, TIMEOUT_S)
            engine.init_weights_update_group(HERE, port, 1, 1 + num_ranks, name)
            self.group = own.result()

    def send(self, names: list[str], tensors: Tensors, num_sent: int | None = None, **options: Any) -> None:
        """Announce all, broadcast the first `num_sent` of them, then be gone if that is not all."""

        def broadcast() -> None:
            for name in names[:num_sent]:
                self.group.broadcast(tensors[name].float())
            if num_sent is not None:
                self.group.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sending = pool.submit(broadcast)
            self._engine.update_weights_from_distributed(*request_of(names, tensors), self.name, **options)
            sending.result()

    def close(self) -> None:
        self._engine.destroy_weights_update_group(self.name)
        self.group.close()


def assert_serves(engine: Engine, tensors: Tensors, answer: str | None = None) -> None:
    assert engine.get_server_info()["blocked"] == ""
    assert engine.checksum_weights() == sums(tensors)
    if answer is not None:
        assert answers(engine) == answer


# --- every way in -----------------------------------------------------------------------------------------------------


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


# --- failures ---------------------------------------------------------------------------------------------------------


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


# --- what waits -------------------------------------------------------------------------------------------------------


def test_requests_wait_for_an_open_update_and_for_no_longer_than_configured(
    replica: Engine, base: Tensors, other: Tensors
) -> None:
    names = list(other)
    replica.update_weights_from_tensor({name: other[name] for name in names[:10]}, weight_version="new")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        waiting = pool.submit(replica.generate, input_ids=PROMPTS[0], sampling_params=GREEDY)
        # It is answered with the new weights, all of them.
        time.sleep(0.5)
        assert not waiting.done()
        replica.update_weights_from_tensor({name: other[name] for name in names[10:]}, weight_version="new")
        assert waiting.result()["meta_info"]["weight_version"] == "new"
        replica.update_weights_from_tensor({names[0]: base[names[0]]}, weight_version="never ended")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"weights: an update is not complete: .* tensors are still to come"):
            replica.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
        assert time.monotonic() - began >= TIMEOUT_S


def test_what_runs_comes_to_its_end_first(engine: Engine, other: Tensors) -> None:
    """Without a pause an update drains the engine; with `abort_all_requests` it ends what runs."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(engine.generate, input_ids=prompt, sampling_params=LONG) for prompt in PROMPTS]
        time.sleep(0.1)
        engine.update_weights_from_tensor(other, weight_version="drained")
        for future in running:
            meta = future.result()["meta_info"]
            # Those that had not been sent yet came after it.
            assert (meta["weight_version"], meta["completion_tokens"]) in (("default", 60), ("drained", 60))
    assert engine.get_server_info()["weight_version"] == "drained"


# --- provenance -------------------------------------------------------------------------------------------------------


class Recording:
    """A stream whose rows are kept as they were made, each with the version of its chunk."""

    def __init__(self, engine: Engine, prompt: list[int], num_tokens: int, pause_at: int) -> None:
        params = {**GREEDY, "max_new_tokens": num_tokens}
        self._stream = engine.generate(
            input_ids=prompt,
            sampling_params=params,
            stream=True,
            return_routed_experts=True,
            stream_routed_experts=True,
        )
        self.chunks: list[dict[str, Any]] = []
        self.prompt = prompt
        while len(self.chunks) < pause_at:
            self.chunks.append(next(self._stream))

    def finish(self) -> None:
        self.chunks += list(self._stream)

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([rows(chunk) for chunk in self.chunks])

    @property
    def versions(self) -> list[str]:
        """By position, as the chunks said when they came."""
        found: list[str] = []
        for chunk in self.chunks:
            for version, start, end in runs(chunk):
                assert start == len(found)
                found += [version] * (end - start)
        return found

    @property
    def output_ids(self) -> list[int]:
        return self.chunks[-1]["output_ids"]


def as_runs(versions: list[str]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for position, version in enumerate(versions):
        if found and found[-1][0] == version:
            found[-1][2] = position + 1
        else:
            found.append([version, position, position + 1])
    return found


def test_the_cache_is_not_flushed_under_requests_that_run(engine: Engine, other: Tensors) -> None:
    recording = Recording(engine, PROMPTS[0], 150, 5)
    engine.pause_generation("in_place")
    with pytest.raises(RuntimeError, match="flush_cache: must be false while requests run"):
        engine.update_weights_from_tensor(other, flush_cache=True)
    engine.continue_generation()
    recording.finish()
    assert set(recording.versions) == {"default"}


@pytest.mark.parametrize(("mode", "cache"), [("in_place", "kept"), ("retract", "kept"), ("retract", "flushed")])
def test_a_rollout_across_an_update(engine: Engine, other: Tensors, mode: str, cache: str) -> None:
    """Rows and versions of the answer are those recorded when its tokens were sampled; the prefix cache is kept or flushed
    exactly as the request says."""
    before = engine.get_server_info()["num_retractions"]
    quiet = engine.generate(input_ids=PROMPTS[1], sampling_params=GREEDY, return_routed_experts=True)
    whole = {
        "input_ids": PROMPTS[0],
        "sampling_params": {**GREEDY, "max_new_tokens": 150},
        "return_routed_experts": True,
    }
    recording = Recording(engine, PROMPTS[0], 150, 5)
    inline = concurrent.futures.ThreadPoolExecutor(1).submit(engine.generate, **{**whole, "extra_key": "another"})
    time.sleep(0.05)
    engine.pause_generation(mode)
    kept_rows = len(recording.rows)
    if cache == "flushed":
        # The order of the dialect's trainers: pause, flush, update, go on. What was retracted holds no pages.
        engine.flush_cache()
        # Rank 0 answers for all; what another says of itself may be from the moment before.
        deadline = time.monotonic() + TIMEOUT_S
        while engine.get_server_info()["num_cached_pages"]:
            assert time.monotonic() < deadline
    engine.update_weights_from_tensor(other, flush_cache=cache == "flushed", weight_version="new")
    engine.continue_generation()
    recording.finish()
    versions = recording.versions
    assert len(versions) == len(recording.rows) == len(PROMPTS[0]) + 150 - 1
    assert set(versions) == {"default", "new"} and versions == sorted(versions), "one change, from old to new"
    assert versions.index("new") >= kept_rows, "rows that had been shipped keep their version"
    meta = recording.chunks[-1]["meta_info"]
    assert meta["weight_version"] == "new"
    # A token is sampled from the row before it.
    of_tokens = as_runs(versions[len(PROMPTS[0]) - 1 :])
    assert [[span["version"], span["start"], span["end"]] for span in meta["weight_versions"]] == of_tokens
    assert (engine.get_server_info()["num_retractions"] > before) == (mode == "retract")
    # The answer in one piece has the same two runs.
    meta_runs = runs(inline.result())
    assert [run[0] for run in meta_runs] in (["default", "new"], ["default"], ["new"])
    assert meta_runs[-1][2] == len(versions)
    # What the cache still holds is what the old weights computed.
    again = engine.generate(
        input_ids=PROMPTS[1] + quiet["output_ids"], sampling_params=GREEDY, return_routed_experts=True
    )
    num_cached = again["meta_info"]["cached_tokens"]
    if cache == "flushed":
        assert num_cached == 0 and [run[0] for run in runs(again)] == ["new"]
    else:
        assert num_cached >= len(PROMPTS[1])
        assert runs(again) == [["default", 0, num_cached], ["new", num_cached, len(rows(again))]]
        assert rows(again)[:num_cached].tobytes() == rows(quiet)[:num_cached].tobytes()


def test_a_pause_that_aborts_answers_with_what_there_is(engine: Engine, other: Tensors) -> None:
    recording = Recording(engine, PROMPTS[0], 300, 5)
    engine.pause_generation("abort")
    recording.finish()
    assert recording.chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert recording.versions == ["default"] * (len(PROMPTS[0]) + len(recording.output_ids) - 1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, input_ids=PROMPTS[0], sampling_params=GREEDY)
        engine.update_weights_from_tensor(other, weight_version="new")
        assert not waiting.done()
        engine.continue_generation()
        assert waiting.result()["meta_info"]["weight_version"] == "new"


def test_retractions_by_a_small_pool_keep_rows_and_versions(replica: Engine, other: Tensors) -> None:
    """More requests than the pool holds, an update in their middle: each row is the one that was streamed."""
    before = replica.get_server_info()["num_retractions"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        prompts = [[i + 1] * 90 for i in range(4)]
        recordings = list(pool.map(lambda prompt: Recording(replica, prompt, 100, 3), prompts))
        replica.pause_generation("in_place")
        replica.update_weights_from_tensor(other, flush_cache=False, weight_version="new")
        replica.continue_generation()
        list(pool.map(Recording.finish, recordings))
    assert replica.get_server_info()["num_retractions"] > before
    for recording in recordings:
        assert len(recording.versions) == 90 + 100 - 1
        assert [run[0] for run in as_runs(recording.versions)] == ["default", "new"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_given_back_and_taken_again(engine: Engine, checkpoint: str, base: Tensors) -> None:
    started = answers(engine)
    recording = Recording(engine, PROMPTS[0], 200, 2)
    with pytest.raises(RuntimeError, match="only when nothing runs or waits"):
        engine.release_memory_occupation()
    recording.finish()
    with pytest.raises(RuntimeError, match="tags: 'colour' must be one of"):
        engine.release_memory_occupation(["colour"])
    engine.release_memory_occupation(["kv_cache"])
    with pytest.raises(RuntimeError, match="memory: kv_cache is released"):
        engine.generate(input_ids=[1])
    engine.resume_memory_occupation()
    assert_serves(engine, base, started)
    engine.release_memory_occupation()
    for refused in (
        lambda: engine.generate(input_ids=[1]),
        lambda: engine.get_weights_by_name("model.norm.weight"),
        engine.checksum_weights,
        engine.continue_generation,
        lambda: engine.update_weights_from_disk(checkpoint),
    ):
        with pytest.raises(RuntimeError, match="memory: kv_cache, weights is released"):
            refused()
    engine.resume_memory_occupation(["weights"])
    with pytest.raises(RuntimeError, match="is_last: an earlier update did not end"):
        engine.update_weights_from_tensor({"model.norm.weight": base["model.norm.weight"]}, is_last=True)
    engine.update_weights_from_disk(checkpoint)
    engine.resume_memory_occupation(["kv_cache"])
    assert_serves(engine, base, started)


def test_weights_are_read_back(engine: Engine, base: Tensors) -> None:
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.9.down_proj.weight"):
        assert engine.get_weights_by_name(name, 5) == base[name][:5].float().tolist()
    fused = engine.get_weights_by_name("model.layers.2.mlp.experts.gate_up_proj", 9)
    expected = [
        torch.cat([base[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")])
        for e in range(9)
    ]
    assert fused == torch.stack(expected).float().tolist()
    with pytest.raises(RuntimeError, match=r"the model has no 'model\.colour'"):
        engine.get_weights_by_name("model.colour")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_takes_new_weights_and_gives_its_memory_back(checkpoint: str, base: Tensors, other: Tensors) -> None:
    """Its CUDA graphs hold the addresses of weights and KV pool."""
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        started = answers(engine)
        engine.update_weights_from_tensor(other, weight_version="other")
        assert_serves(engine, other)
        changed = answers(engine)
        assert changed != started
        engine.update_weights_from_disk(checkpoint)
        assert_serves(engine, base, started)
        engine.release_memory_occupation()
        with pytest.raises(RuntimeError, match="memory: kv_cache, weights is released"):
            engine.generate(input_ids=[1])
        engine.resume_memory_occupation()
        engine.update_weights_from_tensor(other, weight_version="other")
        assert_serves(engine, other, changed)


def on_second_gpu(tensors: Tensors) -> Tensors:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    return {name: tensor.to("cuda:1") for name, tensor in tensors.items()}


@pytest.mark.gpu
def test_a_trainer_sends_from_one_gpu_to_an_engine_on_another(checkpoint: str, base: Tensors, other: Tensors) -> None:
    """By NCCL, in buckets; made on a stream of the trainer's own."""
    there, back = on_second_gpu(other), on_second_gpu(base)
    device, stream = torch.device("cuda", 1), torch.cuda.Stream(1)
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        started = answers(engine)
        with WeightSender([(engine, 1)], device=device, bucket_bytes=300_000, timeout_s=60.0) as sender:
            with torch.cuda.stream(stream):
                sender.send(((name, tensor * 2 / 2) for name, tensor in there.items()), weight_version="there")
            assert_serves(engine, other)
            assert answers(engine) != started
            sender.send(back.items(), weight_version="back")
            assert_serves(engine, base, started)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_good", [1, 0])
def test_a_bucket_between_gpus_that_is_refused_ends_the_group(checkpoint: str, base: Tensors, num_good: int) -> None:
    """Also the first one, with which NCCL would only now connect its ends."""
    tensors = on_second_gpu(base)
    with Engine(checkpoint, tp_size=1, device="cuda", **OPTIONS) as engine:
        sender = WeightSender([(engine, 1)], device=torch.device("cuda", 1), timeout_s=20.0)
        sender.connect()
        for _ in range(num_good):
            sender.send(tensors.items())
        with pytest.raises(RuntimeError, match="the model has no model\\.colour"):
            sender.send([("model.colour", torch.zeros(3, device="cuda:1"))])
        sender.connect()
        sender.send(tensors.items())
        assert_serves(engine, base)
        sender.close()
