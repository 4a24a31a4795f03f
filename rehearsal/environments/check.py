"""Find out what is wrong with an environment before an agent is trained in it.

A broken environment rarely stops a training run; it spoils it. Tasks that are shared by training and test, or text that
differs under the same seed, make every number that follows worthless. So the checks look for that, too, and not only
for wrong types.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import gymnasium as gym

from rehearsal.environments.base import SPLITS, TextEnv
from rehearsal.environments.contract import Fault, bad_text, reset_faults, step_faults
from rehearsal.environments.luck import generator_states, reset_with_luck
from rehearsal.environments.registry import make
from rehearsal.errors import RehearsalError
from rehearsal.time_limit import LateError, in_time

NOT_AN_ACTION = "no such action \u2603"
"""Sent to environments that list their legal actions, to see whether they refuse it."""

_LUCK_SEEDS = 3
"""Seeds whose episodes are played with several chances."""

_FREE_TEXT = "1"
"""Sent where any text is an action and nobody knows a better one."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with an environment.

    Attributes:
        code: a short name of the kind of problem, for programs.
        message: one sentence that says what is wrong and what is expected, for people.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass
class CheckReport:
    """What :func:`check_env` found.

    Attributes:
        environment: the name of the environment.
        problems: each kind of problem once, in the order found.
        checked: what was looked at, in words.
        skipped: what could not be looked at, and why.
    """

    environment: str
    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def __len__(self) -> int:
        return len(self.problems)

    def __bool__(self) -> bool:
        raise TypeError("A report is neither true nor false; ask report.ok or len(report).")

    def __str__(self) -> str:
        if self.ok:
            lines = [f"{self.environment}: no problems found in {', '.join(self.checked)}."]
        else:
            count = len(self.problems)
            lines = [f"{self.environment}: {count} {'problem' if count == 1 else 'problems'}."]
            lines += [f"- {problem}" for problem in self.problems]
        return "\n".join(lines + [f"Not checked: {reason}." for reason in self.skipped])


def check_env(
    environment: TextEnv | str | Callable[[], TextEnv],
    *,
    n_seeds: int = 5,
    max_steps: int = 200,
    time_limit: float = 30.0,
) -> CheckReport:
    """Play an environment with the harness's eyes and say what is wrong.

    Args:
        environment: an environment, its class, a function that makes it, or a name for :func:`make`.
        n_seeds: episodes played for each check, with the seeds 0, 1, ...
        max_steps: actions after which a check leaves an episode that does not end.
        time_limit: seconds for everything; an environment that hangs is reported, and its thread is left behind.

    Returns:
        A report; ``report.ok`` is true where nothing was found. The environment is never closed here.
    """
    given = environment if isinstance(environment, str) else getattr(environment, "name", None)
    checker = _Checker(CheckReport(str(given or getattr(environment, "__name__", "environment"))), n_seeds, max_steps)
    report = checker.report
    try:
        in_time(partial(checker.run, environment), time_limit, "rehearsal-check")
    except LateError:
        # A copy, because the thread may wake up and go on.
        report = CheckReport(report.environment, list(report.problems), list(report.checked), list(report.skipped))
        report.problems.append(
            Problem("hang", f"{checker.doing} did not come back within the {time_limit:g} seconds of the check.")
        )
    return report


class _StoppedError(Exception):
    """Nothing more can be learned from a check that met this."""


