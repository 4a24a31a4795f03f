"""Rollouts with tools: a policy that was taught to call one, slow and hanging tools, and the figures of each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.agents.agent import Agent, Limits, play_actions
from rehearsal.agents.calls import spell_call
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import hindsight
from rehearsal.agents.toolbox import FunctionTools, Toolkit, ToolLimits, ToolSource
from rehearsal.agents.toolkit.calculator import Calculator
from rehearsal.agents.toolkit.notebook import Notebook
from rehearsal.agents.tools import Tool, tool_from
from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import EngineStats, Sampled
from rehearsal.models.chat import ChatRenderer
from rehearsal.rollout import Rollout, Task, rollout_metrics
from rehearsal.rollout.figures import tool_metrics
from rehearsal.trajectory import Group, Kind, SampleStop, StopReason, ToolCall, Trajectory, Turn, all_trajectories


class Door(TextEnv):
    """Opens once it is unlocked, which only its tool does."""

    name = "door"
    fast = True
    max_turns = 4

    def __init__(self) -> None:
        self.unlocked = False
        self.closed = False

    @property
    def tools(self) -> Any:
        return (self.unlock,)

    def unlock(self) -> str:
        """Unlocks."""
        self.unlocked = True
        return "Click."

    def legal_actions(self) -> list[str]:
        return ["open"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.unlocked = False
        return "A door.", {"task": str(seed)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "It opens." if self.unlocked else "Shut.", float(self.unlocked), True, False, {"success": self.unlocked}

    def close(self) -> None:
        self.closed = True


LIMITS = Limits(max_turns=4, max_actions=4, max_tokens_per_turn=60, max_context=500)
BARE = Protocol(thinking=False)
CALL = spell_call("unlock", {})
OPEN = "<answer>open</answer>"


class ScriptedSession:
    """Says the texts of a script, one after the other."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine, self.said = engine, 0
        self.length = 0

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        self.length += len(token_ids)

    async def sample(self, params: SamplingParams) -> Sampled:
        text = self.engine.script[min(self.said, len(self.engine.script) - 1)]
        self.said += 1
        ids = self.engine.renderer.encode(text + "<|im_end|>")
        return Sampled(ids, np.zeros(len(ids), np.float32), SampleStop.END)

    def fork(self, key: int) -> ScriptedSession:
        return ScriptedSession(self.engine)

    def close(self) -> None:
        pass


class ScriptedEngine:
    max_context, capacity, gives_logprobs = 1 << 20, 64, True

    def __init__(self, renderer: ChatRenderer, *script: str) -> None:
        self.renderer, self.script, self.stats = renderer, script, EngineStats()

    def session(self, key: int) -> Any:
        return ScriptedSession(self)

    def reset_stats(self) -> None:
        pass


@pytest.fixture
def play(renderer: ChatRenderer) -> Any:
    """Plays a script: ``play(script, kit, tasks=..., size=...)``."""
    made: list[Rollout] = []

    def run(
        *script: str, kit: Toolkit | None = None, make: Callable[[], TextEnv] = Door, tasks: int = 1, size: int = 1,
        **changes: Any,
    ) -> list[Group]:  # fmt: skip
        limits = Limits(max_turns=4, max_actions=4, max_tokens_per_turn=200, max_context=4000)
        made.append(Rollout(make, ScriptedEngine(renderer, *script), renderer, BARE, limits, toolkit=kit, **changes))
        return made[-1].play([Task(seed) for seed in range(tasks)], size)

    yield run
    for rollout in made:
        rollout.close()


