"""The GPU benchmark's dry run: the leader in a benchmark's process, with a real output processor beside it; and all layouts
of up to eight ranks, with all that the report on them has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from gpu_layout_plan import LAYOUTS
from gpu_processors import SETTINGS
from stall_everywhere import VARIANTS

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.matrix
def test_every_workload_is_measured_at_a_toy_size() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--skip", "correctness", "capture", "profile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(",")[0] for name in numbers} == {"decode", "prefill"}
    assert all(of["tokens_per_s"] > 0 and of["share"] > 0 for of in numbers.values())


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_all_layouts_of_eight_ranks() -> None:
    """Some twenty minutes on two cores. Routes are compared in float32, with `transformers` as well: the same bytes, or a
    near-tie."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--layouts", "--layout-timeout", "900"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # One device also decodes as many as both of two groups have in all.
    assert [each["total"] for each in found["tp1"]["decode"]] == [1, 2, 8]
    for name in LAYOUTS:
        assert {1, 8} <= {each["total"] for each in found[name]["decode"]}
        assert {1, 8} == {each["total"] for each in found[name]["profile"]}
        assert all(each["tokens_per_s"] > 0 and each["share"] > 0 for each in found[name]["decode"])
        assert all(each["tokens_per_s"] > 0 and each["share"] > 0 for each in found[name]["prefill"])
    routes = found["routes"]["routes"]
    assert [each["layout"] for each in routes] == list(LAYOUTS)
    assert all(each["differing"] == 0 or each["forced"] + each["tied_tokens"] for each in routes)
    assert {each["variant"] for each in found["stall"]["stall"]} == set(VARIANTS)
    assert all(each["dp"] == 8 and each["finishes"] == 7 * 3 for each in found["stall"]["stall"])
    processors = found["processors"]["processors"]
    assert [(each["setting"], each["processors"]) for each in processors] == list(zip(SETTINGS, (1, 1, 2), strict=True))