class _Checker:
    def __init__(self, report: CheckReport, n_seeds: int, max_steps: int) -> None:
        self.report = report
        self.seeds = range(n_seeds)
        self.max_steps = max_steps
        self.doing = "making the environment"
        self.env: TextEnv

    def problem(self, code: str, message: str) -> None:
        if all(known.code != code for known in self.report.problems):
            self.report.problems.append(Problem(code, message))

    @contextmanager
    def calling(self, what: str, code: str = "raises") -> Iterator[None]:
        """Report whatever a call raises, and give the check up."""
        self.doing = what
        try:
            yield
        except (Exception, SystemExit) as problem:
            self.problem(code, f"{what} raised {type(problem).__name__}: {problem}")
            raise _StoppedError from problem

    def run(self, environment: TextEnv | str | Callable[[], TextEnv]) -> None:
        try:
            made: object = environment
            if isinstance(environment, str):
                made = make(environment)
            elif not isinstance(environment, gym.Env):
                made = environment()
        except RehearsalError as problem:
            return self.problem("make", str(problem))
        except (Exception, SystemExit) as problem:
            return self.problem("make", f"making the environment raised {type(problem).__name__}: {problem}")
        if not isinstance(made, TextEnv):
            return self.problem("contract", f"A {type(made).__name__} is not a rehearsal.TextEnv; derive it from that.")
        self.env = made
        self.report.environment = made.name
        checks = {
            "types": self.check_types,
            "seeds": self.check_seeds,
            "luck": self.check_luck,
            "resets without a seed": self.check_unseeded,
            "legal actions": self.check_legal_actions,
            "the end of an episode": self.check_end,
            "splits": self.check_splits,
            "the oracle": self.check_oracle,
        }
        for name, check in checks.items():
            try:
                check()
            except _StoppedError:
                self.report.skipped.append(f"the rest of {name}, because the environment raised or broke its contract")
                if name == "types":
                    return  # the other checks would only stumble over the same
            except (Exception, SystemExit) as problem:
                self.problem("raises", f"{self.doing} raised {type(problem).__name__}: {problem}")
            else:
                self.report.checked.append(name)

    # Calls, each with its types checked -----------------------------------------------------------------------

    def reset(
        self, seed: int | None, split: str | None = None, index: int | None = None, chance: int | None = None
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        wanted = {"split": split, "index": index, "chance": chance}
        options = {name: value for name, value in wanted.items() if value is not None}
        said = "".join(f", {name} {value!r}" for name, value in options.items())
        with self.calling(f"reset(seed={seed}{said})"):
            result: object
            if chance is None:
                result = self.env.reset(seed=seed, options=options or None)
            else:
                result = reset_with_luck(self.env, seed, options)
        self.faults(reset_faults("reset()", result))
        observation, info = cast(tuple[str, dict[str, Any]], result)
        return observation, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self.calling(f"step({action!r})"):
            result: object = self.env.step(action)
        self.faults(step_faults("step()", result))
        observation, reward, terminated, truncated, info = cast(tuple[str, float, bool, bool, dict[str, Any]], result)
        return observation, float(reward), bool(terminated), bool(truncated), info

    def faults(self, found: Iterable[Fault]) -> None:
        """Report what breaks the contract; what is returned then may be of no use."""
        useless = False
        for fault in found:
            self.problem(fault.code, fault.message)
            useless = useless or fault.ends
        if useless:
            raise _StoppedError

    def legal(self) -> list[str] | None:
        with self.calling("legal_actions()"):
            actions: object = self.env.legal_actions()
        if actions is None:
            return None
        if not isinstance(actions, list) or not all(isinstance(action, str) for action in actions):
            self.problem("legal-type", "legal_actions() must return a list of str, or None for free text.")
            raise _StoppedError
        for bad in filter(None, map(bad_text, actions)):
            self.problem("unicode", f"legal_actions() holds {bad}.")
        return actions

    def any_action(self, chance: random.Random) -> str | None:
        """Some action to go on with, None where the environment names none."""
        actions = self.legal()
        if actions is None:
            with self.calling("oracle()"):
                plan = self.env.oracle()
            return plan[0] if plan else _FREE_TEXT
        return chance.choice(actions) if actions else None

    def play(
        self, seed: int, luck: int | None = None, states: dict[int, dict[str, bytes]] | None = None
    ) -> list[tuple[object, ...]]:
        """One episode of random actions: everything that came back, reset included. The states of its generators after
        the reset are put into ``states``, by luck."""
        chance = random.Random(seed)
        observation, info = self.reset(seed, chance=luck)
        if states is not None and luck is not None:
            states[luck] = generator_states(self.env)
        record: list[tuple[object, ...]] = [(observation, info.get("task"))]
        for _ in range(self.max_steps):
            action = self.any_action(chance)
            if action is None:
                break
            after, reward, terminated, truncated, _ = self.step(action)
            record.append((action, after, reward, terminated, truncated))
            if terminated or truncated:
                break
        return record

    # The checks ------------------------------------------------------------------------------------------------

    def check_types(self) -> None:
        for seed in self.seeds:
            self.play(seed)
        with self.calling("instructions"):
            instructions: object = self.env.instructions
        if not isinstance(instructions, str):
            self.problem("instructions-type", f"instructions must be str, not {type(instructions).__name__}.")
        elif bad := bad_text(instructions):
            self.problem("unicode", f"instructions holds {bad}.")
        for name in ("max_turns", "max_actions_per_turn"):
            value = getattr(self.env, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self.problem("limits", f"{name} must be a whole number of at least 1, not {value!r}.")

    def check_seeds(self) -> None:
        first = [self.play(seed) for seed in self.seeds]
        # Backwards, so that what an earlier episode left behind differs the second time.
        for seed in reversed(self.seeds):
            again = self.play(seed)
            if again[0] != first[seed][0]:
                self.problem(
                    "seed-task", f"Two resets with seed {seed} begin differently; a seed must fix the whole task."
                )
            elif again != first[seed]:
                self.problem(
                    "seed-episode",
                    f"Two episodes with seed {seed} and the same actions went differently; draw all chance from "
                    "self.np_random, which super().reset(seed=seed) seeds.",
                )
        by_task: dict[object, object] = {}
        for record in first:
            observation, task = record[0]
            if task is not None and by_task.setdefault(task, observation) != observation:
                self.problem("task-key", f"The task key {task!r} was given to two different first observations.")

    def check_luck(self) -> None:
        if any(problem.code in ("seed-task", "seed-episode") for problem in self.report):
            self.report.skipped.append("luck, because a seed does not fix an episode yet")
            return
        moved: set[str] = set()
        other = False
        for seed in self.seeds[:_LUCK_SEEDS]:
            states: dict[int, dict[str, bytes]] = {}
            records = {}
            for luck in (1, 2):
                records[luck] = self.play(seed, luck, states)
                ended = generator_states(self.env)
                moved |= {name for name, state in states[luck].items() if ended.get(name) != state}
            # Of generators that were not there after both resets nothing is known.
            same = {name for name, state in states[1].items() if states[2].get(name) == state}
            other = other or not moved <= same or records[1] != records[2]
            if records[1][0] != records[2][0] or records[1][0] != self.play(seed)[0]:
                self.problem(
                    "luck-task",
                    f"The first observation or task of seed {seed} depends on options['chance']; all episodes of a "
                    "group must begin alike, and only what is random after that may differ.",
                )
                return
            if self.play(seed, 2) != records[2]:
                self.problem(
                    "luck-seed",
                    f"Two episodes with seed {seed}, the same options['chance'] and the same actions went differently; "
                    "seed and chance together must fix an episode.",
                )
                return
        if moved and not other:
            self.problem(
                "luck",
                f"The environment draws chance after its first observation (from {', '.join(sorted(moved))}), but "
                "every options['chance'] gives the same: all episodes of a group would share one draw, which then "
                "looks like skill. Draw from self.np_random, or seed what you draw from in draw_luck(chance).",
            )

    def check_unseeded(self) -> None:
        for _ in range(2):
            self.reset(None)

    def check_legal_actions(self) -> None:
        for seed in self.seeds:
            self.reset(seed)
            actions = self.legal()
            if actions is None:
                self.report.skipped.append("whether illegal actions are refused, because any text is an action")
                return
            if not actions:
                self.problem("legal-empty", "legal_actions() is empty right after reset().")
                return
            for action in actions:
                self.reset(seed)
                with self.calling("parse_action()"):
                    parsed = self.env.parse_action(action)
                if parsed != action:
                    self.problem(
                        "parse", f"parse_action({action!r}) gives {parsed!r} although that action is listed as legal."
                    )
                self.doing = f"step({action!r})"
                try:
                    self.env.step(action)
                except ValueError as problem:
                    self.problem("legal-refused", f"step({action!r}) refuses an action listed as legal: {problem}")
                except Exception as problem:
                    self.problem("raises", f"step({action!r}) raised {type(problem).__name__}: {problem}")
        self.reset(0)
        self.doing = "parse_action() or step() with an action that is not legal"
        if self.env.parse_action(NOT_AN_ACTION) is not None:
            self.problem("parse", "parse_action() takes text for an action that is not among the legal actions.")
        try:
            self.env.step(NOT_AN_ACTION)
        except ValueError:
            pass
        except Exception as problem:
            self.problem(
                "illegal-accepted",
                f"step() must raise ValueError for an action that is not legal, not {type(problem).__name__}.",
            )
        else:
            self.problem("illegal-accepted", "step() must raise ValueError for an action that is not legal.")

    def check_end(self) -> None:
        for seed in self.seeds:
            record = self.play(seed)
            if not any(record[-1][-2:]):
                continue
            action = str(record[-1][0])
            self.doing = "step() after the end of an episode"
            try:
                self.env.step(action)
            except gym.error.ResetNeeded:
                return
            except Exception as problem:
                self.problem(
                    "after-end",
                    "step() after the end of an episode must raise gymnasium.error.ResetNeeded, not "
                    f"{type(problem).__name__}.",
                )
            else:
                self.problem(
                    "after-end",
                    "step() goes on after the end of an episode; it must raise gymnasium.error.ResetNeeded.",
                )
            return
        self.report.skipped.append(f"steps after the end, because no episode ended within {self.max_steps} actions")

    def check_picks(self) -> None:
        """Tasks by number, where the environment counts them."""
        for split in SPLITS:
            with self.calling(f"task_count({split!r})"):
                count: object = self.env.task_count(split)
            if count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                self.problem("count-type", f"task_count() must return a whole number or None, not {count!r}.")
                return
            shown = set()
            numbers = {i * (count - 1) // 7 for i in range(8)} if count else set()
            for number in sorted(numbers):
                first, again = (self.picked(seed, split, number) for seed in (0, 1))
                shown.add(first)
                if first != again:
                    self.problem(
                        "index",
                        f'With options["index"] = {number} two seeds show different tasks; where task_count() counts '
                        "them, the index alone picks one.",
                    )
            if len(shown) == 1 and len(numbers) > 1:
                self.problem(
                    "index",
                    f'task_count() tells of {count} tasks of the {split} split, but options["index"] = '
                    f"{', '.join(map(str, sorted(numbers)))} show one and the same.",
                )

    def picked(self, seed: int, split: str, number: int) -> object:
        observation, info = self.reset(seed, split, number)
        return info.get("task", observation)

    def check_splits(self) -> None:
        self.check_picks()
        tasks: dict[str, set[object]] = {}
        for split in SPLITS:
            tasks[split] = set()
            for seed in range(4 * len(self.seeds)):
                observation, info = self.reset(seed, split)
                if "split" not in info:
                    self.report.skipped.append(
                        "whether splits are disjoint, because the environment does not report info['split']"
                    )
                    return
                if info["split"] != split:
                    self.problem("split", f"A reset with split {split!r} reports the split {info['split']!r}.")
                    return
                tasks[split].add(info.get("task", observation))
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = tasks[one] & tasks[other]
            if shared:
                self.problem(
                    "split-overlap", f"The {one} and {other} splits share tasks, such as {str(next(iter(shared)))!r}."
                )

    def check_oracle(self) -> None:
        knows, reached = False, 0
        for seed in self.seeds:
            _, info = self.reset(seed)
            with self.calling("optimal_success()"):
                certain = self.env.optimal_success() == 1.0
            for _ in range(self.max_steps):
                with self.calling("oracle()"):
                    plan: object = self.env.oracle()
                if plan is None or plan == []:
                    break
                if not isinstance(plan, list) or not all(isinstance(action, str) for action in plan):
                    self.problem("oracle-type", "oracle() must return a list of str, or None where nobody knows.")
                    return
                knows = True
                if self.env.parse_action(plan[0]) is None:
                    self.problem("oracle", f"oracle() plans {plan[0]!r}, which is not a legal action.")
                    return
                _, _, terminated, truncated, info = self.step(plan[0])
                if terminated or truncated:
                    break
            if "success" not in info:
                self.report.skipped.append("whether the oracle succeeds, because info has no 'success'")
                return
            reached += bool(info["success"])
            if knows and certain and not info["success"]:
                self.problem(
                    "oracle", f"With seed {seed} success is certain, but the oracle's actions do not reach it."
                )
        if not knows:
            self.report.skipped.append("the oracle, because there is none")
        elif reached == 0:
            self.problem("oracle", f"The oracle's actions led to success in none of {len(self.seeds)} episodes.")
