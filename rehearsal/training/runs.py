"""The run folder: everything that one training run leaves behind, in files that any tool can read.

Layout::

    NAME/
      recipe.toml         the resolved recipe
      run.json            what this run is and how it stands, see :class:`RunInfo`
      metrics.jsonl       one JSON object a training step: "step", "time" (seconds of training so far), metrics by name
      evaluations.jsonl   one JSON object an evaluation: "step", "time", "split", "episodes", "success", ...
      trajectories/       train_000010.parquet, eval_000010.parquet (see ``rehearsal.training.trajectory_store``)
      report.html         the report for people

Checkpoints and the final policy live beside these files and are written elsewhere. One process at a time may write to
a run folder: it holds a lock on ``.lock`` for as long as it lives, so a killed process never leaves a folder locked.
Whatever is replaced is replaced atomically (written aside, then renamed), and what a killed process has left aside is
removed on resuming; the two ``.jsonl`` files only grow, and a last line that a crash has torn is left out on reading
and removed on resuming.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, cast

from rehearsal.errors import CheckpointError
from rehearsal.training.json_lines import JsonLines, as_line, plain, read_json_lines
from rehearsal.training.storage import FolderLock, remove_leftovers, storage_errors, write_atomically
from rehearsal.usage import added

Status = Literal["running", "finished", "stopped", "failed"]
"""How a run stands: at work, done as planned, interrupted by its user, or ended by an error."""

_TRAJECTORY_FILE = re.compile(r"(train|eval)_(\d+)\.parquet")
_RETURNED = "The policy is that of step {step}, the last checkpoint before the verdict began."
_WORK = ("metrics.jsonl", "evaluations.jsonl", "trajectories", "checkpoints", "policy")


@dataclass
class RunInfo:
    """The content of ``run.json``.

    Attributes:
        name: the folder's name.
        status: see :data:`Status`. "running" with nobody holding the lock means that the process was killed.
        started: when the run was created, ISO 8601 in UTC.
        finished: when it reached its present status, or None while it runs.
        version: of Rehearsal, at the last start.
        command: what was typed to start it.
        device: the processor or GPU that it runs on, in words.
        facts: what is in force where it runs, by name, such as the level of isolation of its sandbox.
        usage: what judges and sandboxes were asked to do so far, by the names of :mod:`rehearsal.usage`. All of it: of
            steps that were lost to a crash and played again, both times.
        summary: final numbers and facts by name, as the training loop gives them.
        error: one sentence, if the status is "failed".
        warnings: sentences about what went wrong on the way without ending the run.
        went_back_to: the step of the checkpoint whose weights the policy has since a verdict, or None. A run that is
            resumed goes on from there.
        policy_step: the step whose weights are in ``policy/``; -1 from the moment that the run is taken up again until
            they are written anew, and None where there are none.
        resumed: when the run was taken up again, oldest first.
    """

    name: str
    status: Status = "running"
    started: str = ""
    finished: str | None = None
    version: str = ""
    command: str = ""
    device: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    went_back_to: int | None = None
    policy_step: int | None = None
    resumed: list[str] = field(default_factory=list)


class RunFolder:
    """One run's folder, open for writing (from :meth:`create` or :meth:`resume`) or for reading (from :meth:`open`).

    As a context manager it closes the books: a block that ends leaves a run that is still "running" as "finished",
    Ctrl-C as "stopped" and any other exception as "failed" with its message. A run that is only held (:meth:`hold`)
    stays as it was.
    """

    def __init__(self, path: Path, info: RunInfo, lock: FolderLock | None = None) -> None:
        """Use :meth:`create`, :meth:`resume` or :meth:`open`."""
        self.path = path
        self.info = info
        self._lock = lock
        self._at_work = lock is not None
        self._clock_start = time.monotonic()
        self._seconds_before = 0.0

    # Opening and closing.

    @classmethod
    def create(cls, path: str | Path, recipe_text: str, command: str | Sequence[str], *, device: str = "") -> RunFolder:
        """Make a new run folder and hold it until :meth:`close`.

        A folder whose earlier run ended before its first step holds no work and is taken over.

        Args:
            path: the folder; it and its parents are made where they are missing.
            recipe_text: content of ``recipe.toml``.
            command: what was typed, as one string or as words.
            device: the processor or GPU, in words.

        Raises:
            CheckpointError: if another process writes to the folder, if it holds a run or files of another kind, or
                if it cannot be written.
        """
        path = Path(path)
        _refuse_strangers(path)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(path)
        try:
            present = next((name for name in _WORK if _has_content(path / name)), None)
            if present is not None:
                status = _status_in_words(path)
                raise CheckpointError(
                    f"{path} already holds a {status} run: choose another name, or go on with it by --resume."
                )
            run = cls(path, RunInfo(name=path.resolve().name, started=_now()), lock)
            run.info.version, run.info.command, run.info.device = _version(), _as_text(command), device
            remove_leftovers(path)
            write_atomically(path / "recipe.toml", recipe_text)
            run._save()
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def resume(
        cls, path: str | Path, command: str | Sequence[str], *, recipe_text: str | None = None, device: str = ""
    ) -> RunFolder:
        """Take up an earlier run and hold its folder until :meth:`close`.

        Call :meth:`truncate_after` with the step of the checkpoint next, so that steps that are played again do not
        appear twice.

        Args:
            path: the folder of an earlier run, whatever its status.
            command: what was typed to resume.
            recipe_text: replaces ``recipe.toml``, if given (a run may be resumed with more steps).
            device: the processor or GPU, in words; "" keeps what is recorded.

        Raises:
            CheckpointError: if there is no run, if another process writes to it, or if it cannot be written.
        """
        run = cls.hold(path)
        try:
            run.take_up(command, recipe_text=recipe_text, device=device)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def hold(cls, path: str | Path) -> RunFolder:
        """Hold the folder of an earlier run until :meth:`close`, and change nothing in it before :meth:`take_up`.

        Raises:
            CheckpointError: if there is no run, or if another process writes to it.
        """
        path = Path(path)
        _read_info(path)
        lock = FolderLock(path)
        try:
            run = cls(path, _read_info(path), lock)
        except BaseException:
            lock.release()
            raise
        run._at_work = False
        return run

    def take_up(self, command: str | Sequence[str], *, recipe_text: str | None = None, device: str = "") -> None:
        """Write down that an earlier run, whose folder is held, goes on now; see :meth:`resume`.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._must_hold()
        self._at_work = True
        self.info.status, self.info.finished, self.info.error = "running", None, ""
        self.info.version, self.info.command = _version(), _as_text(command)
        self.info.device = device or self.info.device
        self.info.resumed.append(_now())
        if self.info.policy_step is not None:
            self.info.policy_step = -1
        if recipe_text is not None:
            write_atomically(self.path / "recipe.toml", recipe_text)
        self._repair()
        self._save()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run for reading; it may be at work.

        Raises:
            CheckpointError: if ``path`` holds no run, or its ``run.json`` cannot be read.
        """
        return cls(Path(path), _read_info(Path(path)))

    def close(self) -> None:
        """Let go of the folder. Closing twice does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._lock is not None and self._at_work and self.info.status == "running":
                # The error that ended the run matters more than one about writing down that it ended.
                with contextlib.suppress(CheckpointError) if error is not None else contextlib.nullcontext():
                    if error is None:
                        self.set_status("finished")
                    elif isinstance(error, KeyboardInterrupt):
                        self.set_status("stopped")
                    else:
                        self.set_status("failed", f"{type(error).__name__}: {error}")
        finally:
            self.close()

    # What a run says about itself.

    @property
    def in_use(self) -> bool:
        """Whether a living process (this one included) writes to the folder."""
        return self._lock is not None or FolderLock.is_held(self.path)

    @property
    def writable(self) -> bool:
        """Whether this object holds the folder."""
        return self._lock is not None

    @property
    def recipe_text(self) -> str:
        """The content of ``recipe.toml``, or "" if it is missing."""
        with storage_errors(self.path / "recipe.toml", writing=False):
            file = self.path / "recipe.toml"
            return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def set_status(self, status: Status, error: str = "") -> None:
        """Record how the run stands; anything but "running" also records the time."""
        self.info.status = status
        self.info.error = error
        self.info.finished = None if status == "running" else _now()
        self._save()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the final numbers and facts; replaces an earlier summary."""
        self.info.summary = dict(summary)
        self._save()

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """Record what is in force where the run goes on; replaces what was recorded before."""
        self.info.facts = dict(facts)
        self._save()

    def add_usage(self, usage: Mapping[str, float]) -> None:
        """Add to what the run has used."""
        self.info.usage = added(self.info.usage, usage)
        self._save()

    def add_warning(self, sentence: str) -> None:
        """Record something that went wrong without ending the run; the report shows it."""
        self.info.warnings.append(sentence)
        self._save()

    def note_policy(self, step: int) -> None:
        """Record that ``policy/`` holds the weights of a step."""
        self.info.policy_step = step
        self._save()

    def note_return(self, step: int) -> str:
        """Record that the policy has the weights of an earlier step again; returns the sentence that says so."""
        self.info.went_back_to = step
        self.add_warning(_RETURNED.format(step=step))
        return self.info.warnings[-1]

    def forget_return(self) -> None:
        """Take back what :meth:`note_return` recorded, as the run goes on from that step."""
        if self.info.went_back_to is not None:
            sentence = _RETURNED.format(step=self.info.went_back_to)
            self.info.warnings = [warning for warning in self.info.warnings if warning != sentence]
            self.info.went_back_to = None
            self._save()

    # Lines that only grow.

    @property
    def seconds(self) -> float:
        """Seconds of training so far: pauses between a stop and its resuming do not count."""
        return self._seconds_before + time.monotonic() - self._clock_start

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one training step; NaN and infinity are written as null.

        Raises:
            CheckpointError: if the line cannot be written; the file is left as it was.
        """
        self._append("metrics.jsonl", {"step": step, "time": round(self.seconds, 3)}, metrics)

    def append_evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Add one evaluation: "episodes", "success", "success_low", "success_high", "reward" and whatever else.

        Raises:
            CheckpointError: if the line cannot be written; the file is left as it was.
        """
        self._append("evaluations.jsonl", {"step": step, "time": round(self.seconds, 3), "split": split}, values)

    def metrics(self) -> JsonLines:
        """All lines of ``metrics.jsonl``."""
        return read_json_lines(self.path / "metrics.jsonl")

    def evaluations(self) -> JsonLines:
        """All lines of ``evaluations.jsonl``."""
        return read_json_lines(self.path / "evaluations.jsonl")

    # Trajectories.

    def trajectory_path(self, phase: Literal["train", "eval"], step: int) -> Path:
        """Where the episodes of one phase and step belong."""
        return self.path / "trajectories" / f"{phase}_{step:06d}.parquet"

    def trajectory_files(self, phase: Literal["train", "eval"]) -> dict[int, Path]:
        """The trajectory files of a phase by step, earliest first."""
        return dict(sorted((step, file) for name, step, file in self._trajectory_files() if name == phase))

    def _trajectory_files(self) -> Iterator[tuple[str, int, Path]]:
        folder = self.path / "trajectories"
        for file in folder.iterdir() if folder.is_dir() else ():
            match = _TRAJECTORY_FILE.fullmatch(file.name)
            if match:
                yield match[1], int(match[2]), file

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after ``step``: metrics, evaluations and trajectory files.

        The clock goes back too: "time" goes on from the last line that is kept.

        Raises:
            CheckpointError: if a file cannot be replaced; each file is either as it was or truncated.
        """
        self._must_hold()
        last = 0.0
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            file = self.path / name
            kept = [row for row in read_json_lines(file).rows if row.get("step", 0) <= step]
            if file.exists():
                write_atomically(file, "".join(as_line(row) for row in kept))
            last = max([last, *(float(row.get("time") or 0.0) for row in kept)])
        for _, at, file in list(self._trajectory_files()):
            if at > step:
                with storage_errors(file):
                    file.unlink()
        self._seconds_before, self._clock_start = last, time.monotonic()

    # Inside.

    def _append(self, name: str, head: dict[str, Any], values: Mapping[str, Any]) -> None:
        self._must_hold()
        taken = head.keys() & values.keys()
        if taken:
            raise ValueError(f"{sorted(taken)} are written by the run folder itself and cannot be given as values")
        file = self.path / name
        with storage_errors(file), file.open("ab") as out:
            before = out.tell()
            try:
                out.write(as_line({**head, **values}).encode("utf-8"))
                out.flush()
            except OSError:
                _undo(out, before)
                raise

    def _repair(self) -> None:
        """Remove what was left aside and damaged lines, which would otherwise swallow the next one, and set the clock
        to the last line."""
        remove_leftovers(self.path)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            lines = read_json_lines(self.path / name)
            if lines.damaged:
                write_atomically(self.path / name, "".join(as_line(row) for row in lines.rows))
                self.info.warnings.append(f"{lines.damaged} damaged line(s) of {name} were removed on resuming.")
            self._seconds_before = max([self._seconds_before, *(float(row.get("time") or 0.0) for row in lines.rows)])

    def _must_hold(self) -> None:
        if self._lock is None:
            raise ValueError("this run folder is open for reading; use RunFolder.create or RunFolder.resume to write")

    def _save(self) -> None:
        self._must_hold()
        text = json.dumps(plain(asdict(self.info)), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / "run.json", text + "\n")


