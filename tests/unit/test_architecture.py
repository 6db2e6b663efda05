"""The rules of the folders: imports go one way, and what frontends and trainers import stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each part may import those before it.
ORDER = ("parallel", "engine", "client", "launch", "rollout")
LIGHT = [
    "waybill",
    "waybill.client",
    "waybill.engine.config",
    "waybill.engine.io_struct",
    "waybill.engine.sockets",
    "waybill.engine.generate_request",
    "waybill.engine.tokenizer_manager",
    "waybill.engine.output_processor",
    "waybill.engine.chat_template",
    "waybill.engine.routing.ledger",
    "waybill.engine.routing.wire",
    "waybill.launch.args",
    "waybill.launch.engine",
    "waybill.launch.frontend",
    "waybill.rollout.conversations",
    "waybill.launch.topology",
]
# Render chat templates with the renderer of transformers, which imports no torch.
WITH_TRANSFORMERS = {"waybill.engine.chat_template", "waybill.launch.frontend", "waybill.rollout.conversations"}
FORBIDDEN_NAMES = {"utils.py", "common.py", "misc.py", "base.py", "helpers.py"}


SOURCES = [path for part in ORDER for path in sorted((ROOT / part).rglob("*.py"))]


def imported_parts(path: Path) -> Iterator[str]:
    """Top-level parts of the package that a file imports, relative imports resolved."""
    package = ["waybill", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names = [node.module or ""]
            else:
                stem = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                names = [".".join([*stem, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "waybill" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = ORDER.index(path.relative_to(ROOT).parts[0])
    for part in imported_parts(path):
        assert part in ORDER, f"{path} imports {part}"
        assert ORDER.index(part) <= own, f"{path} imports {part}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_inside_the_package_imports_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] != "waybill"


def test_the_check_of_imports_can_fail() -> None:
    assert list(imported_parts(ROOT / "launch" / "worker.py")), "launch imports the engine, relatively"


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in SOURCES if path.name in FORBIDDEN_NAMES]


@pytest.mark.parametrize("module", LIGHT)
def test_messages_configuration_and_frontend_import_without_torch(module: str) -> None:
    heavy = {"torch", "deepspeed"} | ({"transformers"} if module not in WITH_TRANSFORMERS else set())
    script = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