@pytest.fixture(scope="module")
def door_model(base_tokenizer: Any, renderer: ChatRenderer, tiny_qwen3: Callable[..., Any]) -> Any:
    """Was shown the way through the door: call the tool, then open."""
    env = Door()
    agent = Agent(renderer, BARE, LIMITS)
    observation, _ = env.reset(seed=0)
    prompt = agent.opening(env.instructions, observation, "", env, Toolkit().open(env))
    ids: list[int] = []
    labels: list[int] = []
    for text in (CALL, OPEN):
        assert prompt is not None
        answer = renderer.encode(text + "<|im_end|>")
        ids += [*prompt.token_ids.tolist(), *answer.tolist()]
        labels += [*[-100] * len(prompt), *answer.tolist()]
        turn = agent.read(answer, np.zeros(len(answer)), SampleStop.END)
        prompt = agent.next_turn(play_actions(env, turn, agent.protocol, agent.actions_left, agent.toolbox))
    model = tiny_qwen3(len(base_tokenizer), seed=3, eos_token_id=base_tokenizer.eos_token_id)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def test_a_taught_policy_calls_a_tool_and_gets_its_reward(door_model: Any, renderer: ChatRenderer) -> None:
    engine = LocalEngine(door_model, max_context=500, max_sessions=8, memory_bytes=1 << 27)
    rollout = Rollout(Door, engine, renderer, BARE, LIMITS, sampling=SamplingParams(temperature=0.05))
    groups = rollout.play([Task(seed) for seed in range(3)], 2)
    rollout.close()
    for trajectory in all_trajectories(groups):
        assert trajectory.success is True
        assert trajectory.reward == 1.0
        first, second = trajectory.turns
        assert [(call.name, call.result, call.error) for call in first.calls] == [("unlock", "Click.", "")]
        assert second.executed == ["open"]
        (segment,) = trajectory.segments
        calls = segment.token_ids[(segment.turns == 0) & (segment.kinds == Kind.ACTION)]
        assert renderer.decode(calls) == CALL + "<|im_end|>"
        assert np.array_equal(~np.isnan(segment.logprobs), segment.sampled_mask)
        assert (
            renderer.decode(segment.token_ids[(segment.turns == 1) & (segment.kinds == Kind.OBSERVATION)]) == "Click."
        )
    figures = rollout_metrics(groups)
    assert figures["train/tools/unlock/calls"] == 1.0
    assert figures["train/tools/unlock/failures"] == 0.0
    assert figures["train/tools/unlock/used"] == 1.0
    assert figures["train/tools/unlock/success_with"] == 1.0
    assert "train/tools/unlock/success_without" not in figures


def test_what_was_foretold_by_another_name_is_answered(renderer: ChatRenderer) -> None:
    foretold = "<think><predict>ask card\na number</predict></think>"
    engine = ScriptedEngine(renderer, "<think>Hm.</think><answer>ask pin</answer>",
                            f"{foretold}<answer>look up card</answer>")  # fmt: skip
    limits = Limits(max_turns=2, max_actions=2, max_tokens_per_turn=200, max_context=4000)
    with contextlib.closing(
        Rollout(lambda: make("helpdesk"), engine, renderer, Protocol(rehearse=True), limits)
    ) as rollout:
        ((episode,),) = rollout.play([Task(0)], 1)
    assert not episode.failed and episode.turns[1].executed == ["look up card"]
    (one,) = hindsight(episode, renderer)
    assert renderer.decode(one.token_ids[: one.first]).endswith("<predict>look up card\n")


def test_without_the_call_there_is_no_reward(play: Any) -> None:
    (group,) = play(OPEN)
    assert group.rewards.tolist() == [0.0]
    figures = rollout_metrics([group])
    # Nobody called: the figures say so instead of being away.
    assert (figures["train/tools/unlock/calls"], figures["train/tools/unlock/used"]) == (0.0, 0.0)
    assert figures["train/tools/unlock/success_without"] == 0.0
    assert "train/tools/unlock/failures" not in figures


def test_calls_cost(play: Any) -> None:
    (group,) = play(CALL, CALL, OPEN, kit=Toolkit(limits=ToolLimits(max_calls=1, cost=0.125)))
    assert group.rewards.tolist() == [0.875]
    assert [call.error for turn in group.trajectories[0].turns for call in turn.calls] == ["", "limit"]
    figures = rollout_metrics([group])
    assert (figures["train/tools/refused"], figures["train/tools/calls"], figures["train/tools/cost"]) == (
        1.0,
        1.0,
        0.125,
    )


def test_tools_of_kit_and_environment_side_by_side(play: Any) -> None:
    calls = spell_call("calculator", {"expression": "6*7"}) + CALL
    (group,) = play(calls, OPEN, kit=Toolkit([Calculator(), Notebook()]))
    (trajectory,) = group
    assert [call.result for call in trajectory.turns[0].calls] == ["42", "Click."]
    assert trajectory.reward == 1.0
    assert trajectory.counters["tool_calls/write_note"] == 0.0


