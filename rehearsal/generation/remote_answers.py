"""Reading what OpenAI-compatible servers answer: text, stop, and token ids and log-probs where there are any.

Servers agree on the text and differ on the rest. Token ids come as ``token_ids`` (vLLM, if asked), as the ``id`` of
each entry of the log-probs (llama.cpp) or as tokens spelled ``token_id:17`` (vLLM, by a server option); log-probs come
in the form of the old completions API or in that of the chat API.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rehearsal.errors import GenerationError
from rehearsal.trajectory import SampleStop

_STOPS = {
    "stop": SampleStop.END, "eos": SampleStop.END, "eos_token": SampleStop.END, "stop_sequence": SampleStop.END,
    "end_turn": SampleStop.END, "length": SampleStop.LENGTH, "max_tokens": SampleStop.LENGTH,
}  # fmt: skip


@dataclass(frozen=True)
class RawAnswer:
    """One answer, before it is fitted to our tokens.

    Attributes:
        text: without the token that ended it, on most servers.
        stop: ``END`` or ``LENGTH``.
        reasoning: the thought, where a server tells it apart from the answer.
        token_ids: as sampled, or None.
        tokens: the text of each token, or None.
        logprobs: one for each token, NaN where it is missing; None if there are none.
        stop_token: the id of the token that ended the turn, where the server says which.
        prompt_tokens, cached_tokens, completion_tokens: as the server counted them, 0 where it does not.
    """

    text: str
    stop: SampleStop
    reasoning: str = ""
    token_ids: list[int] | None = None
    tokens: list[str] | None = None
    logprobs: list[float] | None = None
    stop_token: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


def read_answer(body: dict[str, Any]) -> RawAnswer:
    """The first choice of a completion or a chat completion.

    Raises:
        GenerationError: if there is none, if it is not in the form of the OpenAI API, or if something other than the
            policy and its limits ended it.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise GenerationError(
            "The server answered without any choices; look into its log, or check that it serves this kind of model."
        )
    choice = choices[0]
    reasoning = ""
    text = choice.get("text")
    if "message" in choice:
        message = choice["message"] if isinstance(choice["message"], dict) else {}
        text = message.get("content")
        thoughts = (message.get(name) for name in ("reasoning_content", "reasoning"))
        reasoning = next((thought for thought in thoughts if isinstance(thought, str)), "")
        if message.get("tool_calls"):
            raise GenerationError(
                "The server took the answer for a call of its tools and cut it up; switch its tool parser off."
            )
        if text is None and (reasoning or "content" in message):
            text = ""
    if not isinstance(text, str):
        raise GenerationError("The server's answer has no text; check that it is an OpenAI-compatible API.")
    reason = choice.get("finish_reason")
    if reason not in _STOPS:
        raise GenerationError(
            f'The server ended an answer for a reason that is not the policy\'s own ("{reason}"), '
            "so the answer cannot be used; switch filters and tools of the server off."
        )
    token_ids, tokens, logprobs = _tokens(choice)
    given = body.get("usage")
    usage: dict[str, Any] = given if isinstance(given, dict) else {}
    details = usage.get("prompt_tokens_details")
    ended_by = choice.get("stop_reason")
    return RawAnswer(
        text, _STOPS[reason], reasoning, token_ids, tokens, logprobs,
        ended_by if isinstance(ended_by, int) and not isinstance(ended_by, bool) else None,
        _count(usage.get("prompt_tokens")),
        _count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        _count(usage.get("completion_tokens")),
    )  # fmt: skip


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _tokens(choice: dict[str, Any]) -> tuple[list[int] | None, list[str] | None, list[float] | None]:
    """Token ids, token texts and log-probs of a choice, each None where it is not there for every token."""
    given = choice.get("token_ids")
    token_ids = list(given) if isinstance(given, list) and all(type(index) is int for index in given) else None
    report = choice.get("logprobs")
    if not isinstance(report, dict):
        return token_ids, None, None
    tokens: list[Any]
    values: list[Any]
    if isinstance(report.get("content"), list):
        entries = [entry if isinstance(entry, dict) else {} for entry in report["content"]]
        tokens = [entry.get("token") for entry in entries]
        values = [entry.get("logprob") for entry in entries]
        ids = [entry.get("id") for entry in entries]
        if token_ids is None and ids and all(type(index) is int for index in ids):
            token_ids = ids
    elif isinstance(report.get("tokens"), list) and isinstance(report.get("token_logprobs"), list):
        tokens, values = report["tokens"], report["token_logprobs"]
    else:
        return token_ids, None, None
    if len(tokens) != len(values) or not all(isinstance(token, str) for token in tokens):
        return token_ids, None, None
    spelled = [token.removeprefix("token_id:") for token in tokens]
    if (
        token_ids is None
        and tokens
        and all(
            token.startswith("token_id:") and number.isdecimal() for token, number in zip(tokens, spelled, strict=True)
        )
    ):
        token_ids = [int(number) for number in spelled]
    if token_ids is not None and len(token_ids) != len(tokens):
        # Log-probs that cannot be told to belong to these tokens belong to none.
        return token_ids, None, None
    logprobs = [float(value) if isinstance(value, int | float) else math.nan for value in values]
    return token_ids, tokens, logprobs
