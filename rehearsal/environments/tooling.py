"""What an environment's own tools are made of; see :attr:`rehearsal.environments.base.TextEnv.tools`."""

from __future__ import annotations


class ToolFailure(Exception):
    """What a tool raises to tell the agent, in these words alone, that it cannot do what it was asked for."""


def clean_text(text: str) -> str:
    """Without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
