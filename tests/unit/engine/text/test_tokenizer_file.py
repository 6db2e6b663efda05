"""Folders without a tokenizer that can be read: callers are told why there is no text, and what works instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from waybill.engine.frontend.text_codec import TextCodec
from waybill.engine.text.tokenizer_file import NEEDS_CODE, NO_TOKENIZER, load_tokenizer, why_no_tokenizer
from waybill.engine.validation.field_error import FieldError
from waybill.launch.args import EMBEDDED_MODEL, check_tokenizer

# As Moonlight and Kimi-K2 have it, beside a tiktoken.model.
SETTINGS = {
    "added_tokens_decoder": {"163584": {"content": "[BOS]", "special": True}},
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    "tokenizer_class": "TikTokenTokenizer",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "tiktoken.model").write_text("YQ== 0")
    (tmp_path / "tokenization_moonshot.py").write_text("raise SystemExit('must not run')")
    return tmp_path


def test_a_tokenizer_of_code_is_not_run_and_what_works_instead_is_said(folder: Path) -> None:
    assert load_tokenizer(str(folder)) is None
    assert why_no_tokenizer(str(folder)) == NEEDS_CODE
    codec = TextCodec(None, why_no_tokenizer(str(folder)))
    with pytest.raises(
        FieldError, match=r"auto_map.*never run; .*tokenizer\.json.* as tokenizer_path; token ids need none"
    ):
        codec.encode("a")
    with pytest.raises(FieldError, match="never run"):
        codec.decode([1], skip_special_tokens=True)


def test_it_is_no_tokenizer_path_either(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder with a tokenizer\.json; its tokenizer is code"):
        check_tokenizer(str(folder))


@pytest.mark.parametrize("settings", [None, "{}", "no JSON", '{"auto_map": {"AutoConfig": "x.Y"}}'])
def test_other_folders_just_have_none(tmp_path: Path, settings: str | None) -> None:
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    assert why_no_tokenizer(str(tmp_path)) == NO_TOKENIZER
    with pytest.raises(FieldError, match="text: the checkpoint has no tokenizer; token ids need none"):
        TextCodec(None).encode("a")


def test_code_beside_a_tokenizer_json_is_ignored(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((EMBEDDED_MODEL / "tokenizer.json").read_bytes())
    assert load_tokenizer(str(folder)) is not None
    check_tokenizer(str(folder))
