"""The run folder keeps what it is given, refuses what would destroy it, and survives what tears it."""

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.errors import CheckpointError
from rehearsal.training import storage
from rehearsal.training.json_lines import plain, read_json_lines
from rehearsal.training.runs import RunFolder
from rehearsal.training.storage import FolderLock, write_atomically
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.trajectory import Group


def new_run(path: Path) -> RunFolder:
    return RunFolder.create(path, "seed = 1\n", ["rehearsal", "train", "my recipe.toml"], device="cpu (2 cores)")


def test_a_new_run_records_what_it_is(tmp_path: Path) -> None:
    with new_run(tmp_path / "a" / "lake") as run:
        assert json.loads((run.path / "run.json").read_text())["status"] == "running"
    info = json.loads((tmp_path / "a" / "lake" / "run.json").read_text())
    assert info["name"] == "lake"
    assert info["status"] == "finished"
    assert info["started"].endswith("+00:00")
    assert info["finished"] >= info["started"]
    assert info["command"] == "rehearsal train 'my recipe.toml'"
    assert info["device"] == "cpu (2 cores)"
    assert info["version"]
    assert RunFolder.open(tmp_path / "a" / "lake").recipe_text == "seed = 1\n"


def test_the_ending_of_the_block_becomes_the_status(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_run(tmp_path / "stopped"):
        raise KeyboardInterrupt
    assert RunFolder.open(tmp_path / "stopped").info.status == "stopped"
    with pytest.raises(RuntimeError), new_run(tmp_path / "failed"):
        raise RuntimeError("out of memory")
    failed = RunFolder.open(tmp_path / "failed").info
    assert (failed.status, failed.error) == ("failed", "RuntimeError: out of memory")
    with new_run(tmp_path / "own") as run:
        run.set_status("stopped")
    assert RunFolder.open(tmp_path / "own").info.status == "stopped"


def test_metrics_that_are_not_finite_become_null_and_numpy_becomes_numbers(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(1, {"a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": np.array(2)})  # type: ignore[dict-item]
        run.append_evaluation(1, "test", {"success": np.float64("nan"), "by": {"x": -math.inf, "y": (1, 2)}})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    row = run.metrics().rows[0]
    assert (row["step"], row["a"], row["b"], row["c"], row["d"]) == (1, None, None, 0.5, 2)
    assert row["time"] >= 0
    evaluation = run.evaluations().rows[0]
    assert evaluation["success"] is None
    assert evaluation["by"] == {"x": None, "y": [1, 2]}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_plain_is_always_valid_json(value: object) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run, pytest.raises(ValueError, match="step"):
        run.append_metrics(1, {"step": 2.0})


def test_two_runs_in_one_folder_are_refused_within_a_process_and_across(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"in use by another run \(process \d+\)"):
        new_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="in use"):
        RunFolder.resume(tmp_path / "run", "again")
    code = (
        "import sys; from rehearsal.training.runs import RunFolder\n"
        "try: RunFolder.create(sys.argv[1], '', '')\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    assert f"in use by another run (process {os.getpid()})" in done.stdout
    assert RunFolder.open(run.path).in_use
    run.close()
    run.close()
    assert not RunFolder.open(run.path).in_use


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from rehearsal.training.runs import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'a = 1', ''); run.append_metrics(1, {'x': 1.0})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert RunFolder.open(tmp_path / "run").in_use
    process.kill()
    process.wait()
    run = RunFolder.open(tmp_path / "run")
    assert run.info.status == "running"
    assert not run.in_use
    with pytest.raises(CheckpointError, match="killed run"):
        new_run(tmp_path / "run")
    RunFolder.resume(tmp_path / "run", "again").close()


def test_asking_whether_a_folder_is_in_use_does_not_keep_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_run(tmp_path / "run").close()
    held = [os.open(tmp_path / "run" / ".lock", os.O_RDONLY)]
    storage._lock(held[0])
    monkeypatch.setattr(storage.time, "sleep", lambda _: os.close(held.pop()))
    FolderLock(tmp_path / "run").release()
    assert not held, "it tried again"


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_a_folder_that_holds_work_is_not_overwritten(tmp_path: Path, status: str) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(1, {"x": 1.0})
        run.set_status(status)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"already holds a {status} run: choose another name, or .*--resume"):
        new_run(tmp_path / "run")
    assert len(run.metrics().rows) == 1