def _undo(out: IO[bytes], size: int) -> None:
    """Cut a half-written line off again, so that the next one does not run into it."""
    with contextlib.suppress(OSError):
        os.ftruncate(out.fileno(), size)


def _read_info(path: Path) -> RunInfo:
    file = path / "run.json"
    if not file.exists():
        raise CheckpointError(f"{path} holds no run: there is no run.json in it; check the name.")
    with storage_errors(file, writing=False):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
        known = {one.name for one in fields(RunInfo)}
        return RunInfo(**{"name": path.resolve().name, **{k: v for k, v in values.items() if k in known}})
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); the run cannot be opened.") from error


def _status_in_words(path: Path) -> str:
    try:
        status = _read_info(path).status
    except CheckpointError:
        return "damaged"
    # The caller holds the lock, so a run that calls itself running was killed.
    return "killed" if status == "running" else status


def check_replaceable(path: Path) -> None:
    """Refuse to delete what is no run, or a run that somebody works at. A folder that is not there may be deleted.

    Raises:
        CheckpointError: if so.
    """
    if not path.is_dir():
        return  # what else may be there is told when the run begins
    if not (path / "run.json").is_file() and any(path.iterdir()):
        raise CheckpointError(
            f"{path} is not a run folder, so --overwrite does not delete it; choose another --output."
        )
    if (path / "run.json").is_file() and RunFolder.open(path).in_use:
        raise CheckpointError(f"Another process writes to {path}; stop it first, or choose another --output.")


