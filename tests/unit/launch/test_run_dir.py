"""The folder of a run: its owner's alone, and gone when nobody is left who could remove it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from waybill.engine.config import EngineConfig
from waybill.launch.run_dir import PREFIX, RunDir
from waybill.launch.supervisor import EngineProcess

HOLDER = """
import sys
from waybill.launch.run_dir import RunDir
run_dir = RunDir()
print(run_dir.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold_one() -> tuple[subprocess.Popen[str], Path]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def test_it_is_open_to_its_owner_alone_and_goes() -> None:
    run_dir = RunDir()
    assert Path(run_dir.path).stat().st_mode & 0o777 == 0o700
    (Path(run_dir.path) / "log").mkdir()
    run_dir.remove()
    run_dir.remove()
    assert not Path(run_dir.path).exists()


def test_the_next_run_removes_what_a_killed_one_left(temporary: Path) -> None:
    killed, stale = hold_one()
    living, kept = hold_one()
    (stale / "torchrun").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert stale.exists()
    run_dir = RunDir()
    assert set(os.listdir(temporary)) == {kept.name, Path(run_dir.path).name}
    run_dir.remove()
    living.communicate()


def test_it_leaves_alone_what_is_no_run_of_this_user(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    (temporary / f"{PREFIX}file").write_text("")
    (temporary / "waybill-other").mkdir()
    if os.geteuid() == 0:
        (temporary / f"{PREFIX}others").mkdir()
        os.chown(temporary / f"{PREFIX}others", 65534, 65534)
    before = set(os.listdir(temporary))
    RunDir().remove()
    assert set(os.listdir(temporary)) == before


def test_a_path_too_long_for_sockets_leaves_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = temporary / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ValueError, match="set TMPDIR to a shorter path"):
        EngineProcess(EngineConfig(model_path="m"), on_exit=lambda _: None)
    assert os.listdir(deep) == []
