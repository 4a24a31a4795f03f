"""``rehearsal eval NAME --url``: real servers, and some that misbehave, from the command to the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rewards"))

from judge_server import FakeServer

import rehearsal.generation.remote_http as remote_http
from rehearsal.cli import main

slow = pytest.mark.slow
served = pytest.mark.skipif(not is_serve_available(), reason="needs the server of transformers (transformers[serving])")
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


@slow
@served
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


@slow
@served
def test_a_model_that_the_server_does_not_have(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code = main(["eval", "no/such-model", "--url", url, "--recipe", "frozenlake", "--episodes", "2"])
    said = capsys.readouterr().err
    assert code == 2
    assert said.strip().startswith("error")
    assert "no/such-model" in said


@slow
def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code = main(["eval", "base", "--url", "http://127.0.0.1:9/v1", "--recipe", "frozenlake", "--episodes", "2"])
    said = capsys.readouterr().err
    assert code == 2
    assert "127.0.0.1:9" in said


# Servers that misbehave


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """One that answers on loopback, and is asked again without a pause."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote_http, "_BACKOFF_LIMIT", 0.01)
    fake = FakeServer()
    yield fake
    fake.close()


def chat(text: str = "<answer>Up</answer>", finish: str = "stop") -> tuple[int, Any]:
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    return 200, body


def refused(status: int, said: str = "no") -> tuple[int, Any]:
    return status, {"error": {"message": said}}


def play_at(server: FakeServer, output: Path, episodes: int = 8) -> int:
    return main(
        ["eval", "tiny", "--url", server.url, "--recipe", "frozenlake", "--episodes", str(episodes), "--json",
         str(output)]
    )  # fmt: skip


TROUBLE = {
    "a filter": chat("", "content_filter"),
    "a request that it does not take": refused(400, "this text is against our policy"),
    "a request that it cannot answer": refused(503, "overloaded"),
    "an answer without choices": (200, {"choices": []}),
    "an answer that is no JSON": (200, "<html>"),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE.keys())
def test_an_answer_that_is_refused_costs_its_own_episode(
    trouble: tuple[int, Any], server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlucky: set[str] = set()

    def reply(text: str) -> tuple[int, Any]:
        if len(unlucky) < 2:
            unlucky.add(text)
        return trouble if text in unlucky else chat()

    server.reply = reply
    code = play_at(server, tmp_path / "figures.json")
    assert code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["episodes"] == 8
    # Another episode may show the same situation.
    assert 2 <= figures["failed_episodes"] <= 4
    assert figures["stop/error"] == figures["failed_episodes"] / 8
    assert 0 <= figures["success"] <= 1
    assert "failed" in capsys.readouterr().out


def test_too_many_refused_answers_are_no_result(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda text: chat("", "content_filter")
    assert play_at(server, tmp_path / "figures.json") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "8 of 8 episodes failed" in said
    assert "content_filter" in said
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize(
    ("status", "told"), [(401, "wants an API key"), (403, "wants an API key"), (404, "does not know this model")]
)
def test_what_no_request_will_change_ends_it(
    status: int, told: str, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it comes late: a key may be withdrawn."""
    server.reply = lambda text: refused(status) if len(server.requests) > 3 else chat()
    assert play_at(server, tmp_path / "figures.json", episodes=40) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert "episodes failed" not in said


def test_a_server_that_goes_away_ends_it(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def last_words(text: str) -> tuple[int, Any]:
        if len(server.requests) == 3:
            server.close()
        return refused(503)

    server.reply = last_words
    assert play_at(server, tmp_path / "figures.json") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be reached" in said
    assert "episodes failed" not in said
