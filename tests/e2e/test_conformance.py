"""The conformance kit passes on real servers in every layout, and fails where a proxy breaks one rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.mutant_catalogue import all_mutants
from support.mutant_proxy import mutant_proxy
from support.server_process import ServerProcess

from waybill.conformance.catalogue import RULES
from waybill.conformance.command import main

OPTIONS = ("--enable-return-routed-experts", "--kv-cache-tokens", "16384", "--dtype", "float32")
# Of an answer, of a stream, of a request: what each proxy changes.
SOME_MUTANTS = ("slice-shifted", "stream-short", "bounds-clamped")


def report_of(url: str, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the command."""
    file = folder / "report.json"
    status = main([url, "--json", str(file), *options])
    return status, json.loads(file.read_text())


def check_all_passed(url: str, folder: Path, *options: str) -> None:
    status, report = report_of(url, folder, *options)
    outcomes = {rule["name"]: (rule["outcome"], rule["detail"]) for rule in report["rules"]}
    assert {name: one for name, one in outcomes.items() if one[0] != "passed"} == {}
    assert status == 0 and list(outcomes) == [rule.name for rule in RULES]


def check_mutant(name: str, server: ServerProcess, folder: Path) -> None:
    """Its rule fails, and one that it leaves alone passes."""
    (mutant,) = [mutant for mutant in all_mutants() if mutant.name == name]
    other = "not-asked" if mutant.rule != "not-asked" else "ids"
    with mutant_proxy(server.url, mutant) as url:
        status, report = report_of(url, folder, "--only", f"{mutant.rule},{other}")
    outcomes = {rule["name"]: rule["outcome"] for rule in report["rules"]}
    assert status == 1 and outcomes == {mutant.rule: "failed", other: "passed"}, report


def test_two_tensor_parallel_ranks_keep_every_rule(server: ServerProcess, tmp_path: Path) -> None:
    check_all_passed(server.url, tmp_path)


@pytest.mark.parametrize("name", SOME_MUTANTS)
def test_a_proxy_that_breaks_a_rule_is_found_out(name: str, server: ServerProcess, tmp_path: Path) -> None:
    check_mutant(name, server, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [mutant.name for mutant in all_mutants()])
def test_every_mutant_before_a_real_server(name: str, server: ServerProcess, tmp_path: Path) -> None:
    check_mutant(name, server, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "layout",
    [
        ("--tp", "1"),
        ("--tp", "2", "--moe-split", "tp"),
        ("--tp", "1", "--dp", "2"),
        ("--tp", "1", "--dp", "2", "--moe-dispatcher", "all_to_all"),
        ("--tp", "2", "--chunked-prefill-size", "5", "--page-size", "4"),
    ],
    ids=" ".join,
)
def test_every_layout_keeps_every_rule(layout: tuple[str, ...], tmp_path: Path) -> None:
    server = ServerProcess(*OPTIONS, *layout)
    try:
        for rank in ("0", "1") if "--dp" in layout else ("0",):
            check_all_passed(server.url, tmp_path, "--dp-rank", rank)
    finally:
        server.stop()
