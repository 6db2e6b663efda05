"""What ranks are told of their threads, and what the user's own settings are worth."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from waybill.engine.config import EngineConfig
from waybill.launch import supervisor
from waybill.launch.supervisor import EngineProcess, thread_settings


class Started(Exception):
    """Instead of a process."""


def environment_of(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found: dict[str, str] = {}

    def start(*arguments: Any, env: dict[str, str], **options: Any) -> None:
        found.update(env)
        raise Started

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(Started):
        EngineProcess(config, on_exit=print)
    return found


def test_ranks_share_the_cores_and_their_threads_do_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert thread_settings(EngineConfig(model_path="m"), 3)["OMP_NUM_THREADS"] == "4"
    assert thread_settings(EngineConfig(model_path="m", num_threads=5), 3)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = environment_of(EngineConfig(model_path="m", tp_size=2), monkeypatch)
    assert environment["GOMP_SPINCOUNT"] == str(supervisor.SPIN_COUNT)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "infinity"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert environment_of(EngineConfig(model_path="m"), monkeypatch).items() >= mine.items()
