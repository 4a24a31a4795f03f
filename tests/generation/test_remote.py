"""The remote engine against a small fake server on the loopback that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import http.server
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rehearsal.errors import GenerationError
from rehearsal.generation.remote import ChatSession, ContextOverflowError, RemoteEngine, ServerRefusalError
from rehearsal.generation.sampling import SamplingParams
from rehearsal.trajectory import SampleStop

PARAMS = SamplingParams(max_tokens=5, stop_token_ids=(9,))
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class FakeServer:
    """Answers requests one after the other from a script; the last entry answers all that follow.

    An entry is (status, body) or (status, body, headers), or a function of the request's body that returns one. A body
    that is no string is sent as JSON.
    """

    def __init__(self) -> None:
        self.script: list[Reply | Callable[[dict[str, Any]], Reply]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.paths.append(self.path)
                    entry = fake.script[min(len(fake.requests), len(fake.script)) - 1]
                    fake.busy += 1
                    fake.most_busy = max(fake.most_busy, fake.busy)
                reply = entry(body) if callable(entry) else entry
                with fake._lock:
                    fake.busy -= 1
                status, content = reply[0], reply[1]
                headers = {"Content-Type": "application/json", **(reply[2] if len(reply) == 3 else {})}
                if status == 0:
                    # A lost connection.
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    fake = FakeServer()
    yield fake
    fake.stop()


def completion(text: str = "ab", finish: str | None = "stop", **choice: Any) -> Reply:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    return 200, {"choices": [{"index": 0, "text": text, "finish_reason": finish, **choice}], "usage": usage}


def chat_reply(text: str | None = "Left", finish: str = "stop", logprobs: Any = None, **message: Any) -> Reply:
    body = {
        "choices": [
            {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish,
             "logprobs": logprobs}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }  # fmt: skip
    return 200, body


def ids_reply(ids: list[int], finish: str = "stop", logprobs: list[float] | None = None) -> Reply:
    report = None if logprobs is None else {"tokens": ["x"] * len(ids), "token_logprobs": logprobs}
    return completion("x" * len(ids), finish, token_ids=ids, logprobs=report)


def engine_at(server: FakeServer, **kwargs: Any) -> RemoteEngine:
    return RemoteEngine(server.url, "tiny", **{"backoff": 0.01, "timeout": 5.0, "max_retries": 3, **kwargs})


def letters(start: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, with "th" as one token, and "</s>" as id 9."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3, "t": 4, "h": 5, "th": 6, " ": 7, "<s>": 8, "</s>": 9, "?": 10}
    core = Tokenizer(models.BPE(vocabulary, [("t", "h")], unk_token="?"))
    core.decoder = decoders.Fuse()
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    if start:
        core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 8)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if start else None, eos_token="</s>", unk_token="?",
        additional_special_tokens=["<s>"],
    )  # fmt: skip


def run(main: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main, 30)

    return asyncio.run(bounded())


async def sampled(engine: RemoteEngine, ids: list[int] = [0, 1], params: SamplingParams = PARAMS) -> Any:  # noqa: B006
    async with engine:
        session = engine.session(1)
        session.extend(ids)
        return await session.sample(params)


async def answered(engine: RemoteEngine, params: SamplingParams = PARAMS) -> Any:
    async with engine:
        session = engine.chat(1)
        session.add("user", "Where to?")
        return await session.answer(params)


def error_of(engine: RemoteEngine) -> GenerationError:
    with pytest.raises(GenerationError) as caught:
        run(sampled(engine))
    text = str(caught.value)
    assert text.endswith("."), text
    return caught.value


class TestFaults:
    def test_a_busy_server_is_asked_again(self, server: FakeServer) -> None:
        server.script = [(429, {"error": {"message": "slow down"}}), (503, "busy"), ids_reply([3, 9])]
        engine = engine_at(server)
        assert run(sampled(engine)).token_ids.tolist() == [3, 9]
        assert engine.stats.retries == 2
        assert [request["prompt"] for request in server.requests] == [[0, 1]] * 3

    @pytest.mark.parametrize("status", [429, 500, 502, 529])
    def test_a_server_that_stays_broken_is_given_up(self, server: FakeServer, status: int) -> None:
        server.script = [(status, {"error": {"message": "out of cheese"}})]
        engine = engine_at(server)
        error = error_of(engine)
        assert f"answered {status}" in str(error)
        assert "4 tries" in str(error)
        assert "out of cheese" in str(error)
        assert engine.stats.retries == 3
        assert len(server.requests) == 4

    def test_retries_can_be_switched_off(self, server: FakeServer) -> None:
        server.script = [(500, "")]
        assert "1 try" in str(error_of(engine_at(server, max_retries=0)))
        assert len(server.requests) == 1

    def test_a_used_up_quota_is_told_at_once(self, server: FakeServer) -> None:
        server.script = [(429, {"error": {"message": "You have no money left.", "code": "insufficient_quota"}})]
        assert "no money left" in str(error_of(engine_at(server)))
        assert len(server.requests) == 1

    @pytest.mark.parametrize("as_date", [False, True])
    def test_a_pause_that_the_server_asks_for_is_kept(self, server: FakeServer, as_date: bool) -> None:
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
        value = email.utils.format_datetime(soon, usegmt=True) if as_date else "0.5"
        server.script = [(429, "", {"Retry-After": value}), ids_reply([9])]
        before = time.monotonic()
        run(sampled(engine_at(server)))
        # A date has whole seconds.
        assert time.monotonic() - before >= (0.9 if as_date else 0.5)

    @pytest.mark.parametrize("value", ["soon", "-5", "nan", "Mon, 01 Jan 2001 00:00:00 GMT"])
    def test_a_pause_that_makes_no_sense_is_ignored(self, server: FakeServer, value: str) -> None:
        server.script = [(503, "", {"Retry-After": value}), ids_reply([9])]
        before = time.monotonic()
        assert run(sampled(engine_at(server))).stop == SampleStop.END
        assert time.monotonic() - before < 30

    def test_a_pause_of_hours_is_told_instead(self, server: FakeServer) -> None:
        server.script = [(429, "", {"Retry-After": "7200"})]
        assert "come back in 7200 s" in str(error_of(engine_at(server)))
        assert len(server.requests) == 1

    def test_a_server_that_hangs(self, server: FakeServer) -> None:
        release = threading.Event()

        def hang(_: dict[str, Any]) -> Reply:
            release.wait(10)
            return ids_reply([9])

        server.script = [hang]
        engine = engine_at(server, timeout=0.15, max_retries=1)
        try:
            assert "did not answer within 0.15 s (2 tries)" in str(error_of(engine))
        finally:
            release.set()
        assert engine.stats.retries == 1
        assert engine.stats.extra["timeouts"] == 2

    def test_a_server_that_hangs_once(self, server: FakeServer) -> None:
        release = threading.Event()

        def hang(_: dict[str, Any]) -> Reply:
            release.wait(10)
            return 500, ""

        server.script = [hang, ids_reply([3, 9])]
        engine = engine_at(server, timeout=2.0)
        assert run(sampled(engine)).token_ids.tolist() == [3, 9]
        release.set()
        assert engine.stats.retries == 1

    def test_a_lost_connection(self, server: FakeServer) -> None:
        server.script = [(0, ""), (0, ""), ids_reply([3, 9])]
        engine = engine_at(server)
        assert run(sampled(engine)).token_ids.tolist() == [3, 9]
        assert engine.stats.retries == 2

    def test_no_server(self, server: FakeServer) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        engine = RemoteEngine(f"http://127.0.0.1:{port}", "tiny", backoff=0.01, max_retries=2)
        error = error_of(engine)
        assert "cannot be reached" in str(error)
        assert f"127.0.0.1:{port}/v1" in str(error)
        assert engine.stats.retries == 2

    def test_malformed_json(self, server: FakeServer) -> None:
        server.script = [(200, "<html>Welcome to the proxy</html>")]
        error = error_of(engine_at(server))
        assert "not JSON" in str(error)
        assert "Welcome to the proxy" in str(error)

    @pytest.mark.parametrize(
        ("body", "told"),
        [
            ([1, 2], "no object"),
            ({}, "without any choices"),
            ({"choices": []}, "without any choices"),
            ({"choices": "none"}, "without any choices"),
            ({"choices": [{"finish_reason": "stop"}]}, "no text"),
            ({"choices": [{"text": "a", "finish_reason": "content_filter"}]}, "content_filter"),
            ({"choices": [{"text": "a"}]}, "None"),
            ({"error": {"message": "the GPU is gone"}}, "the GPU is gone"),
        ],
    )
    def test_answers_in_another_form(self, server: FakeServer, body: Any, told: str) -> None:
        server.script = [(200, body)]
        assert told in str(error_of(engine_at(server)))
        assert len(server.requests) == 1

    def test_a_stream(self, server: FakeServer) -> None:
        server.script = [(200, "data: {}\n\n", {"Content-Type": "text/event-stream; charset=utf-8"})]
        assert "streams are not supported" in str(error_of(engine_at(server)))

    def test_a_wrong_name(self, server: FakeServer) -> None:
        server.script = [(404, {"error": {"message": "The model `tiny` does not exist.", "code": 404}})]
        error = error_of(engine_at(server))
        assert "The model `tiny` does not exist." in str(error)
        assert f"{server.url}/models" in str(error)
        assert isinstance(error, ServerRefusalError)
        assert error.status == 404

    def test_a_moved_server_is_not_followed(self, server: FakeServer) -> None:
        server.script = [(307, "", {"Location": "https://elsewhere.example/v1/completions"})]
        assert "moved to https://elsewhere.example" in str(error_of(engine_at(server)))

    @pytest.mark.parametrize(
        "body",
        [
            {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 5000."}},
            {"object": "error", "message": "The decoder prompt (length 9) is longer than the maximum model length."},
            {"error": {"message": "Too big.", "code": "context_length_exceeded"}},
            {"error": {"message": "the request exceeds the available context size", "type": "exceed_context"}},
            {"detail": [{"msg": "prompt is too long", "loc": ["body", "prompt"]}]},
        ],
    )
    def test_a_context_that_is_too_short(self, server: FakeServer, body: Any) -> None:
        server.script = [(400, body)]
        error = error_of(engine_at(server))
        assert isinstance(error, ContextOverflowError)
        assert "lower max_context" in str(error)
        assert len(server.requests) == 1

    def test_any_other_refusal_is_passed_on(self, server: FakeServer) -> None:
        server.script = [(400, {"detail": "Server is pinned to 'large'; requested 'tiny'."})]
        assert "Server is pinned to 'large'" in str(error_of(engine_at(server)))


class TestKey:
    SECRET = "sk-very-secret"

    def test_goes_into_the_header_and_nowhere_else(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MY_KEY", self.SECRET + "\n")
        server.script = [(429, f"key {self.SECRET} is busy"), (401, {"error": {"message": f"Bad key: {self.SECRET}"}})]
        engine = engine_at(server, api_key_env="MY_KEY")
        with caplog.at_level(logging.DEBUG):
            error = error_of(engine)
        assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {self.SECRET}"] * 2
        assert "does not accept the API key in MY_KEY" in str(error)
        assert "Bad key: ***" in str(error)
        assert self.SECRET not in caplog.text
        assert self.SECRET not in repr(engine) + repr(vars(engine)) + repr(error.__dict__)

    def test_a_missing_variable(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MY_KEY", raising=False)
        with pytest.raises(GenerationError, match="MY_KEY is not set"):
            engine_at(server, api_key_env="MY_KEY")

    def test_a_server_that_wants_one(self, server: FakeServer) -> None:
        server.script = [(401, {"error": "Unauthorized"})]
        assert "give its name as api_key_env" in str(error_of(engine_at(server)))
        assert "Authorization" not in server.headers[0]

    def test_has_no_place_in_the_address(self) -> None:
        with pytest.raises(GenerationError, match="holds a password") as caught:
            RemoteEngine(f"http://me:{self.SECRET}@localhost/v1", "tiny")
        assert self.SECRET not in str(caught.value)


class TestTokens:
    def test_ids_and_log_probs_of_a_server_that_gives_both(self, server: FakeServer) -> None:
        server.script = [ids_reply([3, 2, 9], logprobs=[-0.5, -1.5, -0.25])]
        engine = engine_at(server)
        assert not engine.gives_logprobs
        answer = run(sampled(engine))
        assert answer.token_ids.dtype == np.int32
        assert answer.logprobs.dtype == np.float32
        assert answer.token_ids.tolist() == [3, 2, 9]
        assert answer.logprobs.tolist() == [-0.5, -1.5, -0.25]
        assert answer.stop == SampleStop.END
        assert engine.gives_logprobs
        assert server.paths == ["/v1/completions"]
        stats = engine.stats
        assert (stats.tokens_sampled, stats.tokens_prefilled, stats.tokens_shared, stats.forwards) == (3, 5, 2, 1)
        assert stats.peak_sessions == 1
        assert stats.seconds > 0

    def test_all_that_shapes_the_distribution_is_said(self, server: FakeServer) -> None:
        server.script = [ids_reply([9])]
        run(sampled(engine_at(server, extra_body={"priority": 3})))
        run(sampled(engine_at(server), params=SamplingParams(0.5, 20, 0.9, 7)))
        first, second = server.requests
        assert {name: first[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
            "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0
        }  # fmt: skip
        assert (first["stop_token_ids"], first["priority"], first["stream"], first["model"]) == ([9], 3, False, "tiny")
        assert (second["temperature"], second["top_k"], second["top_p"], second["max_tokens"]) == (0.5, 20, 0.9, 7)
        assert "stop_token_ids" not in second

    def test_a_session_grows_by_what_was_sampled(self, server: FakeServer) -> None:
        server.script = [ids_reply([3, 9]), ids_reply([2, 2], "length")]

        async def main() -> None:
            async with engine_at(server) as engine:
                session = engine.session(1)
                session.extend(np.array([0, 1], dtype=np.int32))
                await session.sample(PARAMS)
                session.extend([5])
                answer = await session.sample(PARAMS)
                assert answer.stop == SampleStop.LENGTH
                assert session.token_ids == [0, 1, 3, 9, 5, 2, 2]
                assert (session.length, session.room) == (7, engine.max_context - 7)
                fork = session.fork(2)
                fork.extend([1])
                assert (fork.length, session.length) == (8, 7)

        run(main())
        assert [request["prompt"] for request in server.requests] == [[0, 1], [0, 1, 3, 9, 5]]

    def test_seeds_depend_on_stream_and_position_alone(self, server: FakeServer) -> None:
        server.script = [ids_reply([3], "length")]

        async def main() -> None:
            async with engine_at(server) as engine:
                for key in (1, 1, 2):
                    session = engine.session(key)
                    session.extend([0])
                    await session.sample(PARAMS)
                    await session.sample(PARAMS)

        run(main())
        seeds = [request["seed"] for request in server.requests]
        assert seeds[0:2] == seeds[2:4]
        assert len(set(seeds)) == 4
        assert all(0 <= seed < 2**31 for seed in seeds)

    def test_a_full_context(self, server: FakeServer) -> None:
        server.script = [ids_reply([3, 3], "length")]

        async def main() -> None:
            async with engine_at(server, max_context=4) as engine:
                session = engine.session(1)
                session.extend([0, 1])
                assert (await session.sample(PARAMS)).stop == SampleStop.CONTEXT
                again = await session.sample(PARAMS)
                assert (len(again.token_ids), again.stop) == (0, SampleStop.CONTEXT)
                with pytest.raises(GenerationError, match="1 more tokens do not fit"):
                    session.extend([1])

        run(main())
        assert [request["max_tokens"] for request in server.requests] == [2]

    @pytest.mark.parametrize(
        ("params", "processed", "taken"),
        [
            (SamplingParams(), False, True), (SamplingParams(temperature=0.7), False, False),
            (SamplingParams(top_p=0.9), False, False), (SamplingParams(top_k=3), False, False),
            (SamplingParams(temperature=0.0), False, False), (SamplingParams(temperature=0.7), True, True),
        ],
    )  # fmt: skip
    def test_log_probs_count_only_if_they_are_those_of_the_distribution(
        self, server: FakeServer, params: SamplingParams, processed: bool, taken: bool
    ) -> None:
        server.script = [ids_reply([3, 2], "length", [-0.5, -1.5])]
        engine = engine_at(server, processed_logprobs=processed)
        answer = run(sampled(engine, params=params))
        assert np.isnan(answer.logprobs).tolist() == [not taken, not taken]
        assert engine.gives_logprobs is taken

    def test_missing_log_probs_are_nan(self, server: FakeServer) -> None:
        server.script = [ids_reply([3, 2, 9], logprobs=[None, -1.5, -0.25])]  # type: ignore[list-item]
        logprobs = run(sampled(engine_at(server))).logprobs.tolist()
        assert math.isnan(logprobs[0])
        assert logprobs[1:] == [-1.5, -0.25]

    def test_log_probs_of_other_tokens_are_not_taken(self, server: FakeServer) -> None:
        report = {"tokens": ["x", "x"], "token_logprobs": [-1.0, -2.0]}
        server.script = [completion("xxx", token_ids=[3, 2, 9], logprobs=report)]
        engine = engine_at(server)
        assert np.isnan(run(sampled(engine)).logprobs).all()
        assert not engine.gives_logprobs

    @pytest.mark.parametrize(
        "report",
        [
            {"tokens": ["token_id:3", "token_id:9"], "token_logprobs": [-1.0, -2.0]},
            {"content": [{"token": "d", "id": 3, "logprob": -1.0}, {"token": "", "id": 9, "logprob": -2.0}]},
        ],
    )
    def test_ids_in_the_log_probs(self, server: FakeServer, report: Any) -> None:
        server.script = [completion("d", logprobs=report)]
        answer = run(sampled(engine_at(server)))
        assert answer.token_ids.tolist() == [3, 9]
        assert answer.logprobs.tolist() == [-1.0, -2.0]

    def test_a_server_that_leaves_the_end_out(self, server: FakeServer) -> None:
        several = SamplingParams(max_tokens=5, stop_token_ids=(9, 8))
        server.script = [ids_reply([3]), completion("x", token_ids=[3], stop_reason=8), ids_reply([3])]
        engine = engine_at(server)
        only = run(sampled(engine))
        assert only.token_ids.tolist() == [3, 9]
        assert math.isnan(only.logprobs[1])
        assert run(sampled(engine, params=several)).token_ids.tolist() == [3, 8]
        # Nobody knows which of the two it was.
        unknown = run(sampled(engine, params=several))
        assert (unknown.token_ids.tolist(), unknown.stop) == ([3], SampleStop.END)

    def test_no_ids_and_no_tokenizer(self, server: FakeServer) -> None:
        server.script = [completion("ab")]
        assert "give the tokenizer" in str(error_of(engine_at(server)))


class TestText:
    """Sessions of tokens with a server that knows only text."""

    def test_prompts_and_answers_are_text(self, server: FakeServer) -> None:
        server.script = [completion("thab")]
        engine = engine_at(server, tokenizer=letters(), prompts="text")
        answer = run(sampled(engine, [6, 7, 2]))
        assert server.requests[0]["prompt"] == "th c"
        assert answer.token_ids.tolist() == [6, 0, 1, 9]
        assert np.isnan(answer.logprobs).all()
        assert engine.stats.extra == {"inexact_answers": 1.0}

    def test_the_texts_of_tokens_give_the_sampled_ids(self, server: FakeServer) -> None:
        report = {"tokens": ["a", " ", "b"], "token_logprobs": [-1.0, -2.0, -3.0]}
        server.script = [completion("a b", logprobs=report)]
        engine = engine_at(server, tokenizer=letters())
        answer = run(sampled(engine))
        assert answer.token_ids.tolist() == [0, 7, 1, 9]
        assert answer.logprobs[:3].tolist() == [-1.0, -2.0, -3.0]
        assert engine.stats.extra == {}

    def test_tokens_that_would_be_merged_are_kept_apart(self, server: FakeServer) -> None:
        # The policy spelled "th" with two tokens, of which the text alone would make one.
        report = {"tokens": ["t", "h"], "token_logprobs": [-1.0, -2.0]}
        server.script = [completion("th", "length", logprobs=report)]
        answer = run(sampled(engine_at(server, tokenizer=letters())))
        assert answer.token_ids.tolist() == [4, 5]

    @pytest.mark.parametrize(
        "tokens", [["a", "bc"], ["a", "b"], ["a", "b", "x"]], ids=["not one token", "text missing", "unknown"]
    )
    def test_texts_of_tokens_in_doubt_are_not_used(self, server: FakeServer, tokens: list[str]) -> None:
        report = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
        server.script = [completion("abc", "length", logprobs=report)]
        engine = engine_at(server, tokenizer=letters())
        answer = run(sampled(engine))
        assert answer.token_ids.tolist() == [0, 1, 2]
        assert np.isnan(answer.logprobs).all()
        assert engine.stats.extra["inexact_answers"] == 1

    def test_the_start_token_that_the_server_adds_is_not_sent(self, server: FakeServer) -> None:
        server.script = [completion("a")]
        engine = engine_at(server, tokenizer=letters("<s>"), prompts="text")
        run(sampled(engine, [8, 0, 1]))
        assert server.requests[0]["prompt"] == "ab"
        assert "inexact_prompts" not in engine.stats.extra

    def test_prompts_that_text_cannot_say_are_counted(self, server: FakeServer) -> None:
        server.script = [completion("a")]
        engine = engine_at(server, tokenizer=letters(), prompts="text")
        run(sampled(engine, [4, 5]))
        assert engine.stats.extra["inexact_prompts"] == 1

    def test_an_answer_that_is_longer_here_than_there_is_cut(self, server: FakeServer) -> None:
        server.script = [completion("abcd")]
        answer = run(sampled(engine_at(server, tokenizer=letters(), max_context=5)))
        assert (answer.token_ids.tolist(), answer.stop) == ([0, 1, 2], SampleStop.CONTEXT)

    def test_text_needs_a_tokenizer(self) -> None:
        with pytest.raises(GenerationError, match="needs the tokenizer"):
            RemoteEngine("http://localhost", "tiny", prompts="text")


class TestDialects:
    def test_fields_that_only_tell_are_left_out(self, server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
        refusal = {"detail": "Unexpected fields in the request: {'return_token_ids', 'stop_token_ids', 'top_k'}"}
        server.script = [(422, refusal), completion("ab")]
        engine = engine_at(server, tokenizer=letters())
        several = SamplingParams(max_tokens=5, stop_token_ids=(9, 7))
        with caplog.at_level(logging.WARNING):
            run(sampled(engine, params=several))
            run(sampled(engine, params=several))
        assert len(server.requests) == 3
        for request in server.requests[1:]:
            assert request.keys().isdisjoint({"return_token_ids", "stop_token_ids", "top_k"})
            # The end token of the model needs no text.
            assert request["stop"] == [" "]
            assert "seed" in request
        assert len(engine.notes) == 3
        assert [record.message for record in caplog.records] == engine.notes
        assert engine.stats.retries == 0

    def test_a_field_that_shapes_the_distribution_is_never_left_out(self, server: FakeServer) -> None:
        server.script = [(400, {"error": {"message": "Unrecognized request argument supplied: top_k"}}),
                         completion("ab", token_ids=[9])]  # fmt: skip
        engine = engine_at(server)
        with pytest.raises(GenerationError, match=r"does not take top_k=5; leave it at 0 \(all tokens\)"):
            run(sampled(engine, params=SamplingParams(top_k=5)))
        assert len(server.requests) == 1

        server.script.insert(1, server.script[0])
        run(sampled(engine))
        with pytest.raises(GenerationError, match="does not take top_k; leave it at 0"):
            run(sampled(engine, params=SamplingParams(top_k=5)))

    def test_a_field_that_the_user_asked_for_is_never_left_out(self, server: FakeServer) -> None:
        server.script = [(400, {"error": {"message": "seed is not supported"}})]
        assert "seed is not supported" in str(error_of(engine_at(server, extra_body={"seed": 1})))

    def test_max_completion_tokens(self, server: FakeServer) -> None:
        message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        server.script = [(400, {"error": {"message": message, "param": "max_tokens"}}), chat_reply()]
        run(answered(engine_at(server)))
        assert "max_tokens" not in server.requests[1]
        assert server.requests[1]["max_completion_tokens"] == 5

    def test_a_server_that_takes_no_ids(self, server: FakeServer) -> None:
        server.script = [(400, {"detail": "prompt must be a string."})]
        assert 'set prompts="text"' in str(error_of(engine_at(server)))

    def test_stop_tokens_without_a_tokenizer(self, server: FakeServer) -> None:
        server.script = [(422, {"detail": "Unexpected fields: {'stop_token_ids'}"})]
        assert "give the tokenizer" in str(error_of(engine_at(server)))


class TestChat:
    def test_a_conversation(self, server: FakeServer) -> None:
        report = {"content": [{"token": "Le", "logprob": -0.5}, {"token": "ft", "logprob": -0.25}]}
        server.script = [chat_reply("Left", logprobs=report), chat_reply("Rig", "length")]

        async def main() -> ChatSession:
            async with engine_at(server) as engine:
                session = engine.chat(1)
                session.add("system", "Be brief.")
                session.add("user", "Where to?")
                first = await session.answer(PARAMS)
                assert (first.text, first.stop, first.tokens) == ("Left", SampleStop.END, 3)
                assert first.logprobs is not None
                assert first.logprobs.tolist() == [-0.5, -0.25]
                assert engine.gives_logprobs
                session.add("user", "And now?")
                second = await session.answer(PARAMS)
                assert (second.text, second.stop, second.logprobs) == ("Rig", SampleStop.LENGTH, None)
                assert engine.stats.tokens_sampled == 6
                return session

        session = run(main())
        roles = ["system", "user", "assistant", "user", "assistant"]
        assert [message["role"] for message in session.messages] == roles
        assert server.paths == ["/v1/chat/completions"] * 2
        assert server.requests[1]["messages"] == session.messages[:4]
        assert server.requests[0]["logprobs"] is True
        assert server.requests[0]["max_tokens"] == 5
        assert "stop_token_ids" not in server.requests[0]

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    def test_a_thought_is_told_apart_and_not_shown_again(self, server: FakeServer, name: str) -> None:
        server.script = [chat_reply("Left", **{name: "The door is left."})]

        async def main() -> None:
            async with engine_at(server) as engine:
                session = engine.chat(1)
                session.add("user", "Where to?")
                answer = await session.answer(PARAMS)
                assert (answer.text, answer.reasoning) == ("Left", "The door is left.")
                assert session.messages[-1] == {"role": "assistant", "content": "Left"}

        run(main())

    def test_an_answer_that_was_cut_off_in_its_thought(self, server: FakeServer) -> None:
        server.script = [chat_reply(None, "length", reasoning_content="The door")]
        answer = run(answered(engine_at(server)))
        assert (answer.text, answer.reasoning, answer.stop) == ("", "The door", SampleStop.LENGTH)

    def test_a_tool_parser_is_told(self, server: FakeServer) -> None:
        server.script = [chat_reply(None, "stop", tool_calls=[{"function": {}}])]
        with pytest.raises(GenerationError, match="tool parser"):
            run(answered(engine_at(server)))

    def test_the_server_finds_the_context_too_long(self, server: FakeServer) -> None:
        server.script = [(400, {"error": {"message": "Too big.", "code": "context_length_exceeded"}})]

        async def main() -> None:
            async with engine_at(server) as engine:
                session = engine.chat(1)
                session.add("user", "Where to?")
                with pytest.raises(ContextOverflowError):
                    await session.answer(PARAMS)
                # The conversation is as it was.
                assert len(session.messages) == 1

        run(main())

    def test_forks_go_their_own_ways(self, server: FakeServer) -> None:
        server.script = [chat_reply("Left")]

        async def main() -> None:
            async with engine_at(server) as engine:
                parent = engine.chat(1)
                parent.add("user", "Where to?")
                forks = [parent.fork(2), parent.fork(3)]
                parent.close()
                await asyncio.gather(*(fork.answer(PARAMS) for fork in forks))
                forks[0].add("user", "Really?")
                assert [len(session.messages) for session in (parent, *forks)] == [1, 3, 2]

        run(main())
        assert len({request["seed"] for request in server.requests}) == 2

    def test_what_makes_no_sense_is_refused(self, server: FakeServer) -> None:
        server.script = [chat_reply("Left")]

        async def main() -> None:
            async with engine_at(server) as engine:
                session = engine.chat(1)
                with pytest.raises(GenerationError, match="nothing to answer"):
                    await session.answer(PARAMS)
                with pytest.raises(GenerationError, match="of role"):
                    session.add("assistant", "Left")
                session.add("user", "Where to?")
                await session.answer(PARAMS)
                with pytest.raises(GenerationError, match="nothing to answer"):
                    await session.answer(PARAMS)
                session.close()
                session.close()
                with pytest.raises(GenerationError, match="closed"):
                    await session.answer(PARAMS)

        run(main())
        assert len(server.requests) == 1


class TestSessions:
    def test_no_more_requests_at_once_than_allowed(self, server: FakeServer) -> None:
        def slowly(_: dict[str, Any]) -> Reply:
            deadline = time.monotonic() + 2  # for others to come
            while server.most_busy < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.02)
            return ids_reply([9])

        server.script = [slowly]

        async def main() -> None:
            async with engine_at(server, concurrency=3) as engine:
                assert engine.capacity == 3
                sessions = [engine.session(i) for i in range(12)]
                for session in sessions:
                    session.extend([1])
                await asyncio.gather(*(session.sample(PARAMS) for session in sessions))
                assert engine.stats.peak_sessions == 3

        run(main())
        assert len(server.requests) == 12
        assert 2 <= server.most_busy <= 3

    def test_a_session_that_samples_cannot_be_touched(self, server: FakeServer) -> None:
        release = threading.Event()

        def hang(_: dict[str, Any]) -> Reply:
            release.wait(10)
            return ids_reply([9])

        server.script = [hang]

        async def main() -> None:
            async with engine_at(server) as engine:
                session = engine.session(1)
                session.extend([1])
                task = asyncio.create_task(session.sample(PARAMS))
                await asyncio.sleep(0)
                with pytest.raises(GenerationError, match="sampling already"):
                    await session.sample(PARAMS)
                with pytest.raises(GenerationError, match="extended while"):
                    session.extend([1])
                with pytest.raises(GenerationError, match="forked while"):
                    session.fork(2)
                release.set()
                assert (await task).token_ids.tolist() == [9]

        run(main())

    def test_closing_and_giving_up_end_the_request(self, server: FakeServer) -> None:
        release = threading.Event()

        def hang(_: dict[str, Any]) -> Reply:
            release.wait(10)
            return ids_reply([9])

        server.script = [hang, hang, ids_reply([3, 9])]

        async def main() -> None:
            async with engine_at(server, concurrency=1) as engine:
                session = engine.session(1)
                session.extend([1])
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(session.sample(PARAMS), 0.1)
                assert session.length == 1
                closing = engine.session(2)
                closing.extend([1])
                task = asyncio.create_task(closing.sample(PARAMS))
                await asyncio.sleep(0.1)
                closing.close()
                with pytest.raises(GenerationError, match="closed while"):
                    await task
                # The only place is free again.
                assert (await session.sample(PARAMS)).token_ids.tolist() == [3, 9]

        try:
            run(main())
        finally:
            release.set()

    def test_nothing_to_go_on_from(self, server: FakeServer) -> None:
        engine = engine_at(server)
        with pytest.raises(GenerationError, match="at least one token"):
            run(engine.session(0).sample(PARAMS))
        session = engine.session(0)
        session.extend([1])
        session.close()
        with pytest.raises(GenerationError, match="closed"):
            run(session.sample(PARAMS))

    def test_an_engine_outlives_its_loops(self, server: FakeServer) -> None:
        server.script = [ids_reply([3], "length")]
        engine = engine_at(server)
        session = engine.session(0)
        session.extend([1])
        for _ in range(3):
            run(session.sample(PARAMS))
        assert session.token_ids == [1, 3, 3, 3]
        engine.reset_stats()
        assert engine.stats.tokens_sampled == 0

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"base_url": "localhost:8000/v1"}, "not the address"),
            ({"base_url": "ftp://host/v1"}, "not the address"),
            ({"base_url": "http://"}, "not the address"),
            ({"base_url": "http://host:port"}, "address"),
            ({"concurrency": 0}, "concurrency"),
            ({"timeout": 0}, "timeout"),
            ({"max_retries": -1}, "max_retries"),
            ({"prompts": "images"}, "prompts"),
        ],
    )
    def test_settings_that_make_no_sense(self, settings: dict[str, Any], told: str) -> None:
        with pytest.raises(GenerationError, match=told):
            RemoteEngine(**{"base_url": "http://localhost", "model": "tiny", **settings})