def remove_run(path: Path) -> None:
    """Delete a run.

    Raises:
        CheckpointError: if :func:`check_replaceable` says so, or it cannot be deleted.
    """
    check_replaceable(path)
    if path.is_dir():
        with storage_errors(path):
            shutil.rmtree(path)


def _refuse_strangers(path: Path) -> None:
    """Refuse a place that is not ours to write into: a file, or a folder of something else."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file, not a folder; choose another name for the run.")
    with storage_errors(path, writing=False):
        strange = (
            path.exists()
            and not (path / "run.json").exists()
            and any(
                # A start that failed half-way leaves no more than a recipe and hidden files.
                entry.name != "recipe.toml" and not entry.name.startswith(".")
                for entry in path.iterdir()
            )
        )
    if strange and not FolderLock.is_held(path):
        raise CheckpointError(f"{path} holds files that are not a run; choose another name, or empty it first.")


def _has_content(path: Path) -> bool:
    with storage_errors(path, writing=False):
        if path.is_dir():
            return any(path.iterdir())
        return path.exists() and path.stat().st_size > 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _as_text(command: str | Sequence[str]) -> str:
    return command if isinstance(command, str) else shlex.join(command)


def _version() -> str:
    try:
        return importlib.metadata.version("rehearsal")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return cast(str, getattr(sys.modules.get("rehearsal"), "__version__", None) or "unknown")
