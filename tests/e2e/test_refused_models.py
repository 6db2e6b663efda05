"""A model that cannot be served, on the command line: one line says why, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from support.server_process import ROOT


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["serve", "--port", "0"], id="serve"),
        pytest.param(["rollout"], id="rollout", marks=pytest.mark.matrix),
    ],
)
def test_the_reason_is_said_once_and_without_a_traceback(checkpoint: str, tmp_path: Path, words: list[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    # Sockets lie in there: its path is short.
    with tempfile.TemporaryDirectory(prefix="wb-") as temporary:
        done = subprocess.run(
            ["./torchrun.sh", *words, "--model", str(model), "--tp", "2"],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert os.listdir(temporary) == []
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count("waybill: hidden_act='gelu': must be 'silu'") == 1
    # The others are torchrun's, of the ranks that it ends.
    assert "Traceback" not in done.stderr and len(lines) < 8, done.stderr
