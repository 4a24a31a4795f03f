"""The text environment: a program with bugs, its tests, and edits until they pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.repair.bugs import Bug, draw_bugs, with_bugs
from rehearsal.environments.repair.edits import EditError, apply_edit, edits_between
from rehearsal.environments.repair.programs import Program, draw_program
from rehearsal.environments.repair.running import Answer, Arguments, Run, Where, leave, run_own, shared_runner
from rehearsal.environments.splits import draw_in_split
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.sandbox import Isolation, RemoteSandbox, require

_TRIES = 200
_LEAST_HIDDEN = 3
_LONGEST_SHOWN = 80
"""Characters of a value that is shown; of a longer one the rest is cut off."""


@dataclass(frozen=True)
class _Task:
    """A broken program and its tests, the visible ones first."""

    program: Program
    bugs: tuple[Bug, ...]
    calls: tuple[Arguments, ...]
    wanted: tuple[Answer, ...]
    begins: Run


class Repair(EpisodeEnv):
    """Repair a small program until its tests pass, an edit of a line at a time.

    A correct function of one of some thirty families is filled in with names and numbers, and broken by one to three
    bugs as people make them: a wrong operator, comparison or variable, a bound that is off by one, a missing case. The
    agent sees the numbered program and a few tests, with what it got where one fails. Every bug makes one of the tests
    fail that the agent sees. There are as many tests or more that it does not see, so a program that knows the visible
    ones by heart is no solution.

    The reward is 1 for the edit after which all tests pass, the hidden ones too; it ends the episode. Every other edit
    gets 0, and so does one that cannot be made, which is answered in words. After ``turns`` edits the episode is over.

    What the agent makes of a program runs in a sandbox (:mod:`rehearsal.sandbox`), in a process of its own each time,
    with limits on lines run, time and memory: one that runs for ever is told of as "no end". The tests are compared
    outside, so no program can forge a pass. A program belongs to the split of its correct text, so none of a test split
    was ever seen with another bug in training. Close the environment after use: with the last one its sandbox ends.

    Args:
        bugs: in a program, 1 to 3.
        visible: tests that the agent sees, 1 to 6, and at least as many as there are bugs.
        turns: edits of an episode.
        isolation: level of the sandbox, see :class:`rehearsal.sandbox.Isolation`; the strongest there is if None.
        url: of a service that takes the sandbox's place, see :class:`rehearsal.sandbox.RemoteSandbox`.
        api_key_env: name of the environment variable with the service's key.

    Raises:
        RecipeError: for a parameter out of its range.
        SandboxError: for a service that is none, or that stands beside a level.
    """

    name = "repair"
    fast = False
    max_turns = 6
    max_actions_per_turn = 1

    def __init__(
        self, bugs: int = 1, visible: int = 3, turns: int = 6, isolation: str | None = None, url: str | None = None,
        api_key_env: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(max_steps=whole_number("turns", turns, 1, 64))
        self.bugs = whole_number("bugs", bugs, 1, 3)
        self.visible = whole_number("visible", visible, 1, 6)
        self.max_turns = turns
        if visible < bugs or turns < bugs:
            raise RecipeError(
                f"A program with {bugs} bugs needs as many visible tests and turns, not {visible} and {turns}."
            )
        levels = [level.value for level in Isolation]
        if isolation is not None and isolation not in levels:
            raise RecipeError(f"isolation must be one of {', '.join(levels)}, not {isolation!r}.")
        self._where = Where(isolation, url, api_key_env)
        service = self._where.service()  # what is wrong with it is told now, and not in the middle of an episode
        if service is not None:
            service.close()
        self._now: _Task | None = None
        self._lines: tuple[str, ...] = ()
        self._run = Run(())
        self._said = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        return (
            "Repair the program so that all tests pass, those that you see and others that you do not see. An action "
            "is one edit of a line:\n"
            "replace 3: return a + b\n"
            "insert 3: x = 0 (a new line before line 3)\n"
            "delete 3\n"
            "New text has the indentation of the line that was there, unless it begins with spaces of its own."
        )

    def _draw(self, split: str) -> str:
        for _ in range(_TRIES):
            program = draw_in_split(lambda: draw_program(self.np_random), lambda drawn: drawn.source, split)
            bugs = draw_bugs(self.np_random, program.lines, self.bugs)
            task = None if bugs is None else self._task_of(program, bugs)
            if task is not None:
                self._now, self._lines, self._run = task, with_bugs(program.lines, task.bugs), task.begins
                self._said = ""
                return "\n".join([*self._lines, "", *map(repr, task.calls)])
        raise EnvironmentFault(f"None of {_TRIES} programs with {self.bugs} bugs had tests that tell all of them.")

    def _task_of(self, program: Program, bugs: tuple[Bug, ...]) -> _Task | None:
        """Choose tests; None where some bug changes nothing, or needs more edits to repair than there are turns."""
        broken = with_bugs(program.lines, bugs)
        if len(edits_between(broken, program.lines)) > self.max_steps:
            return None
        singles = [with_bugs(program.lines, [bug]) for bug in bugs] if len(bugs) > 1 else []
        correct, run, *each = (
            run_own(program.function, "\n".join(lines), program.calls) for lines in (program.lines, broken, *singles)
        )
        if not all(answer.is_value for answer in correct.answers):
            raise EnvironmentFault(f"The correct program of the family {program.family} fails; report this.")
        failing = [_failing(one, correct.answers) for one in (run, *each)]
        order = self._visible_first(failing, len(program.calls))
        if order is None:
            return None
        return _Task(
            program, bugs, tuple(program.calls[k] for k in order), tuple(correct.answers[k] for k in order),
            run._replace(answers=tuple(run.answers[k] for k in order)),
        )  # fmt: skip

    def _visible_first(self, failing: Sequence[Sequence[int]], count: int) -> list[int] | None:
        """An order of the tests in which the visible ones tell each bug, alone and with the others."""
        if not all(failing) or count < self.visible + _LEAST_HIDDEN:
            return None
        rng: np.random.Generator = self.np_random
        shown: list[int] = []
        for told in failing:
            if not set(told) & set(shown):
                shown.append(int(rng.choice(told)))
        others = [k for k in rng.permutation(count).tolist() if k not in shown]
        if len(shown) > self.visible:
            return None
        shown += others[: self.visible - len(shown)]
        return [*sorted(shown), *(k for k in range(count) if k not in shown)]

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        task = self._present
        try:
            lines = apply_edit(self._lines, action)
        except EditError as error:
            self._said = str(error)
            return 0.0, False, False, False
        self._said = ""
        changed = lines != self._lines
        if changed:
            self._lines = lines
            # Asked for each time: it may have been closed meanwhile, and a copy of this environment is another user.
            runner = shared_runner(self._where, self)
            self._run = runner.run(task.program.function, "\n".join(lines), task.calls)
        solved = self._run.answers == task.wanted
        return float(solved), solved, solved, changed

    def _observation(self) -> str:
        task, run = self._present, self._run
        function = task.program.function
        shown = [self._said] if self._said else []
        head = next((line for line in task.program.lines if line.startswith("def")), "def ").removeprefix("def ")
        shown.append(f"{head.rstrip(':')} gives {task.program.about}.")
        width = len(str(len(self._lines)))
        shown += [f"{number:>{width}} {line}".rstrip() for number, line in enumerate(self._lines, 1)]
        if run.broken:
            shown.append(f"The program does not run: {run.broken}")
        visible = list(zip(task.calls, task.wanted, run.answers, strict=True))[: self.visible]
        for arguments, wanted, got in visible:
            call = f"{function}({', '.join(map(repr, arguments))})"
            if got == wanted:
                shown.append(f"passes: {call} gives {_cut(got.text)}")
            elif run.broken:
                shown.append(f"fails: {call} should give {wanted.text}")
            else:
                shown.append(f"fails: {call} gives {_cut(got.text)} and should give {wanted.text}")
        if run.answers == task.wanted:
            shown.append("All tests pass.")
        elif all(got == wanted for _, wanted, got in visible):
            shown.append("Hidden tests fail.")
        return "\n".join(shown)

    def _state(self) -> str:
        return "\n".join([self._task, *self._lines])

    def oracle(self) -> list[str]:
        """The edits that lead back to the correct program; none once the episode is over, or too few are left."""
        self._need_reset()
        edits = [] if self._over else edits_between(self._lines, self._present.program.lines)
        return edits if len(edits) <= self.steps_left else []

    def optimal_success(self) -> float | None:
        """1 while there are edits enough, 1 or 0 once the episode is over, and otherwise None: a program can be right
        in another way than the one that is known."""
        self._need_reset()
        if self._over:
            return float(self._success)
        return 1.0 if self.oracle() else None

    def describe(self) -> dict[str, Any]:
        """``family``, ``bugs`` (their kinds), ``program`` (the present text) and ``solution`` (the correct one)."""
        self._need_reset()
        task = self._present
        return {
            "family": task.program.family, "bugs": [bug.kind for bug in task.bugs],
            "program": "\n".join(self._lines), "solution": task.program.source,
        }  # fmt: skip

    def facts(self) -> dict[str, str]:
        """The level of isolation of its sandbox; ``remote`` for a service.

        Raises:
            SandboxError: if the level is not to be had.
        """
        return {"sandbox": require(self._where.isolation).value if self._where.url is None else RemoteSandbox.isolation}

    def close(self) -> None:
        """Give the sandbox back; closing twice is harmless, and a reset after it begins again."""
        leave(self._where, self)

    @property
    def _present(self) -> _Task:
        assert self._now is not None, "_need_reset() comes first"
        return self._now


def _failing(run: Run, wanted: Sequence[Answer]) -> list[int]:
    return [place for place, pair in enumerate(zip(run.answers, wanted, strict=True)) if pair[0] != pair[1]]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
