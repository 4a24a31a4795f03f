"""Experiment trackers: TensorBoard, Weights & Biases and trackio beside the run folder's own files.

Each is optional and imported only when asked for. The run folder is the record; a tracker is a copy for a screen, so
one that fails while a run is under way is switched off and the run goes on.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.errors import RecipeError
from rehearsal.training.json_lines import plain
from rehearsal.training.storage import storage_errors, write_atomically

PROJECT = "rehearsal"
"""The project that runs are filed under where neither WANDB_PROJECT nor TRACKIO_PROJECT names another."""


class Tracker(ABC):
    """Takes the numbers of a run as they come."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step. A step may come more than once, with other names."""

    @abstractmethod
    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the final numbers and let go of everything that is open."""


class TensorBoardTracker(Tracker):
    """Event files in ``RUN/tensorboard``, read by ``tensorboard --logdir RUN``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        """See :func:`make_trackers`. Events after ``resume_step`` are hidden by TensorBoard's own means."""
        _require("tensorboard", "tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        purge = None if resume_step is None else resume_step + 1
        self._writer = writer(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
        if resume_step is None:
            lines = (f"    {key} = {value}" for key, value in _flat(config).items())
            self._writer.add_text("recipe", "\n".join(lines))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric."""
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as text and close the file."""
        lines = (f"    {key} = {value}" for key, value in _flat(summary).items())
        self._writer.add_text("summary", "\n".join(lines))
        self._writer.close()


class WandbTracker(Tracker):
    """A run on Weights & Biases, online or, with WANDB_MODE=offline, in ``RUN/wandb``.

    Its id is kept in ``RUN/wandb_run_id.txt``, so that a resumed run goes on in the same place.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        """See :func:`make_trackers`."""
        wandb = _require("wandb", "wandb")
        file = run_dir / "wandb_run_id.txt"
        with storage_errors(file, writing=False):
            known = file.read_text().strip() if resume_step is not None and file.exists() else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            dir=str(run_dir),
            config=plain(config),
            id=known,
            resume="allow" if known else None,
        )
        write_atomically(file, str(self._run.id))
        # Weights & Biases drops numbers for steps that it has seen. With an axis of our own, the evaluation of a step
        # may come after its metrics, and a resumed run may play steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics with their step."""
        self._run.log({**_finite(metrics), "step": step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the summary and wait until everything is sent."""
        self._run.summary.update(plain(summary))
        self._run.finish()


class TrackioTracker(Tracker):
    """A run in trackio's local database, shown by ``trackio show``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int | None) -> None:
        """See :func:`make_trackers`."""
        trackio = _require("trackio", "trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_dir.name,
            config=_flat(plain(config)),
            resume="never" if resume_step is None else "allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics."""
        self._run.log(_finite(metrics), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the numbers of the summary as ``summary/NAME`` and wait until everything is stored."""
        numbers = {f"summary/{name}": value for name, value in _flat(plain(summary)).items()}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        if numbers:
            self._run.log(numbers)
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}
"""The trackers that a recipe may name."""


class Guarded(Tracker):
    """A tracker that cannot stop a run: when it fails, it is switched off, and says so once.

    Attributes:
        name: key in :data:`TRACKERS`.
        warning: what went wrong in one sentence, "" while the tracker works.
    """

    def __init__(self, name: str, tracker: Tracker, on_warning: Callable[[str], None] | None = None) -> None:
        """Wrap a tracker.

        Args:
            name: for the warning.
            tracker: what may fail.
            on_warning: is told the warning, beside Python's own ``warnings``; ``RunFolder.add_warning`` fits.
        """
        self.name = name
        self.warning = ""
        self._tracker: Tracker | None = tracker
        self._on_warning = on_warning

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the tracker, if it still works."""
        if self._tracker is not None:
            try:
                self._tracker.log(step, metrics)
            except Exception as error:  # whatever a tracker or its network does must not end the run
                self._switch_off(error, f"at step {step}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Finish the tracker, if it still works. Doing so twice does nothing."""
        if self._tracker is not None:
            try:
                self._tracker.finish(summary)
            except Exception as error:
                self._switch_off(error, "while finishing")
            self._tracker = None

    def _switch_off(self, error: Exception, when: str) -> None:
        self._tracker = None
        self.warning = (
            f"the tracker {self.name} failed {when} and was switched off; the run goes on and its own files are "
            f"complete ({type(error).__name__}: {error})"
        )
        warnings.warn(self.warning, stacklevel=3)
        if self._on_warning is not None:
            self._on_warning(self.warning)


def make_trackers(
    names: Sequence[str],
    run_dir: str | Path,
    config: Mapping[str, Any],
    *,
    resume_step: int | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> list[Tracker]:
    """Start the trackers that a recipe names.

    Args:
        names: keys of :data:`TRACKERS`; none is fine.
        run_dir: the run folder; its name becomes the run's name.
        config: the resolved recipe, shown beside the numbers.
        resume_step: the step that a resumed run goes on from; None for a new run.
        on_warning: is told when a tracker is switched off; ``RunFolder.add_warning`` fits.

    Returns:
        The trackers, each of them a :class:`Guarded`: none can stop the run.

    Raises:
        RecipeError: for an unknown name, a package that is not installed, or a tracker that does not start (no
            login, no network). Before the first step, a run can still be mended.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise RecipeError(f"{unknown[0]!r} is no tracker; there are {', '.join(TRACKERS)}.")
    started: list[Tracker] = []
    for name in dict.fromkeys(names):
        try:
            started.append(Guarded(name, TRACKERS[name](Path(run_dir), config, resume_step), on_warning))
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(
                f"the tracker {name} did not start ({type(error).__name__}: {error}); mend that, or leave it out of "
                "the recipe."
            ) from error
    return started


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(
            f'the tracker {extra} needs a package that is not installed: pip install "rehearsal[{extra}]"'
        ) from error


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite numbers: trackers draw gaps for missing values and fail, or lie, on others."""
    values = {name: plain(value) for name, value in metrics.items()}
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value) if isinstance(value, list | tuple) else value
    return flat
