"""Which cores ranks are bound to: what may be written, what is refused, and where processes find themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.config import EngineConfig
from waybill.engine.validation.core_groups import parse_core_groups
from waybill.launch import cpu_binding
from waybill.launch.cpu_binding import as_ranges, cores_of_others, running_on
from waybill.launch.supervisor import agent_command, thread_settings, threads_per_rank

SETS_OF_CORES = st.sets(st.integers(0, 99999), min_size=1, max_size=20)


def config(bind: str | None, **fields: object) -> EngineConfig:
    return EngineConfig(model_path="m", cpu_threads_bind=bind, **fields)


@pytest.mark.parametrize(
    ("text", "groups"),
    [("0", [{0}]), ("0-3|4-7", [{0, 1, 2, 3}, {4, 5, 6, 7}]), ("0,2,8-9|1", [{0, 2, 8, 9}, {1}]), ("5-5", [{5}])],
)
def test_groups_are_cores_and_ranges(text: str, groups: list[set[int]]) -> None:
    assert parse_core_groups(text) == tuple(groups)


@given(st.lists(SETS_OF_CORES, min_size=1, max_size=4))
def test_what_is_written_is_what_is_read(groups: list[set[int]]) -> None:
    text = "|".join(as_ranges(cores) for cores in groups)
    if len(set().union(*groups)) == sum(map(len, groups)):
        assert parse_core_groups(text) == tuple(groups)
    else:
        with pytest.raises(ValueError, match="in one group alone"):
            parse_core_groups(text)


@pytest.mark.parametrize("text", ["", "|", "0|", "a", "0-", "-1", "0,,1", "0 |1", "1-2-3", "0-100000", "٣", "0\n"])
def test_what_is_no_list_of_groups_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"cpu_threads_bind={text!r}: must be cores and ranges of cores")):
        config(text)


@given(st.text(st.sampled_from("0129-,| "), max_size=12))
def test_whatever_is_written_is_read_or_refused_by_name(text: str) -> None:
    refusal = ""
    try:
        groups = parse_core_groups(text)
    except ValueError as error:
        refusal = str(error)
    assert f"cpu_threads_bind={text!r}: " in refusal or (all(groups) and len(groups) == text.count("|") + 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bind": "3-1"}, "cpu_threads_bind='3-1': 3-1: a range must not end below its first core"),
        ({"bind": "0-3|3-4"}, "cpu_threads_bind='0-3|3-4': core 3 must be in one group alone"),
        (
            {"bind": "0-3|4", "num_threads": 2},
            "num_threads=2: must be at most 1, the cores of group 1 of cpu_threads_bind",
        ),
    ],
)
def test_a_configuration_that_no_machine_could_have_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        config(**fields)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
def test_the_others_have_what_is_left_or_all() -> None:
    assert cores_of_others(config("0-2|3,5"), 2) == {4, 6, 7}
    assert cores_of_others(config("0-3|4-7"), 2) == set(range(8))
    assert cores_of_others(config(None), 2) is None


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ("0-7", "cpu_threads_bind='0-7': must have 2 groups, one for each rank of a node; it has 1"),
        ("0|1|2", "must have 2 groups, one for each rank of a node; it has 3"),
        ("0-3|4-9", "cpu_threads_bind='0-3|4-9': core 8 must be one of those that this process may use: 0-7"),
    ],
)
def test_groups_that_this_node_cannot_have_are_refused(bind: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        cores_of_others(config(bind), 2)


def test_other_systems_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_binding.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs Linux, this is darwin"):
        cores_of_others(config("0"), 1)


@pytest.mark.usefixtures("eight_cores")
def test_a_bound_rank_has_as_many_threads_as_cores() -> None:
    # In a bound rank all of the process' cores are its own.
    assert threads_per_rank(config("0-7"), 1) == 8
    # One setting for all ranks: none has more threads than cores before it has set its own number.
    assert thread_settings(config("0-4|5-7"), 2)["OMP_NUM_THREADS"] == "3"
    assert thread_settings(config("0-4|5-7", num_threads=2), 2)["OMP_NUM_THREADS"] == "2"


def test_a_command_is_bound_before_it_is_begun() -> None:
    """And is the same as it would be else."""
    cores = sorted(os.sched_getaffinity(0))
    command = agent_command(1, "/tmp/run", f"99999|{cores[-1]}")
    here = command.index(cpu_binding.MODULE)
    code = "import json, os, sys; print(json.dumps([os.getpid(), [*os.sched_getaffinity(0)], sys.orig_argv]))"
    words = [sys.executable, "-u", "-m", *command[here : here + 2], "-c", code, "-m", "x"]
    with subprocess.Popen(words, env=os.environ | {"LOCAL_RANK": "1"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.load(process.stdout) == [process.pid, cores[-1:], [sys.executable, "-u", "-c", code, "-m", "x"]]


def test_a_process_is_bound_with_the_threads_that_it_has() -> None:
    code = """
import os, threading
from waybill.launch.cpu_binding import keep_to

done = threading.Event()
threads = [threading.Thread(target=done.wait) for _ in range(3)]
for thread in threads:
    thread.start()
core = max(os.sched_getaffinity(0))
keep_to({core})
tasks = [int(name) for name in os.listdir("/proc/self/task")]
assert len(tasks) >= 4 and all(os.sched_getaffinity(task) == {core} for task in tasks)
done.set()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_started_meanwhile_is_bound_and_nothing_else() -> None:
    before = os.sched_getaffinity(0)
    with running_on({max(before)}):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with running_on(None):
        assert os.sched_getaffinity(0) == before
