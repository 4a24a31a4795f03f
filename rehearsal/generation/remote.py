"""The remote engine: samples from a server that speaks the OpenAI API (vLLM, SGLang, llama.cpp, hosted models).

There are two ways to talk to one:

- **Tokens**, over ``/completions``: a :class:`RemoteSession` is a :class:`rehearsal.generation.session.Session`. It
  sends token ids where the server takes them (vLLM), or their text where it does not, and takes back the sampled ids
  where the server gives them. Where it gives only text, that text is tokenised here: such tokens are *not exactly* what
  was sampled, which ``stats.extra["inexact_answers"]`` counts.
- **Text**, over ``/chat/completions``: a :class:`ChatSession` holds messages; the server's own chat format turns them
  into tokens. This is all that hosted models offer. It serves evaluation, never training.

What the server's log-probs mean is the server's affair. They are taken as those of the distribution sampled from where
that is the model's own (temperature 1, nothing truncated), or where ``processed_logprobs`` says that the server applies
temperature and truncation first (vLLM: ``--logprobs-mode processed_logprobs``); otherwise they are NaN.

Servers differ in the fields they know. One that refuses a field that only adds information, or that only repeats the
usual value, is asked again without it, once, and :attr:`RemoteEngine.notes` and the log say so. A field that changes
the distribution is never left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from rehearsal.errors import GenerationError
from rehearsal.generation.remote_answers import RawAnswer, read_answer
from rehearsal.generation.remote_dialect import NEUTRAL, Dialect
from rehearsal.generation.remote_http import ContextOverflowError, ServerRefusalError, Transport, UnreachableError
from rehearsal.generation.remote_text import TokenText
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.generation.session import EngineStats, Sampled
from rehearsal.trajectory import SampleStop

__all__ = [
    "ChatAnswer", "ChatSession", "ContextOverflowError", "RemoteEngine", "RemoteSession", "ServerRefusalError",
    "TextSession", "UnreachableError",
]  # fmt: skip


@dataclass(frozen=True)
class ChatAnswer:
    """What one call of :meth:`TextSession.answer` brought.

    Attributes:
        text: the answer.
        logprobs: float32 of shape (T,), one for each of the server's tokens under the distribution sampled from, NaN
            where one is missing; None where the server gives none.
        stop: ``END`` or ``LENGTH``.
        reasoning: the thought, where the server tells it apart from the answer; "" where it is part of the text or
            there is none.
        tokens: tokens of answer and thought as the server counted them, 0 where it does not.
    """

    text: str
    logprobs: np.ndarray | None
    stop: SampleStop
    reasoning: str = ""
    tokens: int = 0


class TextSession(Protocol):
    """One growing conversation, in text: what a rollout needs of a model whose tokens it cannot see."""

    def add(self, role: str, text: str) -> None:
        """Append a message that the model did not write; ``role`` is "system", "user" or "tool"."""

    async def answer(self, params: SamplingParams) -> ChatAnswer:
        """Sample an answer of up to ``params.max_tokens`` tokens and append it.

        Raises:
            ContextOverflowError: if the conversation does not fit into the server's context; an episode ends there with
                ``StopReason.CONTEXT_LIMIT``.
            UnreachableError: if there is no server.
            ServerRefusalError: if it would not take this request, or, where that is ``lasting``, any.
            GenerationError: if the server does not answer this request, or answers something that cannot be used.
        """

    def fork(self, key: int) -> TextSession:
        """A session with the same conversation and the noise stream ``key``."""

    def close(self) -> None:
        """End the session and what it is asking for. Closing twice is harmless."""


class _Exchange:
    """What both kinds of session share: one request at a time, and closing."""

    def __init__(self, engine: RemoteEngine, key: int) -> None:
        self._engine = engine
        self.key = key
        self.closed = False
        self._request: asyncio.Task[RawAnswer] | None = None

    def _idle(self, what: str) -> None:
        if self._request is not None:
            raise GenerationError(f"A session cannot be {what} while it samples; wait for the answer first.")

    async def _exchange(self, request: Coroutine[Any, Any, RawAnswer]) -> RawAnswer:
        self._request = asyncio.create_task(request)
        try:
            return await self._request
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.closed and task is not None and not task.cancelling():
                raise GenerationError("The session was closed while it was sampling.") from None
            raise
        finally:
            self._request = None

    def _ready(self) -> None:
        if self.closed:
            raise GenerationError("This session is closed; open a new one.")
        if self._request is not None:
            raise GenerationError("This session is sampling already; wait for the first call to return.")

    def close(self) -> None:
        """End the session; a request under way is cancelled. Closing twice is harmless."""
        self.closed = True
        if self._request is not None:
            self._request.cancel()


class RemoteSession(_Exchange):
    """A session of tokens; see :class:`rehearsal.generation.session.Session`.

    A server keeps no session: each sample sends the whole context, and a server with a prefix cache reads only what is
    new. The token that ended a turn is part of the sample where the server tells it, and where only one can have been
    it; where several could, none is added.
    """

    def __init__(self, engine: RemoteEngine, key: int) -> None:
        super().__init__(engine, key)
        self.token_ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def room(self) -> int:
        return self._engine.max_context - len(self.token_ids)

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        self._idle("extended")
        if len(token_ids) > self.room:
            raise GenerationError(
                f"{len(token_ids)} more tokens do not fit: {self.length} of {self._engine.max_context} tokens of "
                "context are used. Raise max_context or shorten the episode."
            )
        self.token_ids.extend(int(index) for index in token_ids)

    async def sample(self, params: SamplingParams) -> Sampled:
        self._ready()
        if not self.token_ids:
            raise GenerationError("A session needs at least one token before it can sample; call extend() first.")
        if self.room == 0:
            return Sampled(np.empty(0, np.int32), np.empty(0, np.float32), SampleStop.CONTEXT)
        room = self.room
        most = min(params.max_tokens, room)
        raw = await self._exchange(self._engine._complete(self.token_ids, self.key, params, most))
        ids, logprobs = self._engine._tokens_of(raw, params)
        stop = raw.stop
        # A text that was tokenised here may have come out longer than what was sampled.
        if len(ids) > room or (len(ids) == room and stop == SampleStop.LENGTH):
            ids, logprobs, stop = ids[:room], logprobs[:room], SampleStop.CONTEXT
        self.token_ids.extend(ids)
        self._engine.stats.tokens_sampled += len(ids)
        return Sampled(np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32), stop)

    def fork(self, key: int) -> RemoteSession:
        self._idle("forked")
        child = RemoteSession(self._engine, key)
        child.token_ids = list(self.token_ids)
        return child


class ChatSession(_Exchange):
    """A conversation with a server that takes messages; see :class:`TextSession`.

    The conversation keeps an answer without its ``reasoning``, as most chat formats do; :meth:`restate` puts something
    else in its place. ``params.stop_token_ids`` are not sent: the server's chat format ends an answer.
    """

    def __init__(self, engine: RemoteEngine, key: int) -> None:
        super().__init__(engine, key)
        self._messages: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the conversation: ``role`` and ``content`` of each message."""
        return [dict(message) for message in self._messages]

    def add(self, role: str, text: str) -> None:
        self._idle("extended")
        if role not in ("system", "user", "tool"):
            raise GenerationError(f'A message is of role "system", "user" or "tool", not "{role}".')
        self._messages.append({"role": role, "content": text})

    async def answer(self, params: SamplingParams) -> ChatAnswer:
        self._ready()
        if not self._messages or self._messages[-1]["role"] in ("system", "assistant"):
            raise GenerationError("There is nothing to answer; add a message of the user first.")
        raw = await self._exchange(self._engine._chat(self._messages, self.key, params))
        self._messages.append({"role": "assistant", "content": raw.text})
        logprobs = self._engine._logprobs_of(raw, params)
        tokens = raw.completion_tokens or (len(raw.logprobs) if raw.logprobs is not None else 0)
        self._engine.stats.tokens_sampled += tokens
        values = None if logprobs is None else np.array(logprobs, dtype=np.float32)
        return ChatAnswer(raw.text, values, raw.stop, raw.reasoning, tokens)

    def restate(self, text: str) -> None:
        """Let the conversation remember the last answer as ``text``."""
        self._idle("changed")
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise GenerationError("There is no answer to restate.")
        self._messages[-1]["content"] = text

    def fork(self, key: int) -> ChatSession:
        self._idle("forked")
        child = ChatSession(self._engine, key)
        child._messages = self.messages
        return child


