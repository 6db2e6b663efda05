"""The output processor gives way to ranks of every session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from waybill.engine.ipc.priority import set_autogroup_nice

SCRIPT = """
import os
from pathlib import Path
from waybill.engine.ipc.priority import AUTOGROUP, give_way
give_way(7)
group = AUTOGROUP.read_text().split() if AUTOGROUP.is_file() else ["", "nice", "7"]
print(os.getsid(0) == os.getpid(), os.nice(0), group[-1])
"""


@pytest.mark.parametrize("leads_session", [True, False])
def test_low_priority_in_a_session_of_its_own(leads_session: bool) -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=leads_session)
    assert done.stdout.split() == ["True", str(os.nice(0) + 7), "7"]


def test_a_kernel_that_refuses_is_no_error(tmp_path: Path) -> None:
    set_autogroup_nice(tmp_path / "missing" / "autogroup", 7)
