"""Whether a chat template tells the model of tools, and asks for calls in the form that agents are read in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rehearsal.models.chat_frames import USER_WORD, Message, TemplateRefusalError

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_PROBE = {"name": "zqtool", "arguments": {"zqplace": "Zqvalue"}}


def shows_json_calls(render: Callable[[Sequence[Message], bool], str], tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a template writes the names of tools into a conversation, and a call as Hermes and Qwen do:
    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    Both are seen by rendering: a form that the template writes is the form that it tells the model of. Llama's JSON
    without tags, GLM's keys and values and Qwen3-Coder's XML are others.

    Args:
        render: runs the template with the tools.
        tools: their schemas.
    """
    start = [{"role": "user", "content": USER_WORD}]
    call = {"type": "function", "function": _PROBE}
    try:
        told = render(start, True)
        written = render([*start, {"role": "assistant", "content": "", "tool_calls": [call]}], False)
    except TemplateRefusalError:
        return False
    if USER_WORD not in told or not all(tool["function"]["name"] in told for tool in tools):
        return False
    found = [_read(match) for match in _CALL.findall(written)]
    return _PROBE in found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
