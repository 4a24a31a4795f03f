"""Which fields a server takes, found out as it refuses them.

The OpenAI API is a family of dialects: some servers ignore fields that they do not know, others refuse the request. A
refused field that only adds information, or that only repeats the usual value, is left out from then on, and a note
says so. A field that changes the distribution is never left out: that is an error.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from rehearsal.errors import GenerationError
from rehearsal.generation.remote_http import ServerRefusalError

logger = logging.getLogger(__name__)

# These only add to what a server tells, or make it repeat itself.
_TELLING = {
    "logprobs": "there are no log-probs",
    "return_token_ids": "sampled ids are found out from its text",
    "seed": "answers cannot be repeated",
}

NEUTRAL: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What samples from the model's own distribution. A server has defaults of its own, often from the model's folder (vLLM
takes top_k 20 from Qwen3's), so even what is switched off is said. With these values a field may be left out."""

_NEUTRAL_WORDS = {"temperature": "1", "top_p": "1", "top_k": "0 (all tokens)", "min_p": "0", "repetition_penalty": "1"}


class Dialect:
    """What one address of a server (``/completions``, ``/chat/completions``) is known not to take.

    Args:
        tokenizer: spells stop tokens out for servers that take only texts; may be None.
        fixed: names of fields that the user asked for; they are never left out.
        notes: sentences about the server are appended to it.
    """

    def __init__(self, tokenizer: Any, fixed: frozenset[str], notes: list[str]) -> None:
        self._tokenizer = tokenizer
        self._fixed = fixed
        self._notes = notes
        self._left_out: set[str] = set()

    def spoken(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body without the fields that the server does not take, or with others in their place.

        Raises:
            GenerationError: if the distribution that is asked for cannot be said to this server.
        """
        sent = {name: value for name, value in body.items() if name not in self._left_out}
        if "max_tokens" in self._left_out:
            sent["max_completion_tokens"] = body["max_tokens"]
        if "stop_token_ids" in self._left_out and "stop_token_ids" in body:
            # Every server ends at the model's own end token; the others it must look for in the text.
            own_end = getattr(self._tokenizer, "eos_token_id", None)
            stops = [self._tokenizer.decode([index]) for index in body["stop_token_ids"] if index != own_end]
            if stops:
                sent["stop"] = stops
        for name in self._left_out & NEUTRAL.keys() & body.keys():
            if body[name] != NEUTRAL[name]:
                raise GenerationError(f"The server does not take {name}; leave it at {_NEUTRAL_WORDS[name]}.")
        return sent

    def learn(self, sent: dict[str, Any], refusal: ServerRefusalError) -> bool:
        """Find out which fields a refusal is about; whether to ask again in other words.

        Raises:
            GenerationError: if the server cannot do what is asked, with what to do.
        """
        if refusal.status not in (400, 422):
            return False
        refused = {name for name in sent if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", refusal.said)}
        if "prompt" in refused and isinstance(sent.get("prompt"), list) and re.search(r"\bstr", refusal.said):
            raise GenerationError(
                f'{refusal} It does not take token ids; set prompts="text" and give the tokenizer, '
                "or use chat sessions."
            ) from refusal
        notes = {name: self._note(name, sent[name], refusal) for name in sorted(refused - self._fixed)}
        for name, note in notes.items():
            if note and name not in self._left_out:
                self._left_out.add(name)
                self._notes.append(note)
                logger.warning(note)
        return any(notes.values())

    def _note(self, name: str, value: Any, refusal: ServerRefusalError) -> str:
        """What it means that a field is left out; "" if it cannot be."""
        if name in _TELLING:
            return f"The server does not take {name}: {_TELLING[name]}."
        if name in NEUTRAL:
            if value != NEUTRAL[name]:
                raise GenerationError(
                    f"{refusal} It does not take {name}={value:g}; leave it at {_NEUTRAL_WORDS[name]}."
                ) from refusal
            return f"The server does not take {name}: its own default applies, whatever that is."
        if name == "max_tokens" and "max_completion_tokens" in refusal.said:
            return "The server does not take max_tokens: max_completion_tokens is sent."
        if name == "stop_token_ids":
            if self._tokenizer is None:
                raise GenerationError(
                    f"{refusal} It does not take stop_token_ids; give the tokenizer, so that their texts can be sent."
                ) from refusal
            return "The server does not take stop_token_ids: it looks for their texts."
        return ""
