"""Connections leave room for the engine's own files. Each case is a process of its own: the limit is the process'."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
soft, hard, asked, files = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None, int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from waybill.launch.open_files import connections_within_limit
try:
    most = connections_within_limit(asked, 2, 32, files)
except ValueError as error:
    print(error)
else:
    print(most, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits(soft: int, hard: int, asked: int, files: int = 1) -> str:
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(asked), str(files)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_soft_limit_is_raised_as_far_as_needed() -> None:
    most, soft, hard = map(int, limits(256, 2000, 1000).split())
    assert most == 1000 and hard == 2000 and 1000 + 32 + 64 < soft < 1200


def test_the_default_takes_what_there_is() -> None:
    most, soft, _ = map(int, limits(256, 512, 0).split())
    assert soft == 512 and 300 < most < 512 - 32 - 64


@pytest.mark.parametrize(("hard", "asked"), [(512, 500), (100, 0)])
def test_what_does_not_fit_is_said(hard: int, asked: int) -> None:
    assert "--max-connections" in limits(hard, hard, asked) and "ulimit -n" in limits(hard, hard, asked)


def test_a_router_opens_more_for_each() -> None:
    one, three = (int(limits(512, 512, 0, files).split()[0]) for files in (1, 3))
    assert three == one // 3
    assert limits(512, 512, 0, 1000).startswith("--max-connections")
