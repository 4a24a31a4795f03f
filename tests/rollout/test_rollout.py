"""Many episodes at once: every way in which an environment can break, and the same play whoever runs beside it."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.algorithms.advantages import dr_grpo
from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, GenerationError, RecipeError
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams
from rehearsal.rollout import Rollout, Task, check_failures, rollout_metrics, run_coroutine, tasks_of_step
from rehearsal.trajectory import (
    FAILED_STOPS,
    Group,
    Kind,
    Segment,
    StopReason,
    Trajectory,
    Turn,
    all_trajectories,
    rewards_matrix,
)

LIMITS = Limits(max_turns=3, max_actions_per_turn=1, max_actions=3, max_tokens_per_turn=12, max_context=300)


class Walk(TextEnv):
    """Three steps, in any direction, and a point for the last one. What tests make of it is passed as functions."""

    name = "walk"
    fast = True
    instructions = "Walk.\nActions: Left, Right, Up, Down."
    made: list[Walk]

    def __init__(
        self, on_reset: Callable[[Walk], Any] = lambda env: None, on_step: Callable[[Walk], Any] = lambda env: None,
        fast: bool = True, length: int = 3,
    ) -> None:  # fmt: skip
        self.fast = fast
        self.on_reset, self.on_step, self.length = on_reset, on_step, length
        self.seed, self.options, self.steps, self.closed = -1, {}, 0, False
        self.resets = 0

    def legal_actions(self) -> list[str]:
        return ["Left", "Right", "Up", "Down"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed, self.options, self.steps = seed or 0, options or {}, 0
        self.resets += 1
        given = self.on_reset(self)
        return given if given is not None else (f"Start {self.seed % 7}.", {"task": str(seed), "state": "0"})

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        given = self.on_step(self)
        if given is not None:
            return given
        over = self.steps >= self.length
        info = {"success": over, "effective": self.steps != 2, "state": str(self.steps)}
        return f"Went {action}.", float(over), over, False, info

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def play(taught_policy: Any) -> Iterator[Callable[..., Rollout]]:
    """Makes a rollout of the taught policy over environments from ``make_env``."""
    made: list[Rollout] = []

    def build(make_env: Callable[[], TextEnv], capacity: int = 8, **changes: Any) -> Rollout:
        settings: dict[str, Any] = {"limits": LIMITS, "protocol": Protocol(thinking=False), **changes}
        limits = settings.pop("limits")
        engine = LocalEngine(
            taught_policy.model, max_context=limits.max_context, max_sessions=capacity, memory_bytes=1 << 27
        )
        made.append(Rollout(make_env, engine, taught_policy.renderer, limits=limits, **settings))
        return made[-1]

    yield build
    for rollout in made:
        rollout.close()


def tasks(n: int) -> list[Task]:
    return [Task(seed) for seed in range(n)]


def only(seed: int, what: Callable[[Walk], Any]) -> Callable[[Walk], Any]:
    """Do ``what`` in episodes of one seed, and nothing in others."""
    return lambda env: what(env) if env.seed == seed else None


def raises(error: BaseException) -> Callable[[Any], Any]:
    def raise_it(_: Any) -> Any:
        raise error

    return raise_it


# Episodes that go well


def test_an_episode_is_what_was_shown_sampled_and_done(play: Callable[..., Rollout], taught_policy: Any) -> None:
    rollout = play(Walk)
    groups = rollout.play([Task(4, "validation"), Task(5, "validation")], 3, step=7)
    assert [len(group) for group in groups] == [3, 3]
    renderer = taught_policy.renderer
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            assert (trajectory.environment, trajectory.seed, trajectory.split) == ("walk", 4 + p, "validation")
            assert (trajectory.sample, trajectory.policy_step, trajectory.task) == (g, 7, str(4 + p))
            (segment,) = trajectory.segments
            assert segment.turns.tolist() == sorted(segment.turns.tolist())
            assert np.array_equal(~np.isnan(segment.logprobs), segment.sampled_mask)
            for number, turn in enumerate(trajectory.turns):
                here = segment.turns == number
                assert renderer.decode(segment.token_ids[here & segment.sampled_mask]) == turn.response
                shown = renderer.decode(segment.token_ids[here & (segment.kinds == Kind.OBSERVATION)])
                assert shown.strip() == turn.observation.strip()
            executed = sum(len(turn.executed) for turn in trajectory.turns)
            assert trajectory.reward == pytest.approx((executed >= 3) + sum(turn.penalty for turn in trajectory.turns))
            assert trajectory.success is (None if executed == 0 else executed >= 3)
            assert trajectory.final_observation.startswith("Went" if executed else "Start")


def test_the_counters_add_up(play: Callable[..., Rollout]) -> None:
    groups = play(Walk, sampling=SamplingParams(temperature=2.0)).play(tasks(8), 4)
    episodes = all_trajectories(groups)
    turns = [turn for trajectory in episodes for turn in trajectory.turns]
    names = ("format_errors", "illegal_actions", "ineffective_actions")
    counts = {name: sum(t.counters.get(name, 0.0) for t in episodes) for name in names}
    broken = [turn for turn in turns if not turn.valid]
    assert broken, "at this temperature the policy should stumble now and then"
    assert counts["format_errors"] + counts["illegal_actions"] == len(broken)
    assert counts["ineffective_actions"] == sum(sum(len(turn.executed) for turn in t.turns) >= 2 for t in episodes)
    figures = rollout_metrics(groups)
    assert figures["train/episodes"] == 32
    assert figures["train/failed_episodes"] == 0
    assert figures["train/format_errors"] == pytest.approx(counts["format_errors"] / len(turns))
    assert figures["train/turns"] == pytest.approx(len(turns) / 32)
    assert figures["train/response_tokens"] == pytest.approx(sum(t.n_sampled for t in episodes) / len(turns))
    stops = [value for name, value in figures.items() if name.startswith("train/stop/")]
    assert sum(stops) == pytest.approx(1.0)


def test_chance_and_split_reach_the_environment(play: Callable[..., Rollout]) -> None:
    seen: list[tuple[int, Any]] = []
    play(lambda: Walk(on_reset=lambda env: seen.append((env.seed, dict(env.options))))).play(
        [Task(3, "test"), Task(9, "test")], 3
    )
    assert sorted(seen, key=str) == sorted(
        [(seed, {"split": "test", "chance": chance}) for seed in (3, 9) for chance in range(3)], key=str
    )


def test_options_of_a_task_reach_the_environment(play: Callable[..., Rollout]) -> None:
    seen: list[Any] = []
    task = Task(3, "test", options={"company": 51, "split": "train"})
    play(lambda: Walk(on_reset=lambda env: seen.append(dict(env.options)))).play([task, Task(4)], 1)
    # The split is the task's own, whatever its options say.
    assert {"company": 51, "split": "test", "chance": 0} in seen
    assert {"split": "train", "chance": 0} in seen


def test_members_of_a_group_have_luck_of_their_own(play: Callable[..., Rollout]) -> None:
    """With slips all episodes of a group begin alike and go on differently under the same actions."""
    rollout = play(lambda: make("frozenlake", size=3, slip=0.8))
    groups = rollout.play(tasks(6), 4)
    for group in groups:
        assert len({trajectory.turns[0].observation for trajectory in group}) == 1
    outcomes = [
        {(t.turns[0].executed[0], t.turns[1].observation) for t in group if len(t.turns) > 1 and t.turns[0].executed}
        for group in groups
    ]
    assert any(len({move for move, _ in seen}) < len(seen) for seen in outcomes)


class Dice(Walk):
    """Tells a throw that it draws as Gymnasium says, and has never heard of chance."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return (f"Threw {int(self.np_random.integers(10**6))}.", *rest)


