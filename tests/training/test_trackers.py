"""Trackers are told everything, are named when they are missing, and never stop a run."""

import contextlib
import importlib
import json
import math
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rehearsal.errors import RecipeError
from rehearsal.training.runs import RunFolder
from rehearsal.training.trackers import TRACKERS, Guarded, Tracker, make_trackers


class Listener(Tracker):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)


class Failing(Listener):
    """Fails at one step, or while finishing."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if step == self.at:
            raise ConnectionError("no route to host")

    def finish(self, summary: Mapping[str, Any]) -> None:
        raise OSError("the socket is gone")


def test_a_tracker_that_fails_is_switched_off_with_one_warning_that_is_recorded(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", "") as run:
        failing = Failing(at=2)
        tracker = Guarded("bad", failing, run.add_warning)
        tracker.log(1, {"x": 1.0})
        with pytest.warns(UserWarning, match="bad failed at step 2 and was switched off"):
            tracker.log(2, {"x": 2.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.log(3, {"x": 3.0})
            tracker.finish({"x": 3.0})
        assert [step for step, _ in failing.logged] == [1, 2]
        assert run.info.warnings == [tracker.warning]
        assert "no route to host" in tracker.warning


def test_a_tracker_that_works_is_told_everything_and_finished_once() -> None:
    listener = Listener()
    tracker = Guarded("good", listener)
    tracker.log(1, {"x": 1.0})
    tracker.finish({"a": 1})
    tracker.finish({"a": 2})
    assert listener.logged == [(1, {"x": 1.0})]
    assert listener.summary == {"a": 1}
    assert tracker.warning == ""


def test_a_tracker_that_fails_to_finish_is_a_warning() -> None:
    tracker = Guarded("bad", Failing(at=None))
    with pytest.warns(UserWarning, match="while finishing"):
        tracker.finish({"a": 1})


def test_ctrl_c_inside_a_tracker_still_stops_the_run() -> None:
    class Slow(Listener):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("slow", Slow()).log(1, {})


def test_no_names_are_fine_and_unknown_ones_are_named(tmp_path: Path) -> None:
    assert make_trackers([], tmp_path, {}) == []
    with pytest.raises(RecipeError, match="'mlflow' is no tracker; there are tensorboard, wandb, trackio"):
        make_trackers(["mlflow"], tmp_path, {})


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_package_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError) as caught:
        make_trackers([name], tmp_path, {})
    assert f'pip install "rehearsal[{name}]"' in str(caught.value)


def test_a_tracker_that_does_not_start_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_login(*_: object) -> Tracker:
        raise PermissionError("no API key")

    monkeypatch.setitem(TRACKERS, "wandb", no_login)
    with pytest.raises(RecipeError, match=r"wandb did not start .*no API key"):
        make_trackers(["wandb"], tmp_path, {})


class FakeRun:
    """Stands in for the run object of Weights & Biases and of trackio."""

    id = "abc123"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", (metrics, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


class FakeModule:
    """A package whose ``init`` remembers its arguments."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.run = FakeRun()

    def init(self, **arguments: Any) -> FakeRun:
        self.started.append(arguments)
        return self.run


def test_wandb_is_told_the_step_and_resumed_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    (tracker,) = make_trackers(["wandb"], tmp_path, {"a": {"b": 1}})
    tracker.log(3, {"x": 1.0, "bad": math.nan})
    tracker.finish({"success": 0.5})
    assert ("log", ({"x": 1.0, "step": 3}, None)) in fake.run.calls
    assert fake.run.calls[-1][0] == "finish"
    assert fake.run.summary == {"success": 0.5}
    assert fake.started[0]["id"] is None
    assert fake.started[0]["name"] == tmp_path.name
    make_trackers(["wandb"], tmp_path, {}, resume_step=3)
    assert (fake.started[1]["id"], fake.started[1]["resume"]) == ("abc123", "allow")


def test_trackio_is_told_the_step_and_resumed_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    (tracker,) = make_trackers(["trackio"], tmp_path, {"a": {"b": [1, 2]}})
    tracker.log(3, {"x": 1.0, "bad": math.inf})
    tracker.finish({"success": 0.5, "note": "text"})
    assert fake.started[0]["config"] == {"a.b": "[1, 2]"}
    assert fake.started[0]["resume"] == "never"
    assert fake.run.calls == [("log", ({"x": 1.0}, 3)), ("log", ({"summary/success": 0.5}, None)), ("finish", None)]
    make_trackers(["trackio"], tmp_path, {}, resume_step=3)
    assert fake.started[1]["resume"] == "allow"


def test_tensorboard_writes_event_files_and_hides_the_steps_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2,))):
        (tracker,) = make_trackers(["tensorboard"], tmp_path, {"a": 1}, resume_step=resume_step)
        for step in steps:
            tracker.log(step, {"train/success": step / 10, "bad": math.nan})
        tracker.finish({"success": 0.3})
        assert isinstance(tracker, Guarded)
        assert tracker.warning == ""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/success")] == [1, 2]
    assert events.Tags()["scalars"] == ["train/success"]


TRACKED = """
import sys
from rehearsal.training.trackers import make_trackers

for resume_step, steps in ((None, (1, 2)), (2, (3,))):
    (tracker,) = make_trackers([sys.argv[1]], sys.argv[2], {"a": {"b": 1}}, resume_step=resume_step)
    for step in steps:
        tracker.log(step, {"train/success": step / 10})
    tracker.finish({"success": 0.25})
    assert not tracker.warning, tracker.warning
"""


def tracked_in_a_process(name: str, folder: Path, **variables: str) -> None:
    """Two parts of a run with the tracker itself. It reads its variables once, and starts threads: so a process."""
    folder.mkdir()
    environment = os.environ | variables
    subprocess.run([sys.executable, "-c", TRACKED, name, str(folder)], env=environment, check=True, timeout=120)


def test_wandb_itself_works_offline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracked_in_a_process("wandb", run, WANDB_MODE="offline", WANDB_SILENT="true")
    name = (run / "wandb_run_id.txt").read_text().strip()
    parts = sorted(run.rglob(f"run-{name}.wandb"))
    assert parts, "nothing was written under the run's own id"
    assert all(b"train/success" in part.read_bytes() for part in parts)


def test_trackio_itself_keeps_both_parts_of_a_run_under_one_name(tmp_path: Path) -> None:
    tracked_in_a_process("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "kept"), TRACKIO_PROJECT="mine")
    with contextlib.closing(sqlite3.connect(tmp_path / "kept" / "mine.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for name, _, _ in rows} == {"run"}
    assert [step for step, metrics in told if "train/success" in metrics] == [1, 2, 3]
    assert [metrics for _, metrics in told if "train/success" not in metrics] == 2 * [{"summary/success": 0.25}]
