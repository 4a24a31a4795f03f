"""Posting JSON to a server that may be slow, busy, broken or not there.

What can pass (a busy server, a lost connection, no answer in time) is tried again, a bounded number of times and with
growing pauses; what cannot (a wrong key, a wrong name, a refused request) is told at once, in a sentence.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from rehearsal.errors import GenerationError
from rehearsal.generation.session import EngineStats
from rehearsal.naming import secret_named

LONGEST_WAIT = 300.0
"""Seconds. A server that asks for a longer pause (Retry-After) is told to the user instead of waited for."""

_BACKOFF_LIMIT = 30.0
_CONNECT_TIMEOUT = 10.0
_RETRIED = frozenset({408, 425, 429})
_NOBODY_THERE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
_CONTEXT_WORDS = re.compile(
    r"context[ _](length|window|size|limit)|maximum (context|model length)|max_model_len|max_context"
    r"|(prompt|input|request)[\w ]* too long|too many tokens",
    re.IGNORECASE,
)


class ServerRefusalError(GenerationError):
    """The server would not take a request.

    Attributes:
        status: the HTTP status.
        said: what the server said about it, "" if nothing.
    """

    def __init__(self, sentence: str, status: int, said: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.said = said

    @property
    def lasting(self) -> bool:
        """Whether it would refuse any other request too: for a wrong key, a wrong name or a wrong address."""
        return self.status in (401, 403, 404) or 300 <= self.status < 400


class UnreachableError(GenerationError):
    """Nobody answers at the server's address, however often it is asked."""


class ContextOverflowError(ServerRefusalError):
    """The prompt, or the prompt and the answer that was asked for, does not fit into the server's context."""


