"""Signals that stop a run whose episodes are played by other processes, however the signals are sent."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="looks for processes in /proc"),
]
PATIENCE = 500.0
_SCRIPT = """
    import os, signal, sys
    import torch
    from pathlib import Path
    from rehearsal.training.observer import SilentObserver
    from rehearsal.training.run import train

    class Signalled(SilentObserver):
        '''Sends SIGTERM while the second step is played.'''
        def playing(self, what, count):
            self.due = what == "step 2"
        def episode(self, trajectory):
            if self.due:
                self.due = False
                if sys.argv[3] == "the group":
                    os.killpg(0, signal.SIGTERM)
                elif sys.argv[3] == "every process":
                    for pid in Path("/proc/thread-self/children").read_text().split():
                        os.kill(int(pid), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    train(sys.argv[1], output=sys.argv[2], observer=Signalled())
"""


class Run:
    """A run in a process of its own, which leads a process group."""

    def __init__(self, recipe: Recipe, folder: Path, who: str, wrapped: tuple[str, ...]) -> None:
        self.path = folder / "run"
        (folder / "recipe.toml").write_text(recipe.to_toml())
        (folder / "train.py").write_text(textwrap.dedent(_SCRIPT))
        self.said = folder / "said.txt"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [*wrapped, sys.executable, str(folder / "train.py"), str(folder / "recipe.toml"), str(self.path), who],
                stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )  # fmt: skip

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.01)

    @property
    def begun(self) -> bool:
        file = self.path / "metrics.jsonl"
        return file.exists() and file.stat().st_size > 0

    @property
    def players(self) -> list[int]:
        """The processes that play."""
        return [pid for pid in below(self.process.pid) if is_player(pid)]

    def stopped_in_order(self) -> RunFolder:
        """What it left, once it has ended by itself."""
        self.process.wait(PATIENCE)
        said = self.said.read_text()
        assert self.process.returncode == 0, said
        assert "Stopping after this step" in said
        assert "Traceback" not in said
        run = RunFolder.open(self.path)
        assert run.info.status == "stopped", run.info.error
        return run


def below(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *below(child)]
    return found


def is_player(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"rehearsal.rollout.processes" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.fixture
def begin(small: Callable[..., Recipe], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run of two processes, which ends when it is told to."""
    runs: list[Run] = []

    def build(who: str = "nobody", wrapped: tuple[str, ...] = ()) -> Run:
        recipe = small(engine__processes=2, training__steps=10_000, evaluation__every=0, checkpoint__every=0)
        runs.append(Run(recipe, tmp_path, who, wrapped))
        return runs[-1]

    yield build
    for run in runs:
        for pid in (*below(run.process.pid), run.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def assert_goes_on(run: RunFolder) -> None:
    """A run that was stopped can be taken up where it stands."""
    done = int(run.info.summary["steps"])
    assert (run.path / "checkpoints" / f"step_{done:06d}").is_dir()
    more = {"training.steps": done + 1, "engine.processes": 1}
    assert train(output=run.path, resume=True, overrides=more).summary["steps"] == done + 1
    assert [row["step"] for row in RunFolder.open(run.path).metrics().rows] == list(range(1, done + 2))


@pytest.mark.parametrize("who", ["the group", "every process"])
def test_sigterm_to_all_ends_a_run_of_several_processes_in_order(who: str, begin: Callable[..., Run]) -> None:
    """A shell sends signals to a process group, systemd and SLURM send them to every process there is."""
    run = begin(who).stopped_in_order()
    assert run.info.summary["steps"] == 2
    assert_goes_on(run)


@pytest.mark.parametrize("who", ["the group", "every process"])
def test_ctrl_c_while_the_processes_begin(who: str, begin: Callable[..., Run]) -> None:
    run = begin()
    run.until(lambda: len(run.players) == 2)
    if who == "the group":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        for pid in (*run.players, run.process.pid):
            os.kill(pid, signal.SIGINT)
    assert run.stopped_in_order().info.summary["steps"] == 0


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")
def test_a_time_limit_that_sends_its_signal_twice(begin: Callable[..., Run]) -> None:
    """GNU timeout sends SIGTERM to the process, and once more to its group."""
    run = begin(wrapped=("timeout", "1h"))
    run.until(lambda: run.begun)
    run.process.send_signal(signal.SIGTERM)
    assert_goes_on(run.stopped_in_order())


def test_processes_end_when_their_parent_is_killed(begin: Callable[..., Run]) -> None:
    run = begin()
    run.until(lambda: run.begun)
    players = run.players
    assert len(players) == 2
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + PATIENCE
    while any(map(is_player, players)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