@pytest.mark.parametrize("fast", [True, False])
def test_an_environment_that_knows_no_chance_gets_its_luck_from_the_harness(
    fast: bool, play: Callable[..., Rollout]
) -> None:
    def throws() -> list[list[str]]:
        groups = play(lambda: Dice(fast=fast), limits=replace(LIMITS, max_turns=9)).play(tasks(4), 4)
        for group in groups:
            assert len({trajectory.turns[0].observation for trajectory in group}) == 1
        return [[t.final_observation for t in group if t.final_observation.startswith("Threw")] for group in groups]

    first = throws()
    assert sum(len(group) > 2 for group in first) >= 2
    for group in first:
        assert len(set(group)) == len(group)
    assert throws() == first, "seed and sample fix the luck"


def test_every_episode_is_told_once(play: Callable[..., Rollout]) -> None:
    told: list[Trajectory] = []
    make_env = lambda: Walk(on_reset=only(1, raises(ValueError("no"))), on_step=only(2, raises(ValueError("no"))))  # noqa: E731
    groups = play(make_env).play(tasks(4), 3, on_episode=told.append)
    assert sorted(map(id, told)) == sorted(map(id, all_trajectories(groups)))


def test_environments_are_used_again_and_closed_at_the_end(play: Callable[..., Rollout]) -> None:
    made: list[Walk] = []

    def make_env() -> Walk:
        made.append(Walk())
        return made[-1]

    rollout = play(make_env, capacity=4)
    rollout.play(tasks(10), 2)
    rollout.play(tasks(10), 2)
    assert len(made) <= 8
    assert sum(env.resets for env in made) == 40
    assert not any(env.closed for env in made)
    rollout.close()
    assert all(env.closed for env in made)


def test_no_tasks(play: Callable[..., Rollout]) -> None:
    assert play(Walk).play([], 4) == []
    assert rollout_metrics([]) == {}


# Limits