def test_a_task_says_which_tools_are_locked(renderer: ChatRenderer) -> None:
    call = spell_call("calculator", {"expression": "6*7"})
    limits = Limits(max_turns=4, max_actions=4, max_tokens_per_turn=200, max_context=4000)
    kit = Toolkit([Calculator()], names=["calculator"])
    rollout = Rollout(Door, ScriptedEngine(renderer, call, CALL, OPEN), renderer, BARE, limits, toolkit=kit)
    with contextlib.closing(rollout):
        groups = rollout.play([Task(0), Task(0, locked=("calculator",)), Task(0, locked=("calculator", "unlock"))], 1)
    free, locked, bare = (group.trajectories[0] for group in groups)
    rules = [renderer.decode(one.segments[0].token_ids[one.segments[0].turns == 0]) for one in (free, locked, bare)]
    assert ["calculator" in text.partition("<|im_start|>user")[0] for text in rules] == [True, False, False]
    assert ["unlock" in text.partition("<|im_start|>user")[0] for text in rules] == [True, True, False]
    assert [one.turns[0].calls[0].error for one in (free, locked)] == ["", "unknown"]
    assert locked.turns[0].calls[0].result == 'There is no tool "calculator". There are: unlock().'
    assert (locked.counters["unknown_tools"], locked.reward) == (1.0, 1.0)
    assert "tool_calls/calculator" in free.counters and "tool_calls/calculator" not in locked.counters
    # Without any tool there is no form for calls: the answer could not be read.
    assert not bare.turns[0].valid and not bare.turns[0].calls


def test_many_episodes_at_once_share_no_notes(play: Any) -> None:
    write = spell_call("write_note", {"title": "a", "text": "b"})
    groups = play(write, spell_call("list_notes", {}), OPEN, kit=Toolkit([Notebook()]), tasks=6, size=3)
    for trajectory in all_trajectories(groups):
        assert trajectory.turns[0].calls[0].result == "Kept, 1 in all."
        assert trajectory.turns[1].calls[0].result == "Notes: a"


def test_a_slow_tool_holds_nobody_else_up(play: Any) -> None:
    gate = threading.Barrier(4, timeout=30)

    def wait() -> str:
        """Waits until four episodes wait."""
        gate.wait()
        return "all here"

    groups = play(spell_call("wait", {}), OPEN, kit=Toolkit([FunctionTools(wait)]), tasks=2, size=2)
    # In line, one after the other, nobody would ever get through.
    assert {t.turns[0].calls[0].result for t in all_trajectories(groups)} == {"all here"}


def test_a_tool_that_hangs_costs_the_episode_nothing_but_the_call(play: Any) -> None:
    leave = threading.Event()

    def hang() -> str:
        """Hangs."""
        leave.wait(60)
        return ""

    kit = Toolkit([FunctionTools(hang)], ToolLimits(timeout=0.2))
    # The calls of an answer may take longer than a step of the environment.
    groups = play(spell_call("hang", {}) + CALL, OPEN, kit=kit, step_timeout=0.15)
    leave.set()
    (trajectory,) = groups[0]
    assert [call.error for call in trajectory.turns[0].calls] == ["timeout", ""]
    assert trajectory.stop_reason == StopReason.TERMINATED
    assert trajectory.reward == 1.0


def test_an_environment_whose_tool_hangs_is_not_used_again(play: Any) -> None:
    leave = threading.Event()
    made: list[Any] = []

    class Stuck(Door):
        fast = False

        def unlock(self) -> str:
            """Hangs."""
            leave.wait(60)
            return ""

    def make() -> Stuck:
        made.append(Stuck())
        return made[-1]

    groups = play(CALL, OPEN, make=make, kit=Toolkit(limits=ToolLimits(timeout=0.1)), tasks=3)
    deadline = time.monotonic() + 20
    while not all(env.closed for env in made) and time.monotonic() < deadline:
        time.sleep(0.01)
    leave.set()
    assert [t.stop_reason for t in all_trajectories(groups)] == [StopReason.TERMINATED] * 3
    assert len(made) == 3
    assert all(env.closed for env in made)


class Leases(ToolSource):
    """Counts what is open; every other episode's tool raises."""

    fast = True

    def __init__(self) -> None:
        self.open_now, self.opened, self.closed = 0, 0, False

    def open(self) -> list[Tool]:
        self.opened += 1
        self.open_now += 1
        number = self.opened

        def back() -> None:
            self.open_now -= 1

        def use() -> str:
            """Uses."""
            if number % 2:
                raise SystemExit(1)
            return "used"

        tool = tool_from(use)
        return [Tool(tool.name, tool.description, tool.parameters, tool.run, fast=True, close=back)]

    def close(self) -> None:
        self.closed = True


def test_whatever_happens_tools_are_given_back(renderer: ChatRenderer) -> None:
    source = Leases()

    class Breaks(Door):
        def step(self, action: str) -> Any:
            raise RuntimeError("broken")

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            if seed == 1:
                raise RuntimeError("never begins")
            return super().reset(seed=seed, options=options)

    rollout = Rollout(Breaks, ScriptedEngine(renderer, spell_call("use", {}), OPEN), renderer, BARE,
                      Limits(max_turns=4, max_actions=4, max_context=4000), toolkit=Toolkit([source]))  # fmt: skip
    rollout.check_opening()
    groups = rollout.play([Task(seed) for seed in range(4)], 2)
    assert {t.stop_reason for t in all_trajectories(groups)} == {StopReason.ERROR}
    assert (source.opened, source.open_now) == (7, 0)
    rollout.close()
    assert source.closed


