"""Where keys come from, and what does not see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from waybill.launch.api_key import API_KEY_VARIABLE, read_api_keys, split_key
from waybill.launch.args import parse_worker_args


@pytest.mark.parametrize(
    ("argv", "rest", "key"),
    [
        (["serve", "--tp", "1"], ["serve", "--tp", "1"], None),
        (["serve", "--api-key", "s", "--tp", "1"], ["serve", "--tp", "1"], "s"),
        (["serve", "--api-key=s=t"], ["serve"], "s=t"),
        (["serve", "--api-key-file", "f"], ["serve", "--api-key-file", "f"], None),
    ],
)
def test_a_key_is_taken_off_a_command_line(argv: list[str], rest: list[str], key: str | None) -> None:
    assert split_key(argv) == (rest, key)


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key"],
        ["--api-key", ""],
        ["--api-key="],
        ["--api-key", "a", "--api-key", "b"],
        ["--api-key", "a", "--api-key-file", "f"],
        ["--api-key", "a", "--api-key-file=f"],
    ],
)
def test_what_is_no_key_is_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="--api-key"):
        split_key(argv)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_keys(None) == ()
    monkeypatch.setenv(API_KEY_VARIABLE, "s\n")
    assert read_api_keys(None) == ("s",)
    file = tmp_path / "keys"
    file.write_text("erster\n\n schlüssel \n", "utf-8")
    with pytest.raises(ValueError, match=f"{API_KEY_VARIABLE}, --api-key-file: give one of them"):
        read_api_keys(str(file))
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert read_api_keys(str(file)) == ("erster", "schlüssel")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), (b" \n", "must hold a key"), (b"\xff", "UTF-8")]
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--api-key-file .*{words}"):
        read_api_keys(str(file))


def test_ranks_do_not_take_a_key_on_their_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_worker_args(["serve", "--api-key", "s"])
    assert API_KEY_VARIABLE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-host", "http://x"], "--allow-host http://x"),
        (["--allow-origin", "app.example"], "--allow-origin app.example"),
        (["--allow-origin", "https://app.example/"], "--allow-origin https://app.example/"),
        (["--max-connections", "0"], "--max-connections 0"),
        (["--max-body-bytes", "1000000000"], "--max-inflight-body-bytes"),
        (["--header-timeout", "0"], "--header-timeout 0.0"),
    ],
)
def test_mistakes_name_their_option(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_worker_args(["serve", *options])
    assert words in capsys.readouterr().err


def test_options_of_the_service_arrive() -> None:
    options = ["--allow-host", "a.example", "--allow-host", "*.b", "--allow-origin", "https://a.example"]
    limits = ["--max-connections", "7", "--body-timeout", "3", "--max-inflight-body-bytes", "100000000"]
    serve = parse_worker_args(["serve", *options, *limits, "--api-key-file", "f"]).serve
    assert serve is not None
    assert serve.allowed_hosts == ("a.example", "*.b") and serve.allowed_origins == ("https://a.example",)
    assert serve.api_key_file == "f"
    assert (serve.limits.max_connections, serve.limits.body_timeout_s) == (7, 3.0)
    assert serve.limits.max_inflight_body_bytes == 100_000_000