def test_limits_end_episodes(play: Callable[..., Rollout]) -> None:
    def stops(**limits: int) -> set[StopReason]:
        changed = Limits(**{**vars(LIMITS), **limits})
        groups = play(lambda: Walk(length=99), limits=changed).play(tasks(4), 2)
        for trajectory in all_trajectories(groups):
            assert len(trajectory.turns) <= changed.max_turns
            assert sum(len(turn.executed) for turn in trajectory.turns) <= changed.max_actions
            assert trajectory.n_tokens <= changed.max_context
            assert not trajectory.failed
        return {trajectory.stop_reason for trajectory in all_trajectories(groups)}

    assert stops() == {StopReason.TURN_LIMIT}
    assert StopReason.ACTION_LIMIT in stops(max_actions=1, max_turns=9)
    assert stops(max_turns=9, max_actions=9, max_context=110) == {StopReason.CONTEXT_LIMIT}


def test_an_environment_may_truncate(play: Callable[..., Rollout]) -> None:
    groups = play(lambda: Walk(on_step=lambda env: ("Enough.", 0.25, False, True, {}))).play(tasks(3), 2)
    for trajectory in all_trajectories(groups):
        if any(turn.executed for turn in trajectory.turns):
            assert trajectory.stop_reason == StopReason.TRUNCATED
            assert trajectory.final_observation == "Enough."
            assert trajectory.success is None


def test_an_observation_without_room_ends_the_episode(play: Callable[..., Rollout]) -> None:
    long = "word " * 400
    groups = play(lambda: Walk(on_step=lambda env: (long, 0.5, False, False, {}))).play(tasks(2), 2)
    for trajectory in all_trajectories(groups):
        if any(turn.executed for turn in trajectory.turns):
            assert trajectory.stop_reason == StopReason.CONTEXT_LIMIT
            assert trajectory.final_observation == long
            assert trajectory.reward >= 0.5 - 0.2 - 1e-9


def test_an_opening_without_room(play: Callable[..., Rollout]) -> None:
    rollout = play(Walk, limits=Limits(**{**vars(LIMITS), "max_context": 20}))
    (group,) = rollout.play(tasks(1), 2)
    for trajectory in group:
        assert trajectory.stop_reason == StopReason.CONTEXT_LIMIT
        assert trajectory.turns == []
        assert trajectory.segments == []
        assert trajectory.reward == 0.0
    with pytest.raises(
        RecipeError, match=r"first observation of walk take \d+ tokens.*agent.max_context \(20 tokens\)"
    ):
        rollout.check_opening()


def test_an_opening_with_room_is_no_complaint(play: Callable[..., Rollout]) -> None:
    made: list[Walk] = []

    def make_env() -> Walk:
        made.append(Walk())
        return made[-1]

    rollout = play(make_env)
    rollout.check_opening()
    assert made[0].closed
    rollout.play(tasks(1), 1)
    assert made[1].resets == 1


@pytest.mark.parametrize("fast", [True, False])
def test_the_opening_of_a_broken_environment_is_not_judged(fast: bool, play: Callable[..., Rollout]) -> None:
    play(lambda: Walk(on_reset=raises(ValueError("no")), fast=fast)).check_opening()


# Environments that break


BREAKS: dict[str, tuple[Any, str]] = {
    "raises": (raises(ZeroDivisionError("by\nzero")), r"raised ZeroDivisionError: by zero\."),
    "raises without a word": (raises(KeyError()), r"raised KeyError\."),
    "raises a timeout of its own": (raises(TimeoutError("slow disk")), r"raised TimeoutError: slow disk\."),
    "stops iterating": (raises(StopIteration("end")), r"raised StopIteration: end\."),
    "leaves the program": (raises(SystemExit("bye")), r"raised SystemExit: bye\."),
    "cancels": (raises(asyncio.CancelledError()), r"raised CancelledError\."),
    "returns nothing useful": (lambda env: 3, r"must return \(observation, .*not 3 of type int"),
    "observation is no text": (
        lambda env: (b"x", {}) if env.steps == 0 else (b"x", 0.0, False, False, {}),
        "must return a string as observation",
    ),
    "info is no dictionary": (
        lambda env: ("x", None) if env.steps == 0 else ("x", 0.0, False, False, None),
        "must return a dict as info, not None",
    ),
    "observation is no Unicode": (
        lambda env: ("x\ud800", {}) if env.steps == 0 else ("x\ud800", 0.0, False, False, {}),
        r"returned text that is not valid Unicode \('\\ud800' at character 1\) as observation",
    ),
    "state is no Unicode": (
        lambda env: ("x", {"state": "\udcff"}) if env.steps == 0 else ("x", 0.0, False, False, {"state": "\udcff"}),
        r'returned text that is not valid Unicode .*as info\["state"\]',
    ),
    "raises what is no Unicode": (raises(ValueError("no \udcff")), r"raised ValueError: no \?\."),
}
IN_STEP: dict[str, tuple[Any, str]] = {
    "reward is not a number": (lambda env: ("x", math.nan, False, False, {}), "finite number as reward, not nan"),
    "reward is infinite": (lambda env: ("x", -math.inf, False, False, {}), "finite number as reward, not -inf"),
    "reward is text": (lambda env: ("x", "1", False, False, {}), "finite number as reward, not '1' of type str"),
    "over is no flag": (lambda env: ("x", 0.0, None, False, {}), "True or False as terminated, not None"),
    "four values": (lambda env: ("x", 0.0, False, {}), "observation, reward, terminated, truncated, info"),
}


