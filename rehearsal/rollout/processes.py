"""Episodes played in several processes: for small models on a processor, where Python itself takes most of the time.

Each process has a policy, an engine and environments of its own and plays whole groups. It is a fresh interpreter that
talks through its standard input and output, so that a user's script is not run again, whatever it looks like, and a
process whose parent is gone reads the end of its input and leaves. The noise of an episode depends on its task and
sample alone, so who plays it changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from rehearsal import signals, usage
from rehearsal.errors import RehearsalError
from rehearsal.generation.sampling import SamplingParams
from rehearsal.models.lora import is_low_rank, is_plain_low_rank, plain_state
from rehearsal.models.packed import causal_lm, is_narrow
from rehearsal.rollout.play import Rollout, Task
from rehearsal.trajectory import Group, Trajectory

MAX_PARAMETERS = 20_000_000
"""Weights are copied to every process in every step; with more of them than this, one process is faster."""
_SECONDS_TO_LEAVE = 2.0


def may_share(model: Any) -> bool:
    """Whether other processes can play with a copy of a model: it is small, on a processor, and its adapters, if it
    has any, can be multiplied out."""
    if not is_narrow(model) or not all(is_plain_low_rank(m) for m in causal_lm(model).modules() if is_low_rank(m)):
        return False
    if hasattr(model, "get_base_model") and not any(is_low_rank(module) for module in model.modules()):
        return False  # adapters of another kind
    parameters = list(causal_lm(model).parameters())
    return all(p.dtype == torch.float32 for p in parameters) and sum(p.numel() for p in parameters) <= MAX_PARAMETERS


class ProcessRollout:
    """Plays as :class:`rehearsal.rollout.Rollout` does, in several processes. Close it after use.

    Args:
        make: called in each process; returns the rollout to play with and its model. Must be picklable.
        model: whose weights are used; :func:`may_share` holds for it.
        processes: how many.
    """

    def __init__(self, make: Callable[[], tuple[Rollout, Any]], model: Any, processes: int) -> None:
        self.model = model
        self._inbox: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        # All at once, so that they load their libraries side by side.
        self._workers = [_Worker(number, make, self._inbox) for number in range(processes)]
        try:
            for _ in self._workers:
                self._receive()
        except BaseException:
            self.close()
            raise

    def play(
        self, tasks: Sequence[Task], group_size: int, *, step: int = 0, sampling: SamplingParams | None = None,
        on_episode: Callable[[Trajectory], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        """As :meth:`rehearsal.rollout.Rollout.play`.

        Raises:
            RehearsalError: what a process raised, or that one ended.
        """
        weights = [parameter.numpy() for parameter in plain_state(self.model).values()]
        count = len(self._workers)
        for number, worker in enumerate(self._workers):
            worker.send((weights, list(tasks[number::count]), group_size, step, sampling))
        groups: list[Group | None] = [None] * len(tasks)
        waiting = count
        while waiting:
            number, what, content = self._receive()
            if what == "episode" and on_episode is not None:
                on_episode(content)
            elif what == "groups":
                groups[number::count] = content
                waiting -= 1
        return [group for group in groups if group is not None]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.leave()
        for worker in self._workers:
            worker.end()
        while not self._inbox.empty():  # a step was broken off: what it has used was used
            _, what, content = self._inbox.get()
            if what == "used":
                usage.count(content)

    def _receive(self) -> tuple[int, str, Any]:
        number, what, content = self._inbox.get()
        while what == "used":  # its account is part of ours
            usage.count(content)
            number, what, content = self._inbox.get()
        if what == "error":
            # The others are in the middle of something that nobody will ask for any more.
            self.close()
            raise content
        return number, what, content


class _Worker:
    """One process, seen from its parent."""

    def __init__(
        self, number: int, make: Callable[[], tuple[Rollout, Any]], inbox: queue.SimpleQueue[tuple[int, str, Any]]
    ) -> None:
        self._number = number
        self._inbox = inbox
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # In a group of its own, and deaf to stop signals from the start: the parent decides what becomes of the step.
        with signals.held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from rehearsal.rollout.processes import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=os.getcwd(), start_new_session=True,
            )  # fmt: skip
        self._input = cast(BinaryIO, self._process.stdin)
        # Where modules are found comes first: what is sent next may need it.
        self.send([os.path.abspath(path) for path in sys.path])
        self.send(make)
        threading.Thread(target=self._listen, daemon=True, name="rehearsal-process").start()

    def send(self, content: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # the listening thread tells that it ended
            pickle.dump(content, self._input, protocol=5)
            self._input.flush()

    def leave(self) -> None:
        """Let it read the end of its input."""
        with contextlib.suppress(OSError):
            self._input.close()

    def end(self) -> None:
        """See that it ends."""
        try:
            self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                what, content = pickle.load(self._process.stdout)
                self._inbox.put((self._number, what, content))
        except (EOFError, OSError):
            code = self._process.wait()
            told = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        except Exception as problem:  # whatever else: nobody may wait for ever for an answer that cannot be read
            told = f"sent what cannot be read ({type(problem).__name__}: {problem})"
        self._inbox.put(
            (
                self._number, "error",
                RehearsalError(f"A process that plays episodes {told}; set engine.processes to 1 to do without."),
            )
        )  # fmt: skip


def serve() -> None:
    """What a process does: make its rollout, and play until its input ends."""
    # What an environment prints must not get between the messages.
    with os.fdopen(os.dup(0), "rb") as inbox, os.fdopen(os.dup(1), "wb") as outbox:
        os.dup2(2, 1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        signals.leave_to_parent()
        torch.set_num_threads(1)

        account = usage.Account()

        def tell(what: str, content: Any) -> None:
            used = account.take()
            for message in ((("used", used),) if used else ()) + ((what, content),):
                pickle.dump(message, outbox, protocol=5)
            outbox.flush()

        try:
            sys.path[:] = pickle.load(inbox)
            rollout, model = pickle.load(inbox)()
            tell("ready", None)
            while True:
                try:
                    weights, tasks, group_size, step, sampling = pickle.load(inbox)
                except EOFError:
                    break
                _put_weights(model, weights)
                groups = rollout.play(
                    tasks, group_size, step=step, sampling=sampling,
                    on_episode=lambda trajectory: tell("episode", trajectory),
                )  # fmt: skip
                tell("groups", groups)
            rollout.close()
        except BrokenPipeError:
            pass  # the parent is gone
        except RehearsalError as error:
            tell("error", error)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            tell("error", RehearsalError(f"A process that plays episodes failed with {told}"))


@torch.no_grad()
def _put_weights(model: Any, weights: list[np.ndarray]) -> None:
    for parameter, values in zip(causal_lm(model).parameters(), weights, strict=True):
        parameter.copy_(torch.from_numpy(values))
