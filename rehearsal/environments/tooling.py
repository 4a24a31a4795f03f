"""What an environment's own tools are made of; see :attr:`rehearsal.environments.base.TextEnv.tools`."""

from __future__ import annotations


class ToolFailure(Exception):
    """What a tool raises to tell the agent, in these words alone, that it cannot do what it was asked for."""
