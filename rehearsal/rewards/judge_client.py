"""Asking a judge: a model behind an OpenAI-compatible API, with retries, a cache and an account of what it cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx

from rehearsal import usage
from rehearsal.errors import RewardError
from rehearsal.naming import secret_named
from rehearsal.rewards.verifier import VerificationError

LONGEST_WAIT = 120.0
"""Seconds. A server that asks for a longer pause is told to the user instead of waited for."""

_PASSING = frozenset({408, 425, 429})
_BACKOFF_LIMIT = 30.0

Message = Mapping[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a judge has cost so far.

    Attributes:
        requests: answers of the server.
        cached: answers taken from the cache, which cost nothing.
        prompt_tokens, completion_tokens: as the server counts them.
        money: by the prices given, in their currency; 0 without prices.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0

    def __str__(self) -> str:
        spent = f", {self.money:.4f} in all" if self.money else ""
        return (
            f"{self.requests} requests, {self.cached} from the cache, "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens{spent}"
        )


class JudgeClient:
    """Sends chats to one model and returns its answers. May be used from several threads.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: its name there.
        api_key_env: name of the environment variable that holds the API key; no key is sent if None. The key is kept
            out of every message.
        timeout: seconds for one try.
        max_retries: how often what can pass (a busy server, a lost connection) is tried again, with growing pauses.
        backoff: seconds before the first retry, on average half of it; doubled for each further one.
        cache: a file that keeps answers from one run to the next; in memory if None. Its key is all of the request's
            content, so a change of the model, the rubric or a single word asks anew.
        prices: for a million prompt tokens and for a million completion tokens.
        extra: further fields of each request, such as ``{"temperature": 0}``, which is also the default.

    Raises:
        RewardError: for an address, a limit or a cache that cannot be used, and for a key that is not set.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key_env: str | None = None, timeout: float = 60.0,
        max_retries: int = 4, backoff: float = 1.0, cache: str | Path | None = None,
        prices: tuple[float, float] | None = None, extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as problem:
            raise RewardError(f"The judge's address is none ({problem}).") from problem
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise RewardError(
                "The judge's address looks like http://localhost:8000/v1, without a name or password in it."
            )
        if not timeout > 0 or max_retries < 0:
            raise RewardError("A judge needs a timeout above 0 seconds and max_retries of 0 or more.")
        self.base_url = str(url).rstrip("/")
        self.model = model
        self._key = ""
        if api_key_env is not None:
            self._key = secret_named(api_key_env, "the judge's API key", RewardError)
        self._max_retries = max_retries
        self._backoff = backoff
        self._prices = prices
        self._extra = dict(extra) if extra is not None else {"temperature": 0}
        self._client = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None))
        self._timeout = timeout
        self._cache = _Cache(cache)
        self._lock = threading.Lock()
        self._cost = Cost()

    @property
    def cost(self) -> Cost:
        """What it has cost so far."""
        return self._cost

    @property
    def told(self) -> str:
        """Who is asked where, for people."""
        return f"{self.model} at {self.base_url}"

    def ask(
        self, messages: Sequence[Message], read: Callable[[str], T], *, tries: int = 2, purpose: str = "judge"
    ) -> T:  # fmt: skip
        """The model's answer to a chat, as ``read`` makes it out.

        Args:
            messages: the chat.
            read: takes the answer's text; raises a ValueError where it cannot be read. Only what can be read is kept.
            tries: how often the model is asked for an answer that can be read.
            purpose: what :mod:`rehearsal.usage` counts it as, "judge" or "feedback".

        Raises:
            VerificationError: if there is none, in a sentence that says why.
        """
        body = {"model": self.model, "messages": [dict(message) for message in messages], **self._extra}
        key = hashlib.sha256(json.dumps([self.base_url, body], sort_keys=True).encode()).hexdigest()
        known = self._cache.get(key)
        if known is not None:
            with contextlib.suppress(ValueError):  # kept by a version that read it otherwise; ask anew
                found = read(known)
                self._add(purpose, cached=1)
                return found
        text = ""
        for _ in range(tries):
            text = self._text(self._post(body), purpose)
            try:
                found = read(text)
            except ValueError:
                continue
            self._cache.put(key, text)
            return found
        raise VerificationError(f"The judge's answer cannot be read: {' '.join(text.split())[:200]!r}")

    def _text(self, answer: dict[str, Any], purpose: str) -> str:
        usage = answer.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        prompt, completion = (_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        self._add(purpose, requests=1, prompt_tokens=prompt, completion_tokens=completion)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise VerificationError(f"The judge at {self.base_url} answered without a text.")
        return content

    def close(self) -> None:
        """Close its connections and its cache."""
        self._client.close()
        self._cache.close()

    def _add(self, purpose: str, **counts: int) -> None:
        used = {f"{purpose}/{name}": float(n) for name, n in counts.items()}
        money = 0.0
        if self._prices is not None:
            tokens = (counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0))
            money = sum(n * price for n, price in zip(tokens, self._prices, strict=True)) / 1e6
            used[f"{purpose}/money"] = money
        with self._lock:
            old = self._cost
            self._cost = replace(
                old, money=old.money + money, **{name: getattr(old, name) + n for name, n in counts.items()}
            )
        usage.count(used)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        where = f"The judge at {self.base_url}"
        for attempt in range(self._max_retries + 1):
            wait = random.uniform(0.0, min(_BACKOFF_LIMIT, self._backoff * 2**attempt))
            try:
                response = self._client.post(f"{self.base_url}/chat/completions", json=body, headers=headers)
            except httpx.TimeoutException:
                failure = f"{where} did not answer within {self._timeout:g} s"
            except httpx.HTTPError as problem:
                failure = f"{where} cannot be reached ({self._plain(str(problem)) or type(problem).__name__})"
            else:
                if response.is_success:
                    return self._read(response)
                said = self._plain(response.text)
                failure = f'{where} answered {response.status_code}: "{said}"'
                if response.status_code not in _PASSING and response.status_code < 500:
                    raise VerificationError(f"{failure}; correct its address, model or key.")
                asked = _seconds(response.headers.get("retry-after"))
                if asked > LONGEST_WAIT:
                    raise VerificationError(f"{failure}; it asks to come back in {asked:.0f} s.")
                wait += asked
            if attempt < self._max_retries:
                time.sleep(wait)
        raise VerificationError(f"{failure}, in {self._max_retries + 1} tries.")

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise VerificationError(f"The judge at {self.base_url} answered something that is no JSON object.")
        return answer

    def _plain(self, text: str) -> str:
        """Somebody else's text on one line, cut, and without our key."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:300]


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _seconds(header: str | None) -> float:
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0  # a date; the usual pause will do
    return seconds if seconds > 0 else 0.0


class _Cache:
    """Answers by key, in memory or in a file that several processes may share."""

    def __init__(self, path: str | Path | None) -> None:
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False, timeout=30)
            with self._base:
                self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.Error as problem:
            raise RewardError(f"The cache {path} cannot be used ({problem}); name another file.") from problem

    def get(self, key: str) -> str | None:
        with self._lock:
            row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str) -> None:
        with self._lock, self._base:
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    def close(self) -> None:
        with self._lock:
            self._base.close()