def test_a_run_that_ended_before_its_first_step_may_be_replaced(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.set_status("failed", "a typing mistake")
    with new_run(tmp_path / "run") as run:
        assert run.info.error == ""


def test_folders_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("x")
    with pytest.raises(CheckpointError, match="not a run"):
        new_run(tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter.md"]
    with pytest.raises(CheckpointError, match="is a file"):
        new_run(tmp_path / "thesis" / "chapter.md")
    with pytest.raises(CheckpointError, match="holds no run"):
        RunFolder.open(tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="holds no run"):
        RunFolder.resume(tmp_path / "nothing", "")
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_run_json_is_a_sentence(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    for text in ("{", "[]", "7"):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            RunFolder.open(tmp_path / "run")


def test_fields_of_later_versions_are_ignored(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished", "mood": "fine"}')
    info = RunFolder.open(tmp_path / "run").info
    assert (info.name, info.status) == ("run", "finished")


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 200))
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    whole = b"".join(json.dumps({"step": i, "text": "ä" * 5}, ensure_ascii=False).encode() + b"\n" for i in range(5))
    cut = min(cut, len(whole))
    file.write_bytes(whole[:cut])
    lines = read_json_lines(file)
    assert [row["step"] for row in lines.rows] == list(range(len(lines.rows)))
    assert len(lines.rows) + lines.damaged == len([line for line in whole[:cut].split(b"\n") if line])
    assert lines.damaged <= 1


def test_resuming_repairs_torn_lines_and_truncates_to_the_step(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        for step in range(1, 8):
            run.append_metrics(step, {"x": step / 10})
            if step % 2 == 0:
                run.append_evaluation(step, "test", {"success": 0.5})
            for phase in ("train", "eval"):
                file = run.trajectory_path(phase, step)  # type: ignore[arg-type]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(b"")
        run.set_status("failed", "power cut")
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 8, "ti')
    (run.path / "trajectories" / "notes.txt").write_text("mine")
    with RunFolder.resume(run.path, "rehearsal train --resume", recipe_text="seed = 2\n") as run:
        assert (run.info.status, run.info.error, len(run.info.resumed)) == ("running", "", 1)
        assert "1 damaged line" in run.info.warnings[0]
        assert run.metrics().damaged == 0
        run.truncate_after(4)
        assert [row["step"] for row in run.metrics().rows] == [1, 2, 3, 4]
        assert [row["step"] for row in run.evaluations().rows] == [2, 4]
        assert list(run.trajectory_files("train")) == [1, 2, 3, 4]
        assert list(run.trajectory_files("eval")) == [1, 2, 3, 4]
        run.append_metrics(5, {"x": 0.5})
    assert [row["step"] for row in run.metrics().rows] == [1, 2, 3, 4, 5]
    assert (run.path / "trajectories" / "notes.txt").exists()
    assert run.recipe_text == "seed = 2\n"
    assert RunFolder.open(run.path).info.status == "finished"


def test_the_clock_goes_on_from_the_last_line_that_is_kept(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        for step, seconds in ((1, 100.0), (2, 200.0)):
            run._seconds_before, run._clock_start = seconds, time.monotonic()
            run.append_metrics(step, {})
    with RunFolder.resume(run.path, "") as run:
        assert 200 <= run.seconds < 260
        run.truncate_after(1)
        assert 100 <= run.seconds < 160


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_metrics(1, {"x": 1.0})
        real_open = Path.open

        class Full:
            """A file that takes half of what it is given and then says that the disk is full."""

            def __init__(self, file: object) -> None:
                self.file = file

            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()  # type: ignore[attr-defined]

            def __getattr__(self, name: str) -> object:
                return getattr(self.file, name)

            def write(self, data: bytes) -> int:
                self.file.write(data[: len(data) // 2])  # type: ignore[attr-defined]
                self.file.flush()  # type: ignore[attr-defined]
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(real_open(self, *a, **k)))
        with pytest.raises(CheckpointError, match="the disk is full; make room"):
            run.append_metrics(2, {"x": 1.0})
        with pytest.raises(CheckpointError, match="the disk is full"):
            run.write_summary({"success": 1.0})
        monkeypatch.undo()
        run.append_metrics(2, {"x": 2.0})
        assert [row["x"] for row in run.metrics().rows] == [1.0, 2.0]
        assert run.metrics().damaged == 0
        assert not list(run.path.glob(".*.tmp"))


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


_WRITES_ASIDE = """
    import sys
    from pathlib import Path
    from rehearsal.training.storage import replacing
    with replacing(Path(sys.argv[1])) as aside:
        aside.write_bytes(b"half")
        print("written", flush=True)
        sys.stdin.read()
"""


def writer_of(file: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing a file, until the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITES_ASIDE), str(file)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def test_what_a_killed_process_left_aside_is_removed_on_resuming(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    (tmp_path / "run" / "trajectories").mkdir()
    for name in ("run.json", "trajectories/train_000001.parquet"):
        process = writer_of(tmp_path / "run" / name)
        process.kill()
        process.wait()
    # In a container the next run may well get the number of the last one.
    (tmp_path / "run" / f".metrics.jsonl.{os.getpid()}.tmp").write_bytes(b"half")
    for name in (".mine.tmp", ".notes.12x.tmp", "a.1.tmp"):
        (tmp_path / "run" / name).touch()
    at_work = writer_of(tmp_path / "run" / "report.html")
    assert len(list((tmp_path / "run").rglob(".*.tmp"))) == 6
    RunFolder.hold(tmp_path / "run").close()
    assert len(list((tmp_path / "run").rglob(".*.tmp"))) == 6, "to hold a folder changes nothing in it"
    RunFolder.resume(tmp_path / "run", "again").close()
    left = sorted(path.name for path in (tmp_path / "run").rglob(".*.tmp"))
    assert left == sorted([".mine.tmp", ".notes.12x.tmp", f".report.html.{at_work.pid}.tmp"])
    at_work.communicate("")
    assert at_work.returncode == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == b"half"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flushing(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("flushed", os.fstat(descriptor).st_ino))

    def renaming(source: Path, target: Path) -> None:
        done.append(("renamed", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(storage.os, "fsync", flushing)
    monkeypatch.setattr(storage.os, "replace", renaming)
    write_trajectories(tmp_path / "train_000001.parquet", [Group([])], phase="train", step=1)
    written = (tmp_path / "train_000001.parquet").stat().st_ino
    assert done == [("flushed", written), ("renamed", written)]


def test_a_folder_opened_for_reading_cannot_be_written(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    run = RunFolder.open(tmp_path / "run")
    for write in (lambda: run.append_metrics(1, {}), lambda: run.truncate_after(0), lambda: run.write_summary({})):
        with pytest.raises(ValueError, match="for reading"):
            write()


def test_summary_and_warnings_are_kept(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.write_summary({"success": float("nan"), "steps": 3})
        run.add_warning("the tracker failed")
    info = RunFolder.open(run.path).info
    assert info.summary == {"success": None, "steps": 3}
    assert info.warnings == ["the tracker failed"]
