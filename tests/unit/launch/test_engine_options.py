"""The engine's options at every door: the structure, the command lines and the documents say the same."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from waybill.engine.config import ENGINE_OPTIONS, EngineConfig
from waybill.engine.validation.option import Bounds, Option, OptionField
from waybill.launch.args import parse_worker_args
from waybill.launch.node_options import RUN_SECRET_VARIABLE

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "examples" / "tiny_moe" / "checkpoint")
# A legal value that is not the default, as typed and as configured.
TYPED = {
    "model_path": (MODEL, MODEL),
    "tokenizer_path": (MODEL, MODEL),
    "moe_split": ("tp", "tp"),
    "weight_sync_hosts": ("localhost,10.1.0.0/16", ("localhost", "10.1.0.0/16")),
    "disaggregation_allowed_hosts": ("prefill-0,10.1.0.0/16", ("prefill-0", "10.1.0.0/16")),
    "kv_memory_fraction": ("0.5", 0.5),
    "device": ("cpu", "cpu"),
    "weight_version": ("step-0", "step-0"),
    "disaggregation_host": ("127.0.0.2", "127.0.0.2"),
    "encoder": ("localhost:31000", "localhost:31000"),
    "cpu_threads_bind": ("0|1-3", "0|1-3"),
    "overlap_depth": ("0", 0),
    "tp_size": ("1", 1),
}
# Flags that need another one, where that is not the command's default.
NEEDED = {("serve", "enable_return_router_weights"): "--enable-return-routed-experts"}
# Every flag that the command lines had before they were made from the fields.
KNOWN_FLAGS = {
    "model_path": "--model",
    "tp_size": "--tp",
    "dp_size": "--dp",
    "enable_prefix_cache": "--disable-prefix-cache",
    "enable_return_routed_experts": "--enable-return-routed-experts",
    "claim_ttl_s": "--claim-ttl",
    "claim_budget_bytes": "--claim-budget-bytes",
    "weight_sync_timeout_s": "--weight-sync-timeout",
    "weight_sync_hosts": "--weight-sync-hosts",
    "heartbeat_timeout_s": "--heartbeat-timeout",
    "page_size": "--page-size",
    "log_level": "--log-level",
}


def typed(field: OptionField) -> tuple[list[str], object]:
    """A command line's words for a value of the field, and the value."""
    if field.kind is bool:
        return [field.flag], not field.default
    if field.name in TYPED:
        word, value = TYPED[field.name]
        return [field.flag, word], value
    if field.option.choices:
        return [field.flag, str(field.option.choices[-1])], field.option.choices[-1]
    return [field.flag, "9"], 9


def test_every_field_has_an_option_and_a_flag_of_its_own() -> None:
    assert list(ENGINE_OPTIONS) == list(EngineConfig.__struct_fields__)
    flags = [field.flag for field in ENGINE_OPTIONS.values()]
    assert len(set(flags)) == len(flags)
    assert {name: ENGINE_OPTIONS[name].flag for name in KNOWN_FLAGS} == KNOWN_FLAGS


@pytest.mark.parametrize("command", ["rollout", "serve"])
@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_a_flag_reaches_its_field_and_no_other(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_SECRET_VARIABLE, "a secret of both engines")
    words, value = typed(ENGINE_OPTIONS[name])
    needed = [NEEDED[command, name]] if (command, name) in NEEDED else []
    plain, given = (parse_worker_args([command, *needed, *more]).config for more in ([], words))
    assert plain is not None and given is not None
    assert getattr(given, name) == value and type(getattr(given, name)) is ENGINE_OPTIONS[name].kind
    assert msgspec.structs.replace(given, **{name: getattr(plain, name)}) == plain


@pytest.mark.parametrize("command", ["rollout", "serve"])
def test_the_defaults_are_those_of_the_fields_but_for_a_few(command: str) -> None:
    config = parse_worker_args([command]).config
    assert config is not None
    changed = {"tp_size": 2, "model_path": config.model_path}
    changed |= {"log_level": "info"} if command == "serve" else {"enable_return_routed_experts": True}
    assert config == EngineConfig(**changed)


@pytest.mark.parametrize("command", ["rollout", "serve"])
def test_the_help_says_range_and_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_worker_args([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in ENGINE_OPTIONS.values():
        assert f" {field.flag} " in text and field.option.help in text
    assert "must lie between 0 and 1" in text and "(default: None)" not in text
    assert "0.85 on CUDA and 0.25 on CPU if not given" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"page_size": 0}, "page_size=0: must be at least 1"),
        ({"num_threads": 0}, "num_threads=0: must be at least 1"),
        ({"claim_ttl_s": float("nan")}, "claim_ttl_s=nan: must be at least 0"),
        ({"chunked_prefill_size": -2}, "chunked_prefill_size=-2: must be -1 or at least 1"),
        ({"kv_memory_fraction": float("nan")}, "kv_memory_fraction=nan: must lie between 0 and 1"),
        ({"kv_memory_fraction": 0.0}, "kv_memory_fraction=0.0: must lie between 0 and 1"),
        ({"heartbeat_timeout_s": 1.0}, "heartbeat_timeout_s=1.0: must lie in 2 .. 1e6"),
        ({"log_level": "loud"}, "log_level='loud': must be one of debug, info, warning, error, critical"),
        ({"weight_sync_hosts": ("a b",)}, "weight_sync_hosts: 'a b' must be"),
        ({"disaggregation_allowed_hosts": ("a b",)}, "disaggregation_allowed_hosts: 'a b' must be"),
        ({"moe_split": "tp", "moe_dispatcher": "all_to_all"}, "needs moe_split='ep'"),
    ],
)
def test_a_message_names_the_field_and_its_range(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        EngineConfig(model_path="x", **fields)


def test_values_outside_of_a_range_may_be_legal() -> None:
    assert EngineConfig(model_path="x", chunked_prefill_size=-1).chunked_prefill_size == -1
    assert 0 not in Bounds(at_least=1, also=-1) and -1 in Bounds(at_least=1, also=-1)
    Option("help", choices=("a",)).check("name", None)


def test_a_named_tokenizer_has_to_be_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse_worker_args(["serve", "--tokenizer-path", str(tmp_path)])
    assert f"--tokenizer-path {tmp_path}: must be a folder with a tokenizer.json" in capsys.readouterr().err


def test_a_configuration_survives_the_run_folder() -> None:
    config = EngineConfig(model_path="x", kv_memory_fraction=0.5, weight_sync_hosts=("localhost",))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_the_documents_table_has_every_option(name: str) -> None:
    field = ENGINE_OPTIONS[name]
    table = (ROOT / "docs" / "api.md").read_text().partition("## Options of the engine")[2].partition("\n## ")[0]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` | `{field.flag}` |"))
    assert field.option.help in row and field.option.legal in row
    assert field.default in (None, msgspec.NODEFAULT) or f"| `{field.default}` |" in row
