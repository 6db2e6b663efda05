"""Requests that run or wait while weights change, and the versions of their rows."""

from __future__ import annotations

import concurrent.futures
import time

import pytest
from support.weight_updates import GREEDY, LONG, PROMPTS, TIMEOUT_S, Recording, Tensors, as_runs, rows, runs

from waybill import Engine


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