@pytest.mark.parametrize("fast", [True, False], ids=["in line", "in a thread"])
@pytest.mark.parametrize(
    ("where", "what", "message"),
    [("reset", *case) for case in BREAKS.values()] + [("step", *case) for case in (BREAKS | IN_STEP).values()],
    ids=[f"reset: {name}" for name in BREAKS] + [f"step: {name}" for name in BREAKS | IN_STEP],
)
def test_a_broken_episode_is_data(
    where: str, what: Callable[[Walk], Any], message: str, fast: bool, play: Callable[..., Rollout]
) -> None:
    kwargs = {f"on_{where}": only(1, what)}
    groups = play(lambda: Walk(fast=fast, **kwargs)).play(tasks(3), 3)
    expected = all_trajectories(play(Walk).play(tasks(3), 3))
    for trajectory, same in zip(all_trajectories(groups), expected, strict=True):
        if trajectory.seed != 1:
            assert trajectory.stop_reason == same.stop_reason
            assert trajectory.error == ""
            assert np.array_equal(trajectory.segments[0].token_ids, same.segments[0].token_ids)
            continue
        if where == "step" and not trajectory.failed:
            assert not any(turn.executed for turn in trajectory.turns), "it never got to act"
            continue
        assert trajectory.stop_reason == StopReason.ERROR
        assert math.isnan(trajectory.reward)
        assert re.search(message, trajectory.error), trajectory.error
        assert trajectory.error.startswith(f"Walk.{where}")
        assert trajectory.error.endswith(".")
        assert "\n" not in trajectory.error
    failed = [trajectory for trajectory in groups[1] if trajectory.failed]
    assert failed
    assert np.isnan(rewards_matrix(groups)[1]).sum() == len(failed)
    figures = rollout_metrics(groups)
    assert figures["train/failed_episodes"] == len(failed)
    assert figures["train/stop/error"] == pytest.approx(len(failed) / 9)
    assert math.isfinite(figures["train/reward"])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("what", ["instructions", "legal_actions"])
def test_rules_that_cannot_be_told_fail_the_episode(what: str, fast: bool, play: Callable[..., Rollout]) -> None:
    class Mute(Walk):
        pass

    setattr(Mute, what, property(raises(ValueError("no rules"))))
    (group,) = play(lambda: Mute(fast=fast)).play(tasks(1), 2)
    assert [trajectory.stop_reason for trajectory in group] == [StopReason.ERROR] * 2
    assert "no rules" in group.trajectories[0].error


def test_rules_that_are_no_unicode_are_told_in_a_sentence(play: Callable[..., Rollout]) -> None:
    class Odd(Walk):
        instructions = "Walk.\ud800"

    (group,) = play(Odd).play(tasks(1), 1)
    assert group.trajectories[0].error.startswith("Odd.instructions holds text that is not valid Unicode")


