"""A run from its recipe to its folder: what ``rehearsal.train`` and the command line call."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rehearsal.errors import CheckpointError
from rehearsal.models.load import Policy
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import Observer, SilentObserver
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.resuming import resumed_recipe
from rehearsal.training.runs import RunFolder, check_replaceable, remove_run

_SECONDS_OF_ONE_REQUEST = 1.0
"""GNU timeout and others send SIGTERM to the process and at once again to its group: that is one request."""


@contextlib.contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the present step, with a checkpoint; the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated = -math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal terminated
        if number == signal.SIGTERM:
            last, terminated = terminated, time.monotonic()
            if terminated < last + _SECONDS_OF_ONE_REQUEST:
                return
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_folder(parent: Path, name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


@dataclass
class TrainResult:
    """What a run left.

    Attributes:
        path: the run folder.
        summary: success before and after on held-out tasks, seconds, and so on.
        report: the HTML report, if one was written.
        policy: the trained policy.
    """

    path: Path
    summary: dict[str, Any]
    policy: Policy
    report: Path | None = None


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None, *, output: str | Path | None = None,
    resume: bool = False, overwrite: bool = False, observer: Observer | None = None, policy: Policy | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (), command: str | Sequence[str] = "rehearsal.train(...)",
) -> TrainResult:  # fmt: skip
    """Train a policy in an environment and write a run folder.

    Args:
        recipe: the name of a built-in recipe, a TOML file, a dictionary, or a ``Recipe``.
        output: the run folder; the first free one of runs/NAME, runs/NAME-2, ... if None.
        resume: go on with the run in ``output``, with the recipe that is stored there. ``recipe`` and ``overrides`` may
            change how long, how fast and where it goes on, and nothing that would make another run of it, see
            :mod:`rehearsal.training.resuming`.
        overwrite: delete an earlier run in ``output``, as soon as the new one is known to begin.
        observer: who watches; nobody if None.
        policy: a policy that is loaded already, instead of ``model.path``.
        overrides: options by dotted name.
        command: how the run was started, for its records.

    Raises:
        RehearsalError: with one sentence, for whatever the user can mend.
    """
    if resume and overwrite:
        raise CheckpointError("A run that goes on is not deleted first: leave out overwrite, or resume.")
    if resume and output is None:
        raise CheckpointError("To resume, say which run: output must name its folder.")
    if resume and output is not None:
        recipe = resumed_recipe(output, recipe, overrides)
    else:
        recipe = resolve_recipe(recipe, overrides)
    path = Path(output) if output is not None else free_folder(Path("runs"), recipe.name)
    if overwrite:
        check_replaceable(path)
    # Everything that can be wrong with model, environment and algorithm shows before a folder is made.
    trainer = Trainer(recipe, observer=observer or SilentObserver(), policy=policy)
    assert trainer.policy is not None
    device, told = describe_device(trainer.policy.device), trainer.recipe.to_toml()
    if overwrite:
        remove_run(path)
    folder = RunFolder.hold(path) if resume else RunFolder.create(path, told, command, device=device)
    with folder, stop_on_signals(trainer), contextlib.closing(trainer):
        trainer.folder = folder
        if resume:
            # What is wrong with a checkpoint shows before anything is written: a run that cannot be resumed stays as
            # it was.
            trainer.load_newest()
            folder.take_up(command, recipe_text=told, device=device)
            trainer.restore()
        summary = trainer.run()
    return TrainResult(path, summary, trainer.policy)


def describe_device(device: torch.device) -> str:
    """The processor or GPU in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{device.type}, {torch.get_num_threads()} threads"
