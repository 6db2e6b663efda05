"""The kit passes a server that keeps the rules, and every server that breaks one fails on that rule."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import pytest
from support.fake_dialect_server import NUM_EXPERTS, FakeDialectServer
from support.mutant_catalogue import all_mutants
from support.route_mutants import Body, Mutant, MutantTransport

from waybill.conformance.catalogue import RULES
from waybill.conformance.examination import Options, examine
from waybill.conformance.row_shape import KnownSizes
from waybill.conformance.rule import Result

NUM_MUTANTS = len(all_mutants())


def results_of(transport: httpx.BaseTransport, seed: int = 1) -> list[Result]:
    options = Options(seed=seed, sizes=KnownSizes(num_experts=NUM_EXPERTS))
    with httpx.Client(base_url="http://fake.test", transport=transport, timeout=20) as http:
        return examine(http, RULES, options, lambda result: None)


def names_of(results: Sequence[Result], outcome: str) -> set[str]:
    return {result.rule.name for result in results if result.outcome == outcome}


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_keeps_the_rules_passes_them_all(seed: int) -> None:
    results = results_of(FakeDialectServer(), seed)
    assert names_of(results, "passed") == {rule.name for rule in RULES}, [result.detail for result in results]


@pytest.mark.parametrize("index", range(NUM_MUTANTS), ids=[mutant.name for mutant in all_mutants()])
def test_a_mutant_fails_on_its_rule(index: int) -> None:
    mutant = all_mutants()[index]
    results = results_of(MutantTransport(FakeDialectServer(), mutant))
    details = {result.rule.name: result.detail for result in results if result.outcome != "passed"}
    assert names_of(results, "failed") == {mutant.rule, *mutant.implied}, details
    assert not names_of(results, "not applicable"), details


def test_every_rule_has_a_mutant_that_breaks_nothing_else() -> None:
    assert {mutant.rule for mutant in all_mutants() if not mutant.implied} == {rule.name for rule in RULES}


def test_what_a_server_does_not_offer_is_told_and_has_not_passed() -> None:
    results = results_of(FakeDialectServer(extensions=False))
    assert names_of(results, "failed") == set()
    # Without an envelope nothing says how many experts a token has.
    extensions = {rule.name for rule in RULES if rule.is_extension}
    assert names_of(results, "not applicable") == extensions | {"ids"}
    assert all(result.detail for result in results)


def without_retractions(body: Body, answer: Body) -> None:
    answer["meta_info"].pop("num_retractions", None)


def test_a_retraction_that_nobody_tells_of_has_not_passed() -> None:
    silent = Mutant("silent", "retraction", answer=without_retractions)
    results = results_of(MutantTransport(FakeDialectServer(), silent))
    assert names_of(results, "not applicable") == {"retraction"} and not names_of(results, "failed")