def fails_for(seed: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an agent that raises in episodes of one seed, which its first observation tells."""

    def method(self: Agent, *args: Any) -> Any:
        if self.turns[0].observation == f"Start {seed}.":
            raise TypeError("a tokenizer's own words")
        return original(self, *args)

    return method


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("next_turn", "What Walk.step returned cannot be shown: TypeError: a tokenizer's own words."),
        ("read", "The agent's answer could not be read: TypeError: a tokenizer's own words."),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_what_an_agent_stumbles_over_costs_one_episode(
    what: str, message: str, fast: bool, play: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agent, what, fails_for(1, getattr(Agent, what)))
    groups = play(lambda: Walk(fast=fast)).play(tasks(3), 2)
    assert [[trajectory.failed for trajectory in group] for group in groups] == [[False] * 2, [True] * 2, [False] * 2]
    for trajectory in groups[1]:
        assert (trajectory.stop_reason, trajectory.error) == (StopReason.ERROR, message)
        assert math.isnan(trajectory.reward)


@pytest.mark.parametrize(("error", "ends"), [(ValueError("odd ids"), False), (GenerationError("gone"), True)])
def test_showing_costs_one_episode_and_an_engine_that_fails_all(
    error: Exception, ends: bool, play: Callable[..., Rollout]
) -> None:
    rollout = play(Walk)
    shown: list[Any] = []

    def show(session: Any, prompt: Any) -> None:
        shown.append(prompt)
        if len(shown) == 1:
            raise error
        original(session, prompt)

    original = rollout._show
    rollout._show = show  # type: ignore[method-assign]
    if ends:
        with pytest.raises(GenerationError, match="gone"):
            rollout.play(tasks(2), 2)
    else:
        failed = [t for t in all_trajectories(rollout.play(tasks(2), 2)) if t.failed]
        assert [t.error for t in failed] == ["What Walk.step returned cannot be shown: ValueError: odd ids."]


@pytest.mark.parametrize("fast", [True, False])
def test_an_environment_that_broke_is_not_used_again(fast: bool, play: Callable[..., Rollout]) -> None:
    """After its error it may be in any state: here it would fail for ever."""
    made: list[Walk] = []

    def break_for_good(env: Walk) -> None:
        if env.seed == 0 or getattr(env, "broken", False):
            env.broken = True  # type: ignore[attr-defined]
            raise ConnectionError("lost")

    def make_env() -> Walk:
        made.append(Walk(on_reset=break_for_good, fast=fast))
        return made[-1]

    rollout = play(make_env, capacity=1)
    groups = rollout.play(tasks(6), 1)
    assert [group.trajectories[0].failed for group in groups] == [True] + [False] * 5
    rollout.close()
    assert all(env.closed for env in made)


@pytest.mark.parametrize("fast", [True, False])
def test_an_environment_that_cannot_be_closed_does_no_harm(fast: bool, play: Callable[..., Rollout]) -> None:
    class Stubborn(Walk):
        def close(self) -> None:
            raise OSError("busy")

    rollout = play(lambda: Stubborn(fast=fast, on_step=only(0, raises(ValueError("no")))))
    rollout.play(tasks(3), 2)
    rollout.close()


# Environments that are hard to make


def built_by(number: int, what: Callable[[], Any], made: list[Walk], fast: bool) -> Callable[[], Walk]:
    """A maker that does ``what`` before it makes its environment of that number, counted from 0."""
    counted, lock = iter(range(10_000)), threading.Lock()

    def make_env() -> Walk:
        with lock:
            mine = next(counted)
        if mine == number:
            what()
        made.append(Walk(fast=fast))
        return made[-1]

    return make_env


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("no\nserver"), "The environment could not be made: ConnectionError: no server."),
        (EnvironmentFault("The environment x could not be made."), "The environment x could not be made."),
        (SystemExit("bye"), "The environment could not be made: SystemExit: bye."),
        (StopIteration(), "The environment could not be made: StopIteration."),
    ],
)
def test_a_constructor_that_raises_costs_its_own_episode(
    error: BaseException, told: str, fast: bool, play: Callable[..., Rollout]
) -> None:
    made: list[Walk] = []
    rollout = play(built_by(3, lambda: raises(error)(None), made, fast))
    heard: list[Trajectory] = []
    episodes = all_trajectories(rollout.play(tasks(4), 2, on_episode=heard.append))
    (failed,) = [trajectory for trajectory in episodes if trajectory.failed]
    assert (failed.stop_reason, failed.error) == (StopReason.ERROR, told)
    assert failed.environment == "walk"
    assert math.isnan(failed.reward)
    assert (failed.turns, failed.segments) == ([], [])
    assert len(heard) == 8
    expected = all_trajectories(play(Walk).play(tasks(4), 2))
    for trajectory, same in zip(episodes, expected, strict=True):
        assert trajectory.failed or np.array_equal(trajectory.segments[0].token_ids, same.segments[0].token_ids)
    assert not any(trajectory.failed for trajectory in all_trajectories(rollout.play(tasks(4), 2)))
    rollout.close()
    assert all(env.closed for env in made)


def test_a_constructor_that_hangs_costs_its_own_episode(play: Callable[..., Rollout]) -> None:
    release, made = threading.Event(), []
    rollout = play(built_by(3, lambda: release.wait(120), made, fast=False), step_timeout=2.0)
    episodes = all_trajectories(rollout.play(tasks(4), 2))
    (failed,) = [trajectory for trajectory in episodes if trajectory.failed]
    assert (failed.stop_reason, failed.error) == (StopReason.TIMEOUT, "Making the environment took longer than 2 s.")
    before = len(made)
    release.set()
    deadline = time.monotonic() + 60
    while not (len(made) > before and made[-1].closed) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[-1].closed, "once it is there after all, nobody has a use for it"


def test_slow_constructors_run_side_by_side(play: Callable[..., Rollout]) -> None:
    """Each waits for all the others: made one after the other, they would wait in vain."""
    all_there = threading.Barrier(7)
    first = iter([True])

    def make_env() -> Walk:
        if not next(first, False):  # the first one is made alone, to see what kind it is
            all_there.wait(120)
        return Walk(fast=False)

    episodes = all_trajectories(play(make_env, step_timeout=120.0).play(tasks(1), 8))
    assert [trajectory.error for trajectory in episodes] == [""] * 8


def test_a_slow_constructor_holds_nobody_else_up(play: Callable[..., Rollout]) -> None:
    others_done = threading.Event()
    ended: list[int] = []

    def on_episode(trajectory: Trajectory) -> None:
        ended.append(trajectory.seed)
        if len(ended) == 3:
            others_done.set()

    made: list[Walk] = []
    rollout = play(built_by(2, lambda: others_done.wait(120), made, fast=False), step_timeout=120.0)
    groups = rollout.play(tasks(4), 1, on_episode=on_episode)
    assert not any(trajectory.failed for trajectory in all_trajectories(groups))
    assert others_done.is_set()


def test_a_fast_environment_is_made_and_stepped_in_line(play: Callable[..., Rollout]) -> None:
    """Its first one too, which is made in a thread as long as nobody knows how fast it is."""
    threads: set[str] = set()
    seen = lambda env: threads.add(threading.current_thread().name)  # noqa: E731
    rollout = play(lambda: Walk(on_reset=seen, on_step=seen))
    rollout.play(tasks(4), 4)
    assert threads == {threading.current_thread().name}


def test_an_environment_that_can_never_be_made_is_data_too(play: Callable[..., Rollout]) -> None:
    rollout = play(lambda: raises(ConnectionError("no server"))(None))
    rollout.check_opening()
    groups = rollout.play(tasks(2), 2)
    with pytest.raises(EnvironmentFault, match=r"4 of 4 episodes failed.* could not be made: .*no server\.$"):
        check_failures(groups, 0.5)


def test_play_that_is_broken_off_closes_what_is_being_made(play: Callable[..., Rollout]) -> None:
    release, made = threading.Event(), []
    rollout = play(built_by(1, lambda: release.wait(120), made, fast=False), step_timeout=120.0)

    def broken(*_: Any) -> Any:
        raise GenerationError("gone")

    rollout._show = rollout._answer = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(GenerationError, match="gone"):
        rollout.play(tasks(2), 1)
    release.set()
    deadline = time.monotonic() + 60
    while not (len(made) == 2 and made[-1].closed) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [env.closed for env in made] == [True, True]


# Environments that are slow or hang


def test_a_hanging_environment_costs_its_own_episodes(play: Callable[..., Rollout]) -> None:
    release = threading.Event()
    make_env = lambda: Walk(  # noqa: E731
        on_reset=only(1, lambda env: release.wait(60) and None),
        on_step=only(2, lambda env: release.wait(60) and None),
        fast=False,
    )
    rollout = play(make_env, step_timeout=2.0)
    began = time.monotonic()
    groups = rollout.play(tasks(5), 3)
    took = time.monotonic() - began
    release.set()
    # One timeout for the episodes that hang at the same time, and whatever the others take on a busy machine.
    assert took < 60
    for trajectory in groups[1]:
        assert trajectory.stop_reason == StopReason.TIMEOUT
        assert trajectory.error == "Walk.reset took longer than 2 s."
        assert trajectory.turns == []
    hung = [trajectory for trajectory in groups[2] if trajectory.failed]
    assert hung
    assert {trajectory.error for trajectory in hung} == {"Walk.step took longer than 2 s."}
    assert all(math.isnan(trajectory.reward) for trajectory in hung)
    for p in (0, 3, 4):
        assert not any(trajectory.stop_reason in FAILED_STOPS for trajectory in groups[p])
    # The rollout can go on, with new environments in place of those that hang.
    assert not any(trajectory.failed for trajectory in all_trajectories(rollout.play(tasks(5)[3:], 3)))


def test_an_environment_may_say_how_long_its_steps_take(play: Callable[..., Rollout]) -> None:
    """One that keeps time limits itself, such as those of a verifier, is not hung as long as they last."""
    make_env = lambda: Walk(on_step=only(0, lambda env: time.sleep(0.5)), fast=False)  # noqa: E731

    def patient() -> Walk:
        env = make_env()
        env.step_seconds = 60.0
        return env

    assert play(make_env, step_timeout=0.1).play(tasks(1), 1)[0].trajectories[0].failed
    assert not play(patient, step_timeout=0.1).play(tasks(1), 1)[0].trajectories[0].failed


def test_a_hung_environment_is_closed_if_it_ever_comes_back(play: Callable[..., Rollout]) -> None:
    release, made = threading.Event(), []

    def make_env() -> Walk:
        made.append(Walk(on_reset=only(0, lambda env: release.wait(60) and None), fast=False))
        return made[-1]

    play(make_env, step_timeout=0.2).play(tasks(1), 1)
    assert not made[0].closed
    release.set()
    deadline = time.monotonic() + 20
    while not made[0].closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[0].closed


def test_a_slow_environment_holds_nobody_else_up(play: Callable[..., Rollout]) -> None:
    """The slow one waits until all others are done: if it held them up, it would wait in vain."""
    others_done = threading.Event()
    ended: list[int] = []

    def note(trajectory: Trajectory) -> None:
        ended.append(trajectory.seed)
        if sum(seed != 0 for seed in ended) == 8:
            others_done.set()

    waited: list[bool] = []
    make_env = lambda: Walk(  # noqa: E731
        on_reset=only(0, lambda env: waited.append(others_done.wait(60))), fast=False
    )
    rollout = play(make_env, capacity=12)
    groups = rollout.play(tasks(5), 2, on_episode=note)
    assert waited == [True, True]
    assert ended[-2:] == [0, 0]
    assert not any(trajectory.failed for trajectory in all_trajectories(groups))


def test_slow_rules_hold_nobody_up_either(play: Callable[..., Rollout]) -> None:
    others_done, waited = threading.Event(), []

    class SlowRules(Walk):
        def legal_actions(self) -> list[str]:
            if self.seed == 0 and self.steps == 0:
                waited.append(others_done.wait(20))
            return super().legal_actions()

    done: list[int] = []

    def note(trajectory: Trajectory) -> None:
        done.append(trajectory.seed)
        if len(done) == 3:
            others_done.set()

    play(lambda: SlowRules(fast=False)).play(tasks(4), 1, on_episode=note)
    assert waited
    assert waited[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_environments_step_at_once_than_there_are_workers(workers: int, play: Callable[..., Rollout]) -> None:
    lock, here, most = threading.Lock(), [0], [0]

    def crowd(env: Walk) -> None:
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        time.sleep(0.003)
        with lock:
            here[0] -= 1

    play(lambda: Walk(on_reset=crowd, on_step=crowd, fast=False), workers=workers).play(tasks(4), 3)
    assert 1 <= most[0] <= workers


# The same episodes whatever runs beside them


def ids_of(groups: list[Group]) -> list[list[int]]:
    return [trajectory.segments[0].token_ids.tolist() for trajectory in all_trajectories(groups)]


def test_the_same_seed_gives_the_same_episodes(play: Callable[..., Rollout]) -> None:
    first, second = (play(Walk, seed=3).play(tasks(4), 3) for _ in range(2))
    for one, other in zip(all_trajectories(first), all_trajectories(second), strict=True):
        assert one.turns == other.turns
        assert one.counters == other.counters
        np.testing.assert_array_equal(one.segments[0].token_ids, other.segments[0].token_ids)
        np.testing.assert_array_equal(one.segments[0].logprobs, other.segments[0].logprobs)
    assert ids_of(play(Walk, seed=4).play(tasks(4), 3)) != ids_of(first)
    assert ids_of(play(Walk, seed=3).play(tasks(4), 3, step=1)) != ids_of(first)


@pytest.mark.parametrize("capacity", [1, 2, 5, 32])
def test_the_capacity_of_the_engine_changes_nothing(capacity: int, play: Callable[..., Rollout]) -> None:
    expected = play(Walk, capacity=8).play(tasks(4), 3)
    rollout = play(Walk, capacity=capacity)
    assert ids_of(rollout.play(tasks(4), 3)) == ids_of(expected)
    # Nor does it matter which tasks come first, or whether they come alone.
    assert ids_of(rollout.play(tasks(4)[2:], 3)) == ids_of(expected[2:])


def test_what_was_played_before_changes_nothing(play: Callable[..., Rollout]) -> None:
    """To the last bit, as a resumed run has a fresh engine where one that went on has a used one."""
    used, fresh = play(Walk, capacity=7), play(Walk, capacity=7)
    used.play(tasks(9)[5:], 3)
    rows = {}
    for rollout in (used, fresh):
        # The order of rows in a matrix product may change its rounding, so places are taken in the same order too.
        rows[rollout] = noted = []
        engine: Any = rollout.engine
        original = engine._step

        def step(runner: Any, engine: Any = engine, noted: list[Any] = noted, original: Any = original) -> None:
            noted.append([(slot, engine._places[slot].key) for slot in np.nonzero(engine._active)[0]])
            original(runner)

        engine._step = step
    first, second = used.play(tasks(5), 3), fresh.play(tasks(5), 3)
    assert rows[used] == rows[fresh]
    for one, other in zip(all_trajectories(first), all_trajectories(second), strict=True):
        np.testing.assert_array_equal(one.segments[0].token_ids, other.segments[0].token_ids)
        np.testing.assert_array_equal(one.segments[0].logprobs, other.segments[0].logprobs)


def test_threads_change_nothing(play: Callable[..., Rollout]) -> None:
    assert ids_of(play(lambda: Walk(fast=False)).play(tasks(3), 3)) == ids_of(play(Walk).play(tasks(3), 3))


def test_a_group_may_have_different_openings(play: Callable[..., Rollout]) -> None:
    """An environment that takes its luck before the first observation: no two share more than the rules."""
    make_env = lambda: Walk(  # noqa: E731
        on_reset=lambda env: (f"Start {env.options['chance'] % 2} of {env.seed}.", {})
    )
    groups = play(make_env).play(tasks(3), 4)
    for group in groups:
        assert [t.turns[0].observation for t in group] == [f"Start {k % 2} of {t.seed}." for k, t in enumerate(group)]
        assert not any(trajectory.failed for trajectory in group)


def test_a_group_is_the_samples_of_one_task_and_of_no_other(play: Callable[..., Rollout]) -> None:
    """Groups made by an id of the prompt have held one sample each, where every sample had an id of its own, and the
    baseline was then no baseline; or samples of tasks that differ and read alike. Here seeds 1 and 8 read alike."""
    groups = play(Walk).play([Task(1), Task(8), Task(2)], 3)
    assert [[(t.seed, t.task, t.sample) for t in group] for group in groups] == [
        [(seed, str(seed), sample) for sample in range(3)] for seed in (1, 8, 2)
    ]
    first = [{t.turns[0].observation for t in group} for group in groups]
    assert first == [{"Start 1."}, {"Start 1."}, {"Start 2."}]
    rewards_PG = rewards_matrix(groups)
    advantages_PG = dr_grpo(rewards_PG)
    assert np.allclose(advantages_PG, rewards_PG - rewards_PG.mean(axis=1, keepdims=True))


def test_members_that_share_an_opening_read_it_once(play: Callable[..., Rollout]) -> None:
    rollout = play(Walk, capacity=16)
    (group,) = rollout.play(tasks(1), 8)
    opening = int((group.trajectories[0].segments[0].turns == 0).sum()) - 12
    assert rollout.engine.stats.tokens_shared >= 7 * (opening - 1)


def test_it_works_inside_a_running_event_loop(play: Callable[..., Rollout]) -> None:
    """As in a notebook, whose cells run inside a loop."""
    expected = ids_of(play(Walk).play(tasks(3), 2))

    async def cell() -> list[Group]:
        return play(Walk).play(tasks(3), 2)

    assert ids_of(asyncio.run(cell())) == expected

    async def awaited() -> list[Group]:
        return await play(Walk).play_async(tasks(3), 2)

    assert ids_of(asyncio.run(awaited())) == expected


def test_errors_come_out_of_a_running_event_loop() -> None:
    async def broken() -> None:
        raise LookupError("inside")

    async def cell() -> None:
        run_coroutine(broken())

    with pytest.raises(LookupError, match="inside"):
        asyncio.run(cell())


def test_another_distribution_for_evaluation(play: Callable[..., Rollout]) -> None:
    rollout = play(Walk, sampling=SamplingParams(temperature=1.0))
    greedy = SamplingParams(temperature=0.0)
    groups = rollout.play(tasks(2), 3, sampling=greedy)
    for group in groups:
        assert len({tuple(row) for row in ids_of([group])}) == 1
    assert len({tuple(row) for row in ids_of(rollout.play(tasks(1), 6))}) > 1


# Tasks and figures


def test_tasks_are_a_function_of_seed_and_step() -> None:
    first = tasks_of_step(0, 5, 8)
    assert first == tasks_of_step(0, 5, 8)
    assert tasks_of_step(0, 5, 8)[3:] == tasks_of_step(0, 5, 5, first=3)
    seen = {task.seed for seed in (0, 1) for step in range(20) for task in tasks_of_step(seed, step, 8)}
    assert len(seen) == 2 * 20 * 8
    assert all(0 <= seed < 2**31 for seed in seen)
    assert tasks_of_step(0, 5, 2, split="test")[0].split == "test"


def made_up(*rewards: float | None, success: tuple[bool | None, ...] | None = None) -> Group:
    """A group with these rewards; None for an episode that failed."""
    segment = Segment(np.arange(3), [np.nan, -1.0, -1.0], [Kind.SYSTEM, Kind.ACTION, Kind.ACTION], [0, 0, 0])
    outcomes = success or (None,) * len(rewards)
    return Group(
        [
            Trajectory(
                "x",
                0,
                segments=[segment],
                turns=[Turn("o", rewards=[reward or 0.0])],
                success=outcome,
                stop_reason=StopReason.ERROR if reward is None else StopReason.TERMINATED,
            )
            for reward, outcome in zip(rewards, outcomes, strict=True)
        ]
    )


def test_failed_episodes_enter_no_rate() -> None:
    figures = rollout_metrics([made_up(1.0, None, 0.0, success=(True, True, None))])
    assert figures["train/reward"] == 0.5
    assert figures["train/success"] == 0.5
    assert figures["train/failed_episodes"] == 1.0
    assert figures["train/stop/error"] == pytest.approx(1 / 3)
    assert rollout_metrics([made_up(None, None)]).keys().isdisjoint({"train/reward", "train/success"})
