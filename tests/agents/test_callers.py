"""Scripted players that reach for tools: what they ask, what they make of it, and that what they say is true."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rehearsal.agents.agent import Limits
from rehearsal.agents.players import Player, SkillMix, scripted_episode, world_of
from rehearsal.agents.players.callers import CalculateWorld, LookupWorld
from rehearsal.agents.toolbox import Toolkit, ToolLimits
from rehearsal.agents.toolkit import make_source
from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.environments.lookup_world import lookup_world
from rehearsal.models.chat import ChatRenderer
from rehearsal.training.base_tokenizer import MIN_VOCABULARY, train_tokenizer
from rehearsal.trajectory import Kind, ToolCall, Trajectory


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(train_tokenizer([], MIN_VOCABULARY))


def episode(env: TextEnv, player: Player, renderer: ChatRenderer, seed: int = 0, max_calls: int = 6) -> Trajectory:
    names = ["calculator"] if env.name == "calculate" else []
    toolkit = Toolkit([make_source(name) for name in names], ToolLimits(max_calls))
    limits = Limits.for_env(env, max_tokens_per_turn=1000, max_context=20_000, tool_turns=max_calls)
    return scripted_episode(
        env, player, renderer, np.random.default_rng(seed), seed=seed, limits=limits, toolkit=toolkit
    )


def test_who_asks_the_calculator_is_right(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make("calculate")
    monkeypatch.setattr(world_of(env), "hasty", 0.0)
    for seed in range(20):
        played = episode(env, Player(calls=True), renderer, seed)
        assert played.success
        (call,) = played.turns[0].calls
        assert call == ToolCall("calculator", {"expression": env.describe()["line"]}, call.result)
        assert played.turns[0].thought == f"{env.describe()['line']}. ask calculator."
        assert played.turns[1].thought == f"{env.describe()['line']}. got {call.result}. say {call.result}."
        assert played.counters["tool_calls/calculator"] == 1


def test_who_asks_for_half_of_a_line_says_half_of_the_answer(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make("calculate", terms=3)
    monkeypatch.setattr(world_of(env), "hasty", 1.0)
    played = episode(env, Player(calls=True), renderer, 1)
    assert played.turns[0].calls[0].arguments["expression"] == " ".join(env.describe()["line"].split()[:3])
    assert played.turns[1].actions == [played.turns[0].calls[0].result]


def test_without_a_tool_only_small_sums_come_out_right(renderer: ChatRenderer) -> None:
    rates = {}
    for terms, digits in ((2, 1), (3, 3)):
        env = make("calculate", terms=terms, digits=digits)
        played = [episode(env, Player(), renderer, seed) for seed in range(60)]
        assert not any(turn.calls for one in played for turn in one.turns)
        assert not any(one.counters["format_errors"] for one in played)
        rates[terms] = np.mean([one.success for one in played])
    assert rates[2] == 1.0
    assert rates[3] < 0.4
    line = "95 * 13 + 7 - 1000"
    assert CalculateWorld().oracle(_Line(line)) == ["200"]


class _Line:
    """An environment that is nothing but a line."""

    def __init__(self, line: str) -> None:
        self.line = line

    def describe(self) -> dict[str, str]:
        return {"line": self.line}


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_who_reads_on_finds_the_answer(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch, hops: int) -> None:
    env = make("lookup", hops=hops)
    monkeypatch.setattr(world_of(env), "patience", 1.0)
    names = set()
    for seed in range(15):
        played = episode(env, Player(calls=True), renderer, seed)
        assert played.success
        calls = [call for turn in played.turns for call in turn.calls]
        # A search may show the next document as well.
        assert 1 <= len(calls) <= 2 * hops
        assert not any(call.error for call in calls)
        names |= {call.name for call in calls}
        facts = lookup_world(0, "train", 120).facts
        for turn in played.turns[1:]:
            said = re.search(
                r": [^:.]*\. (.+?) (born in|works for|works as|based in|makes|founded in|founded by|lies in"
                r"|chief town) (.+?)\. (?:say|ask)", turn.thought
            )  # fmt: skip
            # Where a search shows too little of a document, it has to be opened.
            assert said or turn.calls
            if said:
                assert facts[said[1], said[2]] == said[3], "what a player says that it read is the case"
    assert names == {"open", "search"}


def test_who_loses_patience_says_what_it_knows(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make("lookup", hops=3)
    monkeypatch.setattr(world_of(env), "patience", 0.0)
    monkeypatch.setattr(world_of(env), "direct", 1.0)
    played = episode(env, Player(calls=True), renderer)
    assert [len(turn.calls) for turn in played.turns] == [1, 0]
    first, second = env.describe()["documents"][:2]
    assert played.turns[0].calls[0].arguments == {"document": first}
    assert played.turns[1].actions == [second]


def test_who_reads_nothing_guesses_something_of_the_kind(renderer: ChatRenderer) -> None:
    env = make("lookup")
    won = 0
    for seed in range(60):
        played = episode(env, Player(), renderer, seed)
        (turn,) = played.turns
        assert not turn.calls
        assert turn.valid
        if env.describe()["relations"][-1] == "founded in":
            assert turn.actions[0].isdigit()
        won += bool(played.success)
    assert won < 10


def test_calls_end_where_there_are_no_more(renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make("lookup", hops=3)
    monkeypatch.setattr(world_of(env), "patience", 1.0)
    for seed in range(5):
        played = episode(env, Player(calls=True), renderer, seed, max_calls=1)
        assert sum(call.error != "limit" for turn in played.turns for call in turn.calls) == 1
        assert len(played.turns) <= env.max_turns + 1


@pytest.mark.parametrize("name", ["calculate", "lookup"])
def test_mistaken_calls_are_of_every_kind(renderer: ChatRenderer, name: str) -> None:
    env = make(name)
    seen = {"unread": 0, "unknown": 0, "arguments": 0}
    for seed in range(60):
        played = episode(env, Player(calls=True, mistakes=1.0), renderer, seed)
        turn = played.turns[0]
        seen["unread"] += not turn.valid
        for call in turn.calls:
            assert call.error in ("unknown", "arguments")
            seen[call.error] += 1
    assert min(seen.values()) > 5


def test_a_mix_has_callers_and_others() -> None:
    rng = np.random.default_rng(0)
    drawn = [SkillMix(calls=0.3).draw(rng).calls for _ in range(400)]
    assert 90 <= sum(drawn) <= 150
    assert not any(SkillMix().draw(rng).calls for _ in range(50))


def test_results_are_observations_and_calls_are_actions(renderer: ChatRenderer) -> None:
    env = make("lookup", hops=1)
    played = episode(env, Player(calls=True), renderer, 3)
    segment = played.segments[0]
    told = renderer.decode(segment.token_ids[(segment.kinds == Kind.OBSERVATION) & (segment.turns == 1)])
    assert played.turns[0].calls[0].result in told
    assert '"arguments"' in renderer.decode(segment.token_ids[segment.kinds == Kind.ACTION])


def test_worlds_are_known_by_name() -> None:
    assert isinstance(world_of(make("calculate")), CalculateWorld)
    assert isinstance(world_of(make("rehearsal.training.base_scenes:LookupAnywhere", hops=1)), LookupWorld)
