"""The wheel holds every package and asset, and works where this folder is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import waybill

ROOT = Path(__file__).parents[2]
NOT_PACKAGED = ("tests/", "bench/", "docs/", "scripts/", "build/", ".venv/")
ASSETS = (
    "py.typed",
    *(
        f"parallel/cpu_ops/{name}"
        for name in (
            "dot_products.h",
            "vectors.h",
            "attention_bf16.cpp",
            "experts_bf16.cpp",
            "linear_bf16.cpp",
            "rms_norm_bf16.cpp",
        )
    ),
    "examples/tiny_moe/checkpoint/model.safetensors",
    *(f"engine/entrypoints/live_page/{name}" for name in ("page.html", "page.js", "drawing.js", "page.css")),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is tracked, so that nothing is written here."""
    work = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, tracked):
        source, target = ROOT / name.decode(), work / "source" / name.decode()
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(work)]
    subprocess.run([*command, str(work / "source")], check=True, capture_output=True)
    (built,) = work.glob("*.whl")
    return built


def test_the_version_has_one_place(wheel: Path) -> None:
    assert wheel.name.startswith(f"waybill-{waybill.__version__}-")


def test_every_package_and_asset_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ("engine", "parallel", "launch", "client", "conformance")
    wanted = {f"waybill/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")}
    wanted |= {f"waybill/{asset}" for asset in ASSETS} | {"waybill/__init__.py"}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.removeprefix("waybill/").startswith(NOT_PACKAGED)]


def test_the_wheel_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import waybill, waybill.launch.args as args, waybill.engine.scheduler.scheduler;"
        "print(waybill.__file__); assert args.EMBEDDED_MODEL.is_dir(), args.EMBEDDED_MODEL; waybill.Engine"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "waybill" / "__init__.py")
