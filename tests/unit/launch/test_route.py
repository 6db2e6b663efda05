"""The command line of the router."""

from __future__ import annotations

import pytest

from waybill.launch.route import check, main, make_client, parser, sides_of

ONE = ["--prefill", "http://p", "--decode", "http://d"]


def test_several_servers() -> None:
    arguments = [
        "--prefill",
        "http://a:1",
        "9001",
        "--prefill",
        "https://b:2/",
        "--decode",
        "http://c",
        "--decode",
        "http://d/x/",
    ]
    prefills, decodes = sides_of(parser().parse_args(arguments))
    assert [(side.url, side.bootstrap) for side in prefills] == [
        ("http://a:1", ("a", 9001)),
        ("https://b:2", ("b", 8998)),
    ]
    assert [side.url for side in decodes] == ["http://c", "http://d/x"]
    (prefill,), _ = sides_of(parser().parse_args([*ONE, "--bootstrap-host", "10.0.0.1", "--bootstrap-port", "7"]))
    assert prefill.bootstrap == ("10.0.0.1", 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prefill", "p:1", "--decode", "http://d"], "--prefill p:1: must be http://HOST:PORT"),
        (["--prefill", "http://p", "--decode", "http://d:x"], "--decode http://d:x: must be http://HOST:PORT"),
        (["--prefill", "http://p", "--decode", "http://"], "--decode http://: must be http://HOST:PORT"),
        (["--prefill", "http://p", "0", "--decode", "http://d"], "bootstrap port 0: must lie in 1 .. 65535"),
        (["--prefill", "http://p", "1", "2", "--decode", "http://d"], "must be a URL and at most one port"),
        ([*ONE, "--decode", "http://d/"], "a server is given twice: http://d"),
        ([*ONE, "--prefill", "http://p:2"], "a prefill's bootstrap port is given twice: p:8998"),
        ([*ONE, "--port", "-1"], "--port -1: must lie in"),
        ([*ONE, "--shutdown-timeout", "60"], "--shutdown-timeout 60.0: must lie in"),
        ([*ONE, "--allow-host", "a b"], "--allow-host a b: must be a name"),
        ([*ONE, "--max-body-bytes", "0"], "--max-body-bytes 0: must be at least 1"),
        ([*ONE, "--api-key", "k"], "--api-key: other users see a command line"),
        ([*ONE, "--api-key-file", "/nothing"], "--api-key-file /nothing: No such file"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_defaults_are_good() -> None:
    check(parser().parse_args(ONE))


def test_engines_are_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert not make_client()._mounts