@dataclass
class _Link:
    """What belongs to one event loop: connections and the gate before them."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    gate: asyncio.Semaphore


@dataclass
class Transport:
    """Posts to one server.

    Args:
        base_url: such as ``http://localhost:8000/v1``; an address without a path gets ``/v1``.
        stats: gives the counters to add to.
        api_key_env: name of the environment variable that holds the API key; no key is sent if None. The key itself
            is kept out of every message, representation and log.
        concurrency: the most requests at once.
        timeout: seconds from a request to the end of its answer.
        max_retries: how often a request is tried again.
        backoff: seconds before the first retry, on average half of it; doubled for each further one.

    Raises:
        GenerationError: for an address that is none, and for a variable that is not set.
    """

    base_url: str
    stats: Callable[[], EngineStats]
    api_key_env: str | None = None
    concurrency: int = 32
    timeout: float = 120.0
    max_retries: int = 5
    backoff: float = 1.0
    _key: str = field(default="", init=False, repr=False)
    _link: _Link | None = field(default=None, init=False, repr=False)
    _verify: Any = field(default=True, init=False, repr=False)
    _in_flight: int = field(default=0, init=False, repr=False)
    _busy_since: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise GenerationError(
                f"The server's address is none ({error}); it looks like http://localhost:8000/v1."
            ) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise GenerationError(
                f'"{self.base_url}" is not the address of a server; it looks like http://localhost:8000/v1.'
            )
        if url.userinfo:
            raise GenerationError(
                "The server's address holds a password, which would show in logs; "
                "put it into an environment variable and give the variable's name as api_key_env."
            )
        if url.path.strip("/") == "":
            url = url.copy_with(path="/v1")
        self.base_url = str(url).rstrip("/")
        if self.concurrency < 1:
            raise GenerationError(f"concurrency must be 1 or more, not {self.concurrency}.")
        if not self.timeout > 0:
            raise GenerationError(f"timeout must be above 0 seconds, not {self.timeout}.")
        if self.max_retries < 0:
            raise GenerationError(f"max_retries must be 0 or more, not {self.max_retries}.")
        if self.api_key_env is not None:
            self._key = secret_named(self.api_key_env, "the server's API key", GenerationError)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON answer to ``body``.

        Raises:
            ContextOverflowError, ServerRefusalError: if the server would not take the request.
            UnreachableError: if nobody is there.
            GenerationError: if it stays busy or broken, or answers something that is not JSON.
        """
        link = self._linked()
        async with link.gate:
            stats = self.stats()
            if self._in_flight == 0:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
            stats.peak_sessions = max(stats.peak_sessions, self._in_flight)
            try:
                return await self._post(link.client, f"{self.base_url}/{path}", json.dumps(body).encode())
            finally:
                self._in_flight -= 1
                if self._in_flight == 0:
                    self.stats().seconds += time.perf_counter() - self._busy_since

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        link, self._link = self._link, None
        if link is not None and link.loop is asyncio.get_running_loop():
            await link.client.aclose()

    def _linked(self) -> _Link:
        loop = asyncio.get_running_loop()
        if self._link is None or self._link.loop is not loop:
            # Connections cannot move to another loop; those of a loop that ended are closed with it.
            if self._verify is True and self.base_url.startswith("https:"):
                self._verify = httpx.create_ssl_context()
            client = httpx.AsyncClient(
                timeout=httpx.Timeout(self.timeout, connect=min(_CONNECT_TIMEOUT, self.timeout), pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
                verify=self._verify,
            )
            self._link = _Link(loop, client, asyncio.Semaphore(self.concurrency))
            self._in_flight = 0
        return self._link

    async def _post(self, client: httpx.AsyncClient, url: str, payload: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(self.max_retries + 1):
            wait = random.uniform(0.0, min(_BACKOFF_LIMIT, self.backoff * 2**attempt))
            tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
            cause: Exception | None = None
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.post(url, content=payload, headers=headers)
            except (TimeoutError, httpx.TimeoutException) as error:
                cause = error
                self._count("timeouts")
                failure = (
                    f"The server at {self.base_url} did not answer within {self.timeout:g} s ({tries}); "
                    "raise the timeout, lower max_tokens or send fewer requests at once."
                )
            except httpx.HTTPError as error:
                cause = error
                detail = self._plain(str(error)) or type(error).__name__
                failure = (
                    f"The server at {self.base_url} cannot be reached ({detail}; {tries}); "
                    "start it or correct its address."
                )
            else:
                said, code = self._complaint(response)
                status = response.status_code
                passing = (status in _RETRIED or status >= 500) and code != "insufficient_quota"
                if not passing:
                    return self._answer(response, said, code)
                failure = (
                    f"The server at {self.base_url} answered {status} {response.reason_phrase} ({tries})"
                    f"{_quoted(said)}; look into its log or send fewer requests at once."
                )
                asked = _retry_after(response.headers.get("retry-after"))
                if asked is not None:
                    if asked > LONGEST_WAIT:
                        raise GenerationError(
                            f"The server at {self.base_url} answered {status} and asks to come back in {asked:.0f} s; "
                            "try again later or use another server."
                        )
                    wait = asked + wait
            if attempt == self.max_retries:
                raise (UnreachableError if isinstance(cause, _NOBODY_THERE) else GenerationError)(failure) from cause
            self.stats().retries += 1
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _answer(self, response: httpx.Response, said: str, code: str) -> dict[str, Any]:
        status, told = response.status_code, _quoted(said)
        where = f"The server at {self.base_url}"
        if status in (401, 403):
            if self.api_key_env is None:
                what = "wants an API key; put it into an environment variable and give its name as api_key_env"
            else:
                what = f"does not accept the API key in {self.api_key_env}; correct it"
            raise ServerRefusalError(f"{where} {what} ({status}{told}).", status, said)
        if status == 404:
            raise ServerRefusalError(
                f"{where} does not know this model or this address (404{told}); "
                f"GET {self.base_url}/models lists its models, and most addresses end with /v1.",
                status, said,
            )  # fmt: skip
        if response.is_redirect:
            target = self._plain(response.headers.get("location", "elsewhere"))
            raise ServerRefusalError(f"{where} has moved to {target}; give that address.", status, said)
        if status in (400, 413, 422) and (code == "context_length_exceeded" or _CONTEXT_WORDS.search(said)):
            raise ContextOverflowError(
                f"The prompt and its answer do not fit into the context of the server at {self.base_url} "
                f"({status}{told}); lower max_context or max_tokens, or start the server with a longer context.",
                status, said,
            )  # fmt: skip
        if not response.is_success:
            raise ServerRefusalError(f"{where} refused the request ({status}{told}).", status, said)
        if "event-stream" in response.headers.get("content-type", ""):
            raise GenerationError(
                f"{where} streams its answer although it was asked not to; streams are not supported, "
                "so switch streaming off there."
            )
        try:
            body = response.json()
        except ValueError as error:
            raise GenerationError(
                f"{where} answered something that is not JSON{_quoted(self._plain(response.text))}; "
                "check that the address is that of an OpenAI-compatible API."
            ) from error
        if not isinstance(body, dict):
            raise GenerationError(
                f"{where} answered JSON that is no object; check that the address is that of an OpenAI-compatible API."
            )
        if body.get("error") and not body.get("choices"):
            raise ServerRefusalError(f"{where} reports an error{told}.", status, said)
        return body

    def _complaint(self, response: httpx.Response) -> tuple[str, str]:
        """What an error body says, and its code, in the forms that OpenAI, vLLM, SGLang and FastAPI use."""
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return ("" if response.is_success else self._plain(response.text)), ""
        error = body.get("error")
        inner = error if isinstance(error, dict) else body
        said = inner.get("message") or (error if isinstance(error, str) else "") or body.get("detail") or ""
        if isinstance(said, list):
            # FastAPI's validation errors: what is wrong, and with which field.
            items = [item for item in said if isinstance(item, dict)]
            said = "; ".join(f"{item.get('msg', '')} {'.'.join(map(str, item.get('loc', ())))}" for item in items)
        parameter = inner.get("param")
        said = self._plain(str(said))
        if isinstance(parameter, str) and parameter and parameter not in said:
            said = f"{said} ({parameter})"
        return said, str(inner.get("code") or "")

    def _plain(self, text: str) -> str:
        """Somebody else's text on one line, cut, and without our key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:297] + "..."

    def _count(self, name: str) -> None:
        extra = self.stats().extra
        extra[name] = extra.get(name, 0.0) + 1.0


def _quoted(said: str) -> str:
    return f': "{said}"' if said else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    # A header may say anything: NaN and the past mean now.
    return seconds if seconds > 0 else 0.0
