"""The errors that a user can cause and mend.

Everything that Rehearsal raises on purpose derives from :class:`RehearsalError`, and its message is one plain sentence
that says what is wrong and what to do. The command line prints that sentence and exits with 2; anything else that
escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class RehearsalError(Exception):
    """A problem that the user can mend; the message says how."""


class RecipeError(RehearsalError):
    """A recipe or an option on the command line that cannot be used."""


class ModelError(RehearsalError):
    """A model folder, tokenizer or chat template that cannot be used."""


class EnvironmentFault(RehearsalError):
    """An environment that broke its contract: it raised, hung, or answered with the wrong type."""


class ToolError(RehearsalError):
    """A tool that cannot be made or set up: a function without types, a corpus or a server that cannot be read."""


class GenerationError(RehearsalError):
    """Sampling cannot go on: a context or a memory budget is too small, or a server does not answer."""


class RewardError(RehearsalError):
    """A verifier, a combination of rewards or a file of tasks that cannot be used as it was asked for."""


class SandboxError(RehearsalError):
    """A sandbox that cannot be had as it was asked for, or that cannot go on."""


class CheckpointError(RehearsalError):
    """A checkpoint or run folder that cannot be read or written."""


class TrainingDiverged(RehearsalError):
    """A loss or a gradient was not finite; the step was not taken and the last good state is kept."""
