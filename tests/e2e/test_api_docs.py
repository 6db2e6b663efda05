"""The examples of docs/api.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

from support.server_process import ROOT, ServerProcess

DOCUMENTED_URL = "http://127.0.0.1:30000"


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "api.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_shell_examples(server: ServerProcess) -> None:
    examples = blocks("sh")
    assert len(examples) == 2
    for example in examples:
        script = "set -e -o pipefail\n" + example.replace("curl -s", "curl -sf").replace(DOCUMENTED_URL, server.url)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, f"{example}\n{done.stderr}"


def test_python_examples(server: ServerProcess) -> None:
    """In order, as one program."""
    program = "\n".join(blocks("python"))
    assert program.count("assert") >= 8
    program = program.replace(DOCUMENTED_URL, server.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