class RemoteEngine:
    """Samples from a server that speaks the OpenAI API.

    Several event loops may use an engine one after the other. Call :meth:`aclose` at the end of the last, or use the
    engine as an asynchronous context manager, to close its connections in order.

    Args:
        base_url: such as ``http://localhost:8000/v1``; an address without a path gets ``/v1``.
        model: the model's name on the server.
        tokenizer: the Hugging Face tokenizer of the model; needed for sessions of tokens unless the server takes and
            gives token ids (vLLM).
        prompts: whether sessions of tokens send "ids" or "text".
        max_context: the most tokens of one session of tokens. The server's context must not be shorter.
        concurrency: the most requests at once.
        timeout: seconds from a request to the end of its answer.
        max_retries: how often a request is tried again after 408, 425, 429, 5xx, a lost connection or a timeout.
        backoff: seconds before the first retry, on average half of it; doubled for each further one. A pause that the
            server asks for (Retry-After) is kept.
        api_key_env: name of the environment variable that holds the API key.
        processed_logprobs: whether the server's log-probs are those after temperature and truncation.
        extra_body: further fields for every request, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``.

    Attributes:
        capacity: the same as ``concurrency``.
        gives_logprobs: whether an answer has brought log-probs that could be used; False before the first.
        notes: sentences about the server that a user should know.
        stats: ``extra`` counts "timeouts", "inexact_prompts" (texts that the tokenizer does not turn back into the
            ids of the session) and "inexact_answers" (sampled ids that had to be guessed from text).

    Raises:
        GenerationError: for an address, a key variable or a combination of settings that cannot be used.
    """

    def __init__(
        self, base_url: str, model: str, *, tokenizer: Any = None, prompts: Literal["ids", "text"] = "ids",
        max_context: int = 8192, concurrency: int = 32, timeout: float = 120.0, max_retries: int = 5,
        backoff: float = 1.0, api_key_env: str | None = None, processed_logprobs: bool = False,
        extra_body: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if prompts not in ("ids", "text"):
            raise GenerationError(f'prompts must be "ids" or "text", not "{prompts}".')
        if prompts == "text" and tokenizer is None:
            raise GenerationError('prompts="text" needs the tokenizer of the model; give one, or use chat sessions.')
        self.model = model
        self.tokenizer = tokenizer
        self.max_context = int(max_context)
        self.capacity = concurrency
        self.gives_logprobs = False
        self.stats = EngineStats()
        self.notes: list[str] = []
        self._prompts = prompts
        self._processed = processed_logprobs
        self._extra_body = dict(extra_body or {})
        self._text = None if tokenizer is None else TokenText(tokenizer)
        self._dialects = {
            path: Dialect(tokenizer, frozenset(self._extra_body), self.notes)
            for path in ("completions", "chat/completions")
        }
        self._transport = Transport(
            base_url, lambda: self.stats, api_key_env, concurrency, timeout, max_retries, backoff
        )  # fmt: skip

    def session(self, key: int) -> RemoteSession:
        """A new, empty session of tokens; the noise stream ``key`` seeds its requests."""
        return RemoteSession(self, key)

    def chat(self, key: int) -> ChatSession:
        """A new, empty conversation; the noise stream ``key`` seeds its requests."""
        return ChatSession(self, key)

    def reset_stats(self) -> None:
        self.stats = EngineStats()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def __aenter__(self) -> RemoteEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Requests

    async def _complete(self, token_ids: Sequence[int], key: int, params: SamplingParams, most: int) -> RawAnswer:
        body = {
            **self._fields(key, len(token_ids), params), "max_tokens": most, "logprobs": 1, "return_token_ids": True,
            "prompt": list(token_ids),
        }  # fmt: skip
        if self._prompts == "text":
            assert self._text is not None
            body["prompt"], exact = self._text.prompt(token_ids)
            if not exact:
                self._count("inexact_prompts")
        if params.stop_token_ids:
            body["stop_token_ids"] = list(params.stop_token_ids)
        return await self._ask("completions", body)

    async def _chat(self, messages: list[dict[str, str]], key: int, params: SamplingParams) -> RawAnswer:
        body = {
            **self._fields(key, len(messages), params), "max_tokens": params.max_tokens, "logprobs": True,
            "messages": messages,
        }  # fmt: skip
        return await self._ask("chat/completions", body)

    def _fields(self, key: int, position: int, params: SamplingParams) -> dict[str, Any]:
        return {
            "model": self.model, "stream": False, **NEUTRAL, "temperature": params.temperature, "top_p": params.top_p,
            "top_k": params.top_k or NEUTRAL["top_k"], "seed": stream_key(key, position) % 2**31, **self._extra_body,
        }  # fmt: skip

    async def _ask(self, path: str, body: dict[str, Any]) -> RawAnswer:
        dialect = self._dialects[path]
        while True:
            sent = dialect.spoken(body)
            try:
                answer = await self._transport.post(path, sent)
                break
            except ContextOverflowError:
                raise
            except ServerRefusalError as refusal:
                if not dialect.learn(sent, refusal):
                    raise
        raw = read_answer(answer)
        self.stats.forwards += 1
        self.stats.tokens_prefilled += raw.prompt_tokens - raw.cached_tokens
        self.stats.tokens_shared += raw.cached_tokens
        return raw

    def _tokens_of(self, raw: RawAnswer, params: SamplingParams) -> tuple[list[int], list[float]]:
        """Sampled ids and log-probs of an answer; NaN where one is not known."""
        logprobs = self._logprobs_of(raw, params)
        ids = raw.token_ids
        if ids is None:
            if self._text is None:
                raise GenerationError(
                    "The server gives no token ids, only text; give the tokenizer of the model, or use chat sessions."
                )
            ids, exact = self._text.answer(raw)
            if not exact:
                logprobs = None
                self._count("inexact_answers")
        ids = list(ids)
        values = [float("nan")] * len(ids) if logprobs is None else list(logprobs)
        if raw.stop == SampleStop.END and not (ids and ids[-1] in params.stop_token_ids):
            last = raw.stop_token
            if last not in params.stop_token_ids:
                last = params.stop_token_ids[0] if len(params.stop_token_ids) == 1 else None
            if last is not None:
                ids.append(last)
                values.append(float("nan"))
        return ids, values

    def _logprobs_of(self, raw: RawAnswer, params: SamplingParams) -> list[float] | None:
        own = params.temperature == 1.0 and not params.truncates
        if raw.logprobs is None or not (own or self._processed):
            return None
        self.gives_logprobs = True
        return raw.logprobs

    def _count(self, name: str) -> None:
        self.stats.extra[name] = self.stats.extra.get(name, 0.0) + 1.0
