"""The command: what it prints and writes, its exit statuses, and what it finds out of a server by itself."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from support.fake_dialect_server import NUM_EXPERTS, NUM_LAYERS, TOP_K, FakeDialectServer
from support.mutant_catalogue import choices_without_rows
from support.route_mutants import Mutant, MutantTransport

from waybill.conformance.catalogue import RULES
from waybill.conformance.command import main
from waybill.conformance.row_shape import KnownSizes, RowShape, sizes_of_checkpoint, sizes_of_envelope

URL = "http://fake.test"
CHOICES = Mutant("choices", "choices", whole=choices_without_rows)


def refusing(status: int, text: str = "{}") -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(status, text=text))


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens")


def test_a_good_server_is_status_0_and_a_line_for_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([URL, "--only", "slice,not-asked", "--seed", "5"], FakeDialectServer()) == 0
    heading, first, second, summary = capsys.readouterr().out.splitlines()
    assert heading == f"{URL}, seed 5"
    assert first.split()[:2] == ["ok", "not-asked"] and second.split()[:2] == ["ok", "slice"], (
        "in the order of the rules"
    )
    assert summary == "2 passed, 0 failed, 0 not applicable"


def test_a_broken_rule_is_status_1_and_stands_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    transport = MutantTransport(FakeDialectServer(), CHOICES)
    assert main([URL, "--only", "slice,choices", "--json", str(file)], transport) == 1
    output = capsys.readouterr().out
    assert "FAILED  choices" in output and "With n > 1 every choice has its rows." in output
    report = json.loads(file.read_text())
    assert (report["passed"], report["failed"], report["not_applicable"]) == (1, 1, 0)
    broken = report["rules"][1]
    assert (broken["name"], broken["outcome"]) == ("choices", "failed") and "choice 1 has no rows" in broken["detail"]


@pytest.mark.parametrize(
    ("transport", "words"),
    [
        (httpx.MockTransport(unreachable), "no server: ConnectError: nobody listens"),
        (refusing(401), "HTTP 401"),
        (refusing(400, "started without routing"), "no routes: /generate: HTTP 400: started without routing"),
        (refusing(200, '{"meta_info": {}}'), "no routes: meta_info.routed_experts is absent"),
        (refusing(200, "<html>"), "no routes: the answer is no JSON"),
    ],
)
def test_what_cannot_be_looked_at_is_status_2(
    transport: httpx.BaseTransport, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([URL], transport) == 2
    assert words in capsys.readouterr().err


def test_where_nothing_applies_nothing_was_shown() -> None:
    assert main([URL, "--only", "compact,version-runs"], FakeDialectServer(extensions=False)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "URL: is missing"),
        ([URL, "--only", "slice,colour"], "--only colour: is no rule, must be of not-asked"),
        ([URL, "--top-k", "0"], "--top-k 0: must be at least 1"),
        ([URL, "--tokens", "7", "7"], "--tokens 7 7: must be 0 <= FIRST < END"),
    ],
)
def test_mistakes_of_the_caller_are_status_2(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options, FakeDialectServer())
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_sizes_that_do_not_fit_the_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([URL, "--top-k", "5"], FakeDialectServer()) == 2
    assert "a row has 12 ids, not 2 layers times top_k 5" in capsys.readouterr().err


def test_the_rules_are_listed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [rule.name for rule in RULES]


def test_a_key_is_sent_and_several_ranks_are_asked_at_one() -> None:
    seen: list[httpx.Request] = []
    fake = FakeDialectServer()

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.url.path == "/server_info":
            return httpx.Response(200, json={"dp_size": 2})
        return fake.handle_request(request)

    transport = httpx.MockTransport(handle)
    assert main([URL, "--api-key", "k", "--only", "slice"], transport) == 0
    assert {request.headers["authorization"] for request in seen} == {"Bearer k"}
    assert {body["routed_dp_rank"] for body in fake.requests} == {0}
    del fake.requests[:]
    assert main([URL, "--dp-rank", "1", "--only", "slice"], transport) == 0
    assert {body["routed_dp_rank"] for body in fake.requests} == {1}


def test_sizes_that_are_told_let_ids_be_looked_at_without_an_envelope() -> None:
    server = FakeDialectServer(extensions=False)
    options = ["--num-layers", str(NUM_LAYERS), "--top-k", str(TOP_K), "--num-experts", str(NUM_EXPERTS)]
    assert main([URL, "--only", "ids", *options], server) == 0


def test_sizes_of_a_checkpoint_and_an_envelope(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"num_hidden_layers": 4, "num_experts_per_tok": 3, "n_routed_experts": 16}})
    )
    sizes = sizes_of_checkpoint(str(tmp_path))
    assert sizes == KnownSizes(num_layers=4, top_k=3, num_experts=16)
    assert sizes_of_checkpoint(str(tmp_path / "nowhere")) == KnownSizes() == sizes_of_envelope({})
    envelope = sizes_of_envelope({"routed_experts_meta": {"top_k": 3, "layer_ids": [1, 2]}})
    assert envelope.or_else(sizes).shape(12) == RowShape(12, 4, 3, 16, (1, 2))
    assert KnownSizes(num_layers=4).shape(12).top_k == 3
