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
ORDER = ("parallel", "engine", "client", "conformance", "launch", "rollout")
LIGHT = [
    "waybill",
    "waybill.client",
    "waybill.conformance.command",
    "waybill.engine.config",
    "waybill.engine.io_struct",
    "waybill.engine.ipc.sockets",
    "waybill.engine.frontend.generate_request",
    "waybill.engine.frontend.tokenizer_manager",
    "waybill.engine.output.output_processor",
    "waybill.engine.frontend.chat_template",
    "waybill.engine.routing.ledger",
    "waybill.engine.routing.wire",
    "waybill.launch.args",
    "waybill.launch.engine",
    "waybill.launch.frontend",
    "waybill.rollout.conversations",
    "waybill.launch.topology",
]
# Render chat templates with the renderer of transformers, which imports no torch.
WITH_TRANSFORMERS = {
    "waybill.engine.frontend.chat_template",
    "waybill.launch.frontend",
    "waybill.rollout.conversations",
}
# What each folder or file of the engine may import of the others. Processes know what they talk over, not each other; a
# trainer's replay and weight sender reach neither scheduler nor runner.
ROOMS: dict[str, set[str]] = {
    "validation": set(),
    "grammar": set(),
    "chat_formats": set(),
    "config": {"validation"},
    "io_struct": {"routing"},
    "control": {"validation"},
    "vision": set(),
    "plan": {"control", "grammar", "io_struct", "vision"},
    "ipc": {"control", "io_struct", "vision"},
    "text": set(),
    "kv_cache": set(),
    "attention": set(),
    "routing": {"io_struct"},
    "models": {"attention", "config", "kv_cache", "routing"},
    "weight_sync": {"control", "ipc", "models"},
    "disaggregation": {"config", "io_struct", "ipc", "kv_cache", "models", "plan", "routing", "weight_sync"},
    "encoder": {"ipc", "models", "routing", "vision"},
    "scheduler": {
        "config",
        "control",
        "grammar",
        "io_struct",
        "ipc",
        "kv_cache",
        "plan",
        "routing",
        "text",
        "vision",
        "weight_sync",
    },
    "runner": {
        "attention",
        "config",
        "control",
        "grammar",
        "io_struct",
        "ipc",
        "kv_cache",
        "models",
        "plan",
        "routing",
        "vision",
        "weight_sync",
    },
    "output": {"disaggregation", "io_struct", "ipc", "routing", "text"},
    "frontend": {
        "config",
        "control",
        "encoder",
        "grammar",
        "io_struct",
        "ipc",
        "routing",
        "text",
        "validation",
        "vision",
        "weight_sync",
    },
    "entrypoints": {"chat_formats", "control", "frontend", "grammar", "io_struct", "ipc", "routing", "validation"},
}
# The composition root of a rank: it alone knows both scheduler and runner.
ROOMS["replica"] = set(ROOMS) - {
    "validation",
    "control",
    "chat_formats",
    "encoder",
    "frontend",
    "entrypoints",
    "output",
    "attention",
    "vision",
}
# Beside its folders.
NUM_ENGINE_FILES = 5
FORBIDDEN_NAMES = {"utils.py", "common.py", "misc.py", "base.py", "helpers.py"}


SOURCES = [path for part in ORDER for path in sorted((ROOT / part).rglob("*.py"))]
ENGINE = ROOT / "engine"
ENGINE_SOURCES = [path for path in SOURCES if path.is_relative_to(ENGINE) and path != ENGINE / "__init__.py"]


def room_of(path: Path) -> str:
    """The folder or file of the engine that a source belongs to."""
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[list[str]]:
    """What a file imports of the package, by the parts of its name, relative imports resolved."""
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
                yield parts[1:]


def imported_parts(path: Path) -> Iterator[str]:
    """Top-level parts of the package that a file imports."""
    return (parts[0] for parts in imported_modules(path))


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


@pytest.mark.parametrize("path", ENGINE_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_the_engine_know_those_that_they_may(path: Path) -> None:
    own = room_of(path)
    for parts in imported_modules(path):
        if parts[0] == "engine" and len(parts) > 1 and parts[1] != own:
            assert parts[1] in ROOMS[own], f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"


def test_every_room_is_known_and_none_is_allowed_more_than_it_uses() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in ENGINE_SOURCES:
        own = room_of(path)
        parts = (parts for parts in imported_modules(path) if parts[0] == "engine" and len(parts) > 1)
        used[own] |= {name for _, name, *_ in parts} - {own}
    assert used == ROOMS


@pytest.mark.parametrize("room", ["routing", "weight_sync"])
def test_what_a_trainer_imports_reaches_neither_scheduler_nor_runner(room: str) -> None:
    reached, new = set(), {room}
    while new:
        reached |= new
        new = set().union(*(ROOMS[each] for each in new)) - reached
    assert not reached & {"scheduler", "runner", "frontend", "output", "replica"}


def test_ls_engine_is_the_architecture() -> None:
    assert len([path for path in ENGINE.iterdir() if path.suffix == ".py"]) <= NUM_ENGINE_FILES
    for package in [path.parent for path in ENGINE_SOURCES if path.name == "__init__.py"]:
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), f"{package} says not what it is"


def test_unit_tests_mirror_the_tree() -> None:
    for part in ORDER:
        for folder in (ROOT / "tests" / "unit" / part).rglob("*"):
            if folder.is_dir() and folder.name != "__pycache__":
                assert (ROOT / folder.relative_to(ROOT / "tests" / "unit")).is_dir(), folder


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in SOURCES if path.name in FORBIDDEN_NAMES]


@pytest.mark.parametrize("module", LIGHT)
def test_messages_configuration_and_frontend_import_without_torch(module: str) -> None:
    heavy = {"torch", "deepspeed"} | ({"transformers"} if module not in WITH_TRANSFORMERS else set())
    script = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
