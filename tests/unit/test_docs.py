"""What a caller can say is in the documentation, by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from waybill.engine.control.operations import ControlOperation, Operation
from waybill.engine.entrypoints.not_served import NOT_SERVED
from waybill.engine.frontend.generate_request import GenerateReqInput
from waybill.engine.frontend.sampling_params import SamplingParamsInput
from waybill.engine.validation import dialect_fields

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text()
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("name", [*GenerateReqInput.model_fields, *SamplingParamsInput.model_fields])
def test_every_field_of_a_request_is_documented(name: str) -> None:
    assert f"`{name}`" in API


@pytest.mark.parametrize("path", [path for path in NOT_SERVED if "{" not in path])
def test_every_endpoint_that_is_not_served_is_documented(path: str) -> None:
    assert f"`{path}`" in COMPATIBILITY or f"`{path.rstrip('/')}`" in COMPATIBILITY


def test_every_field_that_is_known_and_not_implemented_is_documented() -> None:
    for name, table in vars(dialect_fields).items():
        if name.isupper() and isinstance(table, dict | tuple):
            assert not [field for field in table if f"`{field}`" not in COMPATIBILITY], name


@pytest.mark.parametrize("operation", get_args(ControlOperation))
def test_every_control_operation_is_documented(operation: type[Operation]) -> None:
    assert operation.route() in API


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
