"""``rehearsal eval NAME --url``: a real server plays held-out tasks, from the command to the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from rehearsal.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs the server of transformers (transformers[serving])"),
]

BASE = Path(str(resources.files("rehearsal") / "models" / "base"))


@pytest.fixture(scope="module")
def url(serve_model: Callable[[Path], AbstractContextManager[str]]) -> Iterator[str]:
    with serve_model(BASE) as served:
        yield served


def evaluate(*arguments: str, output: Path) -> dict[str, float]:
    common = ("--recipe", "frozenlake", "--episodes", "6", "--temperature", "0", "--split", "validation")
    assert main(["eval", *arguments, *common, "--json", str(output)]) == 0
    figures: dict[str, float] = json.loads(output.read_text())
    return figures


def test_a_served_model_plays_as_the_same_model_here(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    there = evaluate(str(BASE), "--url", url, output=tmp_path / "there.json")
    here = evaluate("base", output=tmp_path / "here.json")
    assert "success" in capsys.readouterr().out
    assert there["episodes"] == here["episodes"] == 6
    assert there["failed_episodes"] == 0
    assert there["server_tokens"] > 0
    # Both take the likeliest token every time.
    for name in ("success", "reward", "turns", "format_errors"):
        assert there[name] == pytest.approx(here[name]), name


def test_a_model_that_the_server_does_not_have(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code = main(["eval", "no/such-model", "--url", url, "--recipe", "frozenlake", "--episodes", "2"])
    said = capsys.readouterr().err
    assert code == 2
    assert said.strip().startswith("error")
    assert "no/such-model" in said


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code = main(["eval", "base", "--url", "http://127.0.0.1:9/v1", "--recipe", "frozenlake", "--episodes", "2"])
    said = capsys.readouterr().err
    assert code == 2
    assert "127.0.0.1:9" in said
