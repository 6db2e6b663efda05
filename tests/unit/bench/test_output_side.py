"""The surroundings of a leader inside a benchmark: they start, and they end with it."""

from __future__ import annotations

from pathlib import Path

from output_side import Surroundings

EMBEDDED_MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny_moe" / "checkpoint"


def test_an_output_processor_runs_until_its_benchmark_closes(tmp_path: Path) -> None:
    surroundings = Surroundings(str(tmp_path), str(EMBEDDED_MODEL))
    assert surroundings._processor.poll() is None
    surroundings.close()
    assert surroundings._processor.returncode == 0