@pytest.mark.parametrize("fast", [True, False])
def test_rules_that_cannot_be_told_keep_no_tools(fast: bool, play: Any) -> None:
    source = Leases()

    class Mute(Door):
        @property
        def instructions(self) -> str:
            raise ValueError("no rules")

    Mute.fast = fast
    (group,) = play(OPEN, make=Mute, kit=Toolkit([source]), size=2)
    assert {t.stop_reason for t in group} == {StopReason.ERROR}
    assert (source.opened, source.open_now) == (2, 0)


@pytest.mark.parametrize("what", ["session", "sample", "told"])
def test_play_that_is_broken_off_gives_everything_back(what: str, renderer: ChatRenderer) -> None:
    source = Leases()
    made: list[Door] = []

    class Slow(Door):
        fast = False

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            if seed == 1:
                time.sleep(0.3)  # still on its way
            return super().reset(seed=seed, options=options)

    def make() -> Door:
        made.append(Slow())
        return made[-1]

    class Fails(ScriptedEngine):
        def session(self, key: int) -> Any:
            if what == "session":
                raise MemoryError("no room for another session")
            session = super().session(key)
            if what == "sample":
                session.fork = lambda key: Failing(self)  # type: ignore[method-assign]
            return session

    class Failing(ScriptedSession):
        async def sample(self, params: SamplingParams) -> Sampled:
            raise MemoryError("no room for another session")

    def told(_: Trajectory) -> None:
        raise MemoryError("no room for another session")

    limits = Limits(max_turns=4, max_actions=4, max_context=4000)
    # Threads that earlier tests have left behind may end at any time, so it is not their number that is looked at.
    before = set(threading.enumerate())
    rollout = Rollout(make, Fails(renderer, OPEN), renderer, BARE, limits, toolkit=Toolkit([source]))
    with pytest.raises(MemoryError, match="no room"):
        rollout.play([Task(seed) for seed in range(4)], 2, on_episode=told if what == "told" else None)
    rollout.close()
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before, "no environment's thread waits for ever"
    assert all(env.closed for env in made)
    assert source.open_now == 0


def test_a_source_that_cannot_open_fails_its_episodes(play: Any) -> None:
    class Empty(ToolSource):
        fast = True

        def open(self) -> list[Tool]:
            raise RuntimeError("no room")

    (group,) = play(OPEN, kit=Toolkit([Empty()]))
    assert group.trajectories[0].stop_reason == StopReason.ERROR
    assert "no room" in group.trajectories[0].error


def test_figures_by_hand() -> None:
    def episode(
        success: bool, calls: dict[str, int], failures: dict[str, int], stop: Any = StopReason.TERMINATED
    ) -> Any:
        counters = {f"tool_calls/{n}": float(c) for n, c in calls.items()}
        counters |= {f"tool_failures/{n}": float(c) for n, c in failures.items()}
        told = [ToolCall(n, cost=0.5) for n, count in calls.items() for _ in range(count)]
        return Trajectory("e", 0, turns=[Turn("o", calls=told)], success=success, counters=counters, stop_reason=stop)

    episodes = [
        episode(True, {"a": 3, "b": 0}, {"a": 1}),
        episode(False, {"a": 1, "b": 0}, {"a": 1}),
        episode(True, {"a": 0, "b": 0}, {}),
        episode(False, {"a": 0}, {}),
        episode(False, {"a": 1, "b": 0}, {}, StopReason.ERROR),
        Trajectory("other", 0, success=True),
    ]
    figures = tool_metrics(episodes, "x")
    assert figures == {
        "x/tools/a/calls": 1.0, "x/tools/a/failures": 0.4, "x/tools/a/used": 0.6, "x/tools/a/success_with": 0.5,
        "x/tools/a/success_without": 0.5, "x/tools/b/calls": 0.0, "x/tools/b/used": 0.0,
        "x/tools/b/success_without": 2 / 3, "x/tools/unknown": 0.0, "x/tools/refused": 0.0, "x/tools/surplus": 0.0,
        "x/tools/calls": 1.0, "x/tools/cost": 0.5,
    }  # fmt: skip
    assert tool_metrics(episodes[-1:]) == {}
