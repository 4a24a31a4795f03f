"""Train, validation and test tasks that differ in content, not only in seed.

A task belongs to the split that the hash of its content falls into, so two episodes of different splits never show the
same task, however they were drawn, and no list of tasks has to be stored. The hash is BLAKE2b, which is the same on
every machine and in every process (Python's own ``hash`` of a string is not).

Published environments for language agents separate the splits by seed alone or draw both from one file, and two seeds
may well give the same small level: what is measured then is partly memory. Nor is it enough that whole tasks differ:
the start of one level is what another looks like after two moves. So levels are dealt out by what all of their
positions share, such as walls and targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rehearsal.environments.base import SPLITS
from rehearsal.errors import EnvironmentFault, RecipeError

Task = TypeVar("Task")

SHARES: dict[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""The share of all contents that each split gets."""


def content_split(content: str) -> str:
    """The split, one of ``SPLITS``, that a task with this content belongs to."""
    digest = hashlib.blake2b(content.encode(), digest_size=8, person=b"rehearsal-split").digest()
    point = int.from_bytes(digest, "big") / 2**64
    for split in SPLITS:
        point -= SHARES[split]
        if point < 0:
            return split
    return SPLITS[-1]  # the shares add up to one only within rounding


def task_key(content: str) -> str:
    """A short key of a task's content, 16 hexadecimal digits; the ``info["task"]`` of the built-in environments."""
    return hashlib.blake2b(content.encode(), digest_size=8, person=b"rehearsal-task").hexdigest()


def split_option(options: Mapping[str, Any] | None) -> str:
    """The split that the options of a reset ask for; "train" if they do not say.

    Raises:
        RecipeError: for a split that does not exist.
    """
    split = (options or {}).get("split", "train")
    if split not in SPLITS:
        raise RecipeError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return str(split)


def draw_in_split(
    draw: Callable[[], Task | None], content: Callable[[Task], str], split: str, max_tries: int = 5_000
) -> Task:
    """Draw tasks until the content of one falls into ``split``.

    Args:
        draw: draws one task, or returns None where a draw came to nothing.
        content: the canonical text of a task.
        split: one of ``SPLITS``.
        max_tries: draws after which to give up.

    Raises:
        EnvironmentFault: when no draw fitted, because the parameters allow too few different tasks.
    """
    drawn = 0
    for _ in range(max_tries):
        task = draw()
        if task is None:
            continue
        drawn += 1
        if content_split(content(task)) == split:
            return task
    if drawn == 0:
        raise EnvironmentFault(
            f"None of {max_tries} draws gave a task that keeps the rules of the environment; relax its parameters."
        )
    raise EnvironmentFault(
        f"None of {drawn} tasks drawn belongs to the {split} split: the parameters of the environment allow too few "
        "different tasks; make it larger."
    )
