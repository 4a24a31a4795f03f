"""Before any reward: branches are what the environment says, reflections tell nothing they should not, and it helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from rehearsal.agents.agent import Agent, Limits, check_reset, play_actions
from rehearsal.agents.protocol import Protocol
from rehearsal.algorithms.presets import preset
from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.environments.frozenlake import FrozenLake
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import Sampled
from rehearsal.models.adapters import (
    POLICY,
    WORLD,
    AdapterSettings,
    active_names,
    adapter_names,
    adapter_parameters,
    add_adapters,
)
from rehearsal.rollout import Rollout, Task
from rehearsal.training.branches import Branch, Experience, State, any_legal, collect_branches
from rehearsal.training.early_experience import EarlySettings, early_experience, imitation_situations
from rehearsal.training.learner import Learner
from rehearsal.training.loop import Trainer
from rehearsal.training.options import TrainingOptions
from rehearsal.training.playing import make_rollout
from rehearsal.training.recipe import Recipe
from rehearsal.training.reflection import TURNED_DOWN, question, reflect, thought_of, turned_down
from rehearsal.training.sequences import collect_situations
from rehearsal.training.world import WORLD_MODES, WorldMode, world_model
from rehearsal.trajectory import Kind, SampleStop

TASKS = [Task(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def rollout_of(renderer: Any) -> Callable[..., Rollout]:
    """Environments and format without an engine, for proposers."""

    def build(name: str | Callable[[], TextEnv] = "frozenlake", thinking: bool = False, **params: Any) -> Rollout:
        maker = (lambda: make(name, **params)) if isinstance(name, str) else name
        limits = Limits.for_env(maker(), max_tokens_per_turn=300, max_context=4000)
        return Rollout(maker, cast(Any, None), renderer, Protocol(thinking=thinking), limits)

    return build


@pytest.fixture(scope="module")
def lakes(rollout_of: Callable[..., Rollout]) -> Experience:
    return collect_branches(rollout_of(size=3), TASKS, proposer=any_legal)


def told_again(env: TextEnv, experience: Experience, branch: Branch) -> tuple[str, float]:
    """What a fresh environment says to the actions of a branch, after those of the expert before it."""
    (states,) = [states for states in experience.episodes if branch.state in states]
    env.reset(seed=branch.state.task.seed, options={"split": branch.state.task.split})
    for state in states[: branch.state.turn]:
        for action in state.actions:
            env.step(action)
    rewards = []
    observation = ""
    for action in branch.actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return observation, sum(rewards)


# Branches


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("name", "params"), [("frozenlake", {"size": 3}), ("sokoban", {}), ("helpdesk", {}), ("countdown", {})]
)
def test_the_environment_itself_agrees(
    name: str, params: dict[str, Any], thinking: bool, rollout_of: Callable[..., Rollout], renderer: Any
) -> None:
    rollout = rollout_of(name, thinking, **params)
    proposer = any_legal if name != "countdown" else lambda env, count, rng: ["1 + 1", "2 + 2", "nonsense"]
    found = collect_branches(rollout, TASKS[:4], proposer=proposer, error_share=1.0)
    assert found.figures["expert/success"] == 1.0
    for branch in found.branches:
        text = renderer.decode(branch.answer)
        joined = " || ".join(branch.actions)
        assert text == f"{'<think></think>' if thinking else ''}<answer>{joined}</answer><|im_end|>"
        assert renderer.decode(branch.context).endswith("<|im_start|>assistant\n")
        if branch.refused:
            assert "is not a legal action" in branch.observation and branch.situation() is None
            continue
        observation, reward = told_again(make(name, **params), found, branch)
        assert branch.reward == pytest.approx(reward)
        # A help desk says the same in other words, by chance.
        assert branch.observation == observation or (name == "helpdesk" and not branch.expert)
        # The targets are the environment's words and nothing else.
        situation = branch.situation()
        assert situation is not None
        assert renderer.decode(situation.token_ids[situation.first :]) == branch.observation
        assert situation.environment == name
        # For a placebo: who says it, and what it means, where that is told apart from the words.
        assert bool(situation.meaning) == (name == "helpdesk")
        assert branch.observation.startswith(situation.speaker)


def test_a_branch_is_in_the_tokens_of_an_episode(rollout_of: Callable[..., Rollout], renderer: Any) -> None:
    """An agent that plays what an expert did, and then what was tried out, sees just these tokens."""
    rollout = rollout_of(size=3)
    found = collect_branches(rollout, TASKS[:3], proposer=any_legal)
    for branch in found.branches:
        env = make("frozenlake", size=3)
        agent = Agent(renderer, rollout.protocol, rollout.limits, keep_ending=True)
        observation, _ = check_reset(env, env.reset(seed=branch.state.task.seed, options={"split": "train"}))
        agent.opening(env.instructions, observation, "", env)
        (states,) = [states for states in found.episodes if branch.state in states]
        mine = {b.state: b for b in found.branches if b.expert}
        for answer in [*(mine[state].answer for state in states[: branch.state.turn]), branch.answer]:
            turn = agent.read(answer, np.zeros(len(answer), np.float32), SampleStop.END)
            agent.next_turn(play_actions(env, turn, agent.protocol, agent.actions_left))
        segment = agent.transcript.segment()
        situation = branch.situation()
        assert situation is not None
        length = len(situation.token_ids)
        assert np.array_equal(segment.token_ids[:length], situation.token_ids)
        assert (segment.kinds[situation.first : length] == Kind.OBSERVATION).all()
        assert not (segment.kinds[length:] == Kind.OBSERVATION).any()


def test_each_state_has_other_actions_than_the_experts(lakes: Experience) -> None:
    assert any(len(states) > 1 for states in lakes.episodes)
    for state, branches in lakes.by_state().items():
        assert [branch.expert for branch in branches] == [True] + [False] * (len(branches) - 1)
        assert branches[0].actions == state.actions
        assert len(branches) == 4
        assert len({branch.actions for branch in branches}) == 4
    assert lakes.figures["branches/states"] == sum(map(len, lakes.episodes))
    assert lakes.figures["branches/alternatives"] == 3 * lakes.figures["branches/states"]


def test_the_expert_takes_as_few_actions_as_its_turns_allow(rollout_of: Callable[..., Rollout]) -> None:
    rollout = rollout_of(size=6)
    rollout.all_limits = [replace(rollout.limits, max_turns=3)]
    found = collect_branches(rollout, [Task(seed) for seed in range(20)], alternatives=0)
    assert {len(state.actions) for states in found.episodes for state in states} == {1, 2}
    for states in found.episodes:
        total = sum(len(state.actions) for state in states)
        assert total > 6 or len(states) <= 3
        assert total > 3 or all(len(state.actions) == 1 for state in states)


def contents(experience: Experience) -> list[tuple[Any, ...]]:
    return [
        (b.context.tobytes(), b.answer.tobytes(), b.told.tobytes(), b.observation, b.reward, b.expert, b.refused)
        for b in experience.branches
    ]


def test_the_policy_itself_proposes(small: Callable[..., Recipe], taught_policy: Any) -> None:
    rollout = make_rollout(small(), taught_policy)
    found = collect_branches(rollout, TASKS, alternatives=2, draws=8)
    others = [branch for branch in found.branches if not branch.expert]
    assert len(others) > len(found.by_state())
    for state, branches in found.by_state().items():
        meant = [tuple(action.casefold() for action in branch.actions) for branch in branches]
        assert len(set(meant)) == len(meant)
        assert branches[0].actions == state.actions
    # One seed fixes them, whoever shares the batch; another seed draws others.
    assert contents(collect_branches(rollout, TASKS, alternatives=2, draws=8)) == contents(found)
    alone = collect_branches(rollout, TASKS[:1], alternatives=2, draws=8)
    assert contents(alone) == contents(found)[: len(alone.branches)]
    assert contents(collect_branches(rollout, TASKS, alternatives=2, draws=8, seed=1)) != contents(found)
    rollout.close()


def test_every_branch_has_luck_of_its_own(rollout_of: Callable[..., Rollout]) -> None:
    rollout = rollout_of(size=4, slip=0.6)
    several = [collect_branches(rollout, TASKS, proposer=any_legal, seed=seed) for seed in range(4)]
    assert contents(several[0]) == contents(collect_branches(rollout, TASKS, proposer=any_legal, seed=0))
    assert [len(states) for states in several[0].episodes] == [len(states) for states in several[1].episodes]
    outcomes: dict[tuple[Any, ...], set[str]] = {}
    for found in several:
        for branch in found.branches:
            outcomes.setdefault((*branch.state.key, branch.actions, branch.expert), set()).add(branch.observation)
    experts = [told for key, told in outcomes.items() if key[-1]]
    others = [told for key, told in outcomes.items() if not key[-1]]
    # The expert's own dice are those of the episode, whatever is tried out beside it.
    assert all(len(told) == 1 for told in experts)
    assert any(len(told) > 1 for told in others)


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_what_is_refused_is_capped(share: float, most: float, rollout_of: Callable[..., Rollout]) -> None:
    def proposer(env: TextEnv, count: int, rng: np.random.Generator) -> list[str]:
        return ["Jump", "Fly", *any_legal(env, 1, rng)[:2]]

    found = collect_branches(rollout_of(size=3), TASKS, proposer=proposer, error_share=share)
    others = [branch for branch in found.branches if not branch.expert]
    refused = [branch for branch in others if branch.refused]
    assert len(refused) <= most * len(others) + 1e-9
    assert found.figures["branches/refused"] == len(refused)
    total = len(refused) + found.figures["branches/refused_dropped"]
    assert total > 0 and (share == 0.0 or refused)
    if share == 0.25:
        assert len(refused) == math.floor(len([b for b in others if not b.refused]) / 3)
    # They are what is left where there is nothing better: of four proposals two could be taken, or one.
    assert all(sum(not b.refused for b in branches) >= 2 for branches in found.by_state().values())
    for branch in refused:
        assert branch.actions in (("Jump",), ("Fly",))
        assert f'"{branch.actions[0]}" is not a legal action; legal: Left' in branch.observation
        assert branch.reward == 0.0 and not branch.over and branch.situation() is None


def test_a_context_that_is_too_short_is_told(rollout_of: Callable[..., Rollout]) -> None:
    rollout = rollout_of(size=4)
    whole = collect_branches(rollout, TASKS, alternatives=0)
    assert whole.figures["expert/cut"] == 0.0
    longest = max(len(state.context) for states in whole.episodes for state in states)
    rollout.all_limits = [replace(rollout.limits, max_context=longest)]
    short = collect_branches(rollout, TASKS, alternatives=0)
    assert short.figures["expert/cut"] > 0 and short.figures["expert/success"] < 1.0


def test_answers_that_cannot_be_read(
    small: Callable[..., Recipe], taught_policy: Any, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]
) -> None:
    stranger = replace(taught_policy, model=tiny_qwen3(len(base_tokenizer), seed=1))
    rollout = make_rollout(small(agent__max_context=500), stranger)
    found = collect_branches(rollout, TASKS, error_share=1.0)
    refused = [branch for branch in found.branches if not branch.expert]
    assert refused and all(branch.refused and not branch.actions for branch in refused)
    assert all("Your last answer" in branch.observation for branch in refused if branch.state.turn < 2)
    assert len(found.situations()) == len(found.by_state())
    assert collect_branches(rollout, TASKS).figures["branches/alternatives"] == 0
    rollout.close()


# World modelling


@pytest.mark.parametrize("mode", [mode for mode in WORLD_MODES if mode != "policy_only"])
def test_branches_teach_what_the_world_mode_names(
    mode: WorldMode, lakes: Experience, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]
) -> None:
    model = add_adapters(tiny_qwen3(len(base_tokenizer), seed=5), AdapterSettings(4, 4))
    before = {name: [p.detach().clone() for p in adapter_parameters(model, name).values()] for name in (POLICY, WORLD)}
    world = world_model(mode, adapter_names(model), coefficient=1.0)
    options = TrainingOptions(learning_rate=1e-2, steps=20)
    learner = Learner(model, preset("grpo"), options, world=world)
    situations = lakes.situations()
    losses = [
        learner.step([], step, situations={"branches": situations})["branches/prediction_loss"] for step in range(10)
    ]
    assert losses[-1] < losses[0] - 0.1
    moved = {
        name: not all(torch.equal(a, b) for a, b in zip(old, adapter_parameters(model, name).values(), strict=True))
        for name, old in before.items()
    }
    own = POLICY if mode == "shared" else WORLD
    assert moved == {name: name == own for name in (POLICY, WORLD)}


def test_a_loss_on_branches_is_that_of_their_words(
    lakes: Experience, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]
) -> None:
    model = tiny_qwen3(len(base_tokenizer), seed=5)
    situations = lakes.situations()
    nats, count = 0.0, 0
    with torch.no_grad():
        for one in situations:
            ids = torch.from_numpy(one.token_ids.astype(np.int64))
            logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            nats -= float(logprobs[one.first - 1 :].sum())
            count += len(ids) - one.first
    learner = Learner(model, preset("grpo"), TrainingOptions(), world=world_model("shared", []))
    figures = learner.step([], 0, situations={"branches": situations})
    assert figures["branches/prediction_loss"] == pytest.approx(nats / count, rel=1e-4)
    assert figures["policy/updates"] == 1.0


# Imitation


@pytest.mark.parametrize("thinking", [False, True])
def test_targets_are_the_experts_answers(thinking: bool, rollout_of: Callable[..., Rollout], renderer: Any) -> None:
    rollout = rollout_of(thinking=thinking, size=3)
    found = collect_branches(rollout, TASKS, alternatives=0)
    states = [state for states in found.episodes for state in states]
    thoughts = {state: f"Thought {number}." for number, state in enumerate(states) if number % 2} if thinking else {}
    situations = imitation_situations(found, renderer, rollout.protocol, thoughts)
    assert len(situations) == len(states)
    for state, one in zip(states, situations, strict=True):
        thought = f"<think>{thoughts.get(state, '')}</think>" if thinking else ""
        answer = f"{thought}<answer>{' || '.join(state.actions)}</answer><|im_end|>"
        assert renderer.decode(one.token_ids[one.first :]) == answer
        segment, targets = collect_situations([one]).segments[0], collect_situations([one]).targets[0]
        assert renderer.decode(segment.token_ids[targets]) == answer
        if state.turn == 0:
            assert np.array_equal(one.token_ids[: one.first], state.context)


def test_earlier_thoughts_stand_in_the_context_as_in_play(rollout_of: Callable[..., Rollout], renderer: Any) -> None:
    rollout = rollout_of("sokoban", thinking=True)
    found = collect_branches(rollout, TASKS[:3], alternatives=0)
    for states in found.episodes:
        thoughts = {state: f"Step {state.turn} goes {state.actions[0]}." for state in states}
        situations = imitation_situations(Experience([states]), renderer, rollout.protocol, thoughts)
        env = make("sokoban")
        agent = Agent(renderer, rollout.protocol, rollout.limits)
        observation, _ = check_reset(env, env.reset(seed=states[0].task.seed, options={"split": "train"}))
        agent.opening(env.instructions, observation, "", env)
        for one in situations:
            assert np.array_equal(agent.transcript.segment().token_ids, one.token_ids[: one.first])
            answer = one.token_ids[one.first :]
            turn = agent.read(answer, np.zeros(len(answer), np.float32), SampleStop.END)
            agent.next_turn(play_actions(env, turn, agent.protocol, agent.actions_left))
        assert agent.success
        short = imitation_situations(
            Experience([states]), renderer, rollout.protocol, thoughts, max_context=len(situations[0].token_ids)
        )
        assert len(short) == 1


def test_an_empty_thought_need_not_be_learnt(rollout_of: Callable[..., Rollout], renderer: Any) -> None:
    rollout = rollout_of(thinking=True, size=3)
    found = collect_branches(rollout, TASKS, alternatives=0)
    first = found.episodes[0][0]
    situations = imitation_situations(found, renderer, rollout.protocol, {first: "Hm."}, empty_thoughts=False)
    texts = [renderer.decode(one.token_ids[one.first :]) for one in situations]
    assert texts[0] == f"<think>Hm.</think><answer>{first.actions[0]}</answer><|im_end|>"
    assert all(text.startswith("<answer>") for text in texts[1:])


# Reflection

RULES = "Walk through the house to the kitchen. Actions: go north, go south, open door."
NOW = "You are in the hall.\nA door is to the north."
NORTH = "You are in the kitchen.\nA kettle is on the stove. You have won."
SOUTH = "You are in the cellar.\nIt is dark."


@pytest.fixture
def house() -> tuple[State, list[Branch]]:
    nothing = np.empty(0, np.int32)
    state = State(Task(0), 0, "house", "", RULES, NOW, (), nothing, nothing, ("go north",))
    branches = [
        Branch(state, nothing, nothing, 0, ("go north",), NORTH, 1.0, expert=True, over=True),
        Branch(state, nothing, nothing, 0, ("go south",), SOUTH, 0.0),
        Branch(state, nothing, nothing, 0, ("fly",), '"fly" is not a legal action.', 0.0, refused=True),
    ]
    return state, branches


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The door to the north should lead to the kitchen, so I go north and not down.", ""),
        ("You are in the hall. A door is to the north. I expect the kitchen behind it.", ""),
        ("A cellar may be south; alternatively I could look for a kettle first.", ""),
        # Labels that leak, about 16% of what was published.
        ("The expert action is go north, which makes sense because of the door.", "label"),
        ("Unlike the alternatives, going north leads to the kitchen.", "label"),
        ("The other option I have is to go south.", "label"),
        ("The ORACLE wants me to go north here, so I go.", "label"),
        ("Action 1 would be less helpful because it leads away.", "label"),
        ("The chosen action brings me closer to the kitchen.", "label"),
        ("As told, I go north through the door to the kitchen.", "label"),
        ("The expected outcome of going north is the better one.", "label"),
        # The future, about a quarter of what was published where an action moves the agent.
        ("I go north, where a kettle is on the stove.", "future"),
        ("I go north: A kettle is on the stove. You have won. How good.", "future"),
        ("Not south, as I see that it is dark.", "future"),
        ('I will not fly, as "fly" is not a legal action.', "future"),
        ("North.", "short"),
        ("I go north through the door. " * 40, "long"),
        ("<think>I go north through the door.", "tags"),
        ("I go north</think><answer>go north</answer>", "tags"),
        ("I go north through the door.<|im_end|> And so on.", "tags"),
        # 3% of what was published says everything twice.
        ("I want the kitchen, so I go north.I want the kitchen, so I go north.", "doubled"),
        ("I want the kitchen, so I go north.\n\nI want the kitchen, so I go  north.", "doubled"),
    ],
)
def test_what_gives_itself_away_is_turned_down(
    text: str, reason: str, house: tuple[State, list[Branch]], renderer: Any
) -> None:
    assert turned_down(text, *house, renderer) == reason
    assert reason == "" or reason in TURNED_DOWN


def test_words_of_the_environment_give_nothing_away(house: tuple[State, list[Branch]], renderer: Any) -> None:
    state, branches = house
    text = "The options are blue and red; I want the red one."
    assert turned_down(text, state, branches, renderer) == "label"
    shop = replace(state, observation="A shirt.\nOptions: blue, red")
    assert turned_down(text, shop, branches, renderer) == ""
    dark = replace(state, observation=f"{NOW}\nIt is dark.")
    assert turned_down("It is dark. I go north to the kitchen.", dark, branches, renderer) == ""


@pytest.mark.parametrize(
    ("text", "opened", "thought"),
    [
        (" I go north. ", False, "I go north."),
        ("<think>Let me see.</think> I go north.", False, "I go north."),
        ("<think>I go north.</think><answer>go north</answer>", False, "I go north."),
        ("<think>I go north.", False, "I go north."),
        ("Let me see.</think>\nI go north.", True, "I go north."),
        ("I go north.</think><answer>go north</answer>", True, "I go north."),
        ("", False, ""),
    ],
)
def test_the_reflection_in_an_answer(text: str, opened: bool, thought: str) -> None:
    assert thought_of(text, opened) == thought


def test_the_question_names_no_label_and_tells_all_that_came(house: tuple[State, list[Branch]]) -> None:
    state, branches = house
    state = replace(state, past=(("You are at the gate.", ("open door",)),))
    asked = set()
    for seed in range(20):
        pieces = question(state, branches, Protocol(), np.random.default_rng(seed))
        text = "".join(piece.text for piece in pieces)
        for part in (NOW, NORTH, SOUTH, "is not a legal action", "gate", "> open door", "this: go north."):
            assert part in text
        for word in ("expert", "alternative", "option", "oracle", "reward", "best", "correct", "1"):
            assert word not in text.casefold()
        asked.add(text)
    assert len(asked) == 6  # every order of three


class _Writer:
    """An engine that answers by a rule, from the text of what it is shown."""

    max_context = 4000

    def __init__(self, renderer: Any, says: Callable[[str], tuple[str, SampleStop]]) -> None:
        self.renderer, self.says = renderer, says

    def session(self, key: int) -> _Session:
        return _Session(self)


class _Session:
    def __init__(self, writer: _Writer) -> None:
        self.writer = writer

    def extend(self, token_ids: np.ndarray) -> None:
        self.shown = self.writer.renderer.decode(token_ids)

    async def sample(self, params: SamplingParams) -> Sampled:
        text, stop = self.writer.says(self.shown)
        ids = self.writer.renderer.encode(text + ("<|im_end|>" if stop == SampleStop.END else ""))
        return Sampled(ids, np.zeros(len(ids), np.float32), stop)

    def close(self) -> None:
        pass


def test_reflections_become_thoughts_and_every_reason_is_counted(
    rollout_of: Callable[..., Rollout], renderer: Any
) -> None:
    rollout = rollout_of(thinking=True, size=3)
    found = collect_branches(rollout, [Task(seed) for seed in range(12)], proposer=any_legal)
    numbers = iter(range(1000))

    def says(shown: str) -> tuple[str, SampleStop]:
        number = next(numbers)
        action = shown.rpartition("do this: ")[2].partition(".")[0]
        kinds = [
            (f"Case {number}: the goal is that way, so {action}.", SampleStop.END),
            ("The expert goes that way, and so do I.", SampleStop.END),
            ("It is always good to go to the goal.", SampleStop.END),
            ("I go on and on and on and on", SampleStop.LENGTH),
        ]
        return kinds[number % 4]

    rollout.engine = cast(Any, _Writer(renderer, says))
    seen: list[tuple[str, str]] = []
    thoughts, figures = reflect(rollout, found, on_reflection=lambda state, text, reason: seen.append((text, reason)))
    asked = len(found.by_state())
    assert asked == figures["reflections/asked"] == len(seen)
    assert figures["reflections/kept"] == len(thoughts) == sum(not reason for _, reason in seen)
    assert asked == figures["reflections/kept"] + sum(figures[f"reflections/{reason}"] for reason in TURNED_DOWN)
    for reason in ("label", "duplicate", "cut"):
        assert figures[f"reflections/{reason}"] > 0
    assert all(f"so {' || '.join(s.actions)}." in text or text.startswith("It is") for s, text in thoughts.items())
    situations = imitation_situations(found, renderer, rollout.protocol, thoughts)
    texts = [renderer.decode(one.token_ids[one.first :]) for one in situations]
    assert sum("<think></think>" in text for text in texts) == asked - len(thoughts)
    assert not any("expert" in text for text in texts)
    # A thought must leave room for the answer, and a question for a thought.
    rollout.all_limits = [replace(rollout.limits, max_tokens_per_turn=20)]
    assert reflect(rollout, found)[1]["reflections/long"] > 0
    rollout.engine.max_context = 100
    assert reflect(rollout, found)[1]["reflections/no_room"] == asked
    alone = replace(found, branches=[branch for branch in found.branches if branch.expert])
    assert reflect(rollout, alone) == ({}, dict.fromkeys(figures, 0.0))


# Bad input


class NoOracle(FrozenLake):
    def oracle(self) -> Any:
        return None


class OneOfAKind(FrozenLake):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is only one")


class Mirror(FrozenLake):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Hopeless(FrozenLake):
    def oracle(self) -> Any:
        return []


class Mistaken(FrozenLake):
    def oracle(self) -> Any:
        return ["Jump"]


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        (NoOracle, RecipeError, r"has no expert, since its oracle\(\) is None"),
        (OneOfAKind, RecipeError, r"cannot be copied \(copy.deepcopy raised TypeError\)"),
        (Mirror, RecipeError, "cannot be copied .*the same one back"),
        (Hopeless, RecipeError, "found nothing to do"),
        (Mistaken, EnvironmentFault, "plans an action that it does not take: Jump"),
    ],
)
def test_environments_that_will_not_do(
    kind: type[FrozenLake], error: type[Exception], told: str, rollout_of: Callable[..., Rollout]
) -> None:
    with pytest.raises(error, match=told) as caught:
        collect_branches(rollout_of(kind), TASKS, proposer=any_legal)
    assert str(caught.value).count("\n") == 0


def test_settings_that_will_not_do(
    rollout_of: Callable[..., Rollout], small: Callable[..., Recipe], taught_policy: Any
) -> None:
    for name, value in (("episodes", 0), ("batch", 0), ("held_out", -1), ("longest", 5), ("learning_rate", 0.0)):
        changes: dict[str, Any] = {name: value}
        with pytest.raises(RecipeError, match=f"{name} of early experience must be"):
            EarlySettings(**changes)
    for changes in ({"alternatives": -1}, {"draws": 1}, {"error_share": 1.5}):
        with pytest.raises(RecipeError, match="error_share from 0 to 1"):
            collect_branches(rollout_of(), TASKS, **changes)
    with pytest.raises(RecipeError, match=r"agent\.thinking to true, or reflect to False"):
        early_experience(taught_policy, small())
    recipe = small(world__mode="world_only", adapters__world_rank=2, adapters__policy_rank=0)
    with pytest.raises(RecipeError, match=r"adapters\.policy_rank is 0"):
        early_experience(taught_policy, recipe, EarlySettings(reflect=False))


# All of it


SHORT = EarlySettings(episodes=120, alternatives=2, reflect=False, imitation_epochs=5, held_out=16, learning_rate=5e-3)


DUAL = {"world__mode": "dual", "adapters__policy_rank": 8, "adapters__world_rank": 8}


@pytest.mark.parametrize(
    ("changes", "rate"), [({}, 5e-3), ({**DUAL, "world__learning_rate_ratio": 0.2}, 1e-2)], ids=["all", "dual"]
)
def test_a_policy_learns_before_any_reward(
    changes: dict[str, Any], rate: float, small: Callable[..., Recipe], taught_policy: Any
) -> None:
    settings = replace(SHORT, learning_rate=rate)
    figures = early_experience(taught_policy, small(agent__max_context=400, **changes), settings)
    assert all(math.isfinite(value) for value in figures.values())
    # It began with any of four moves, in states that it never learns from.
    assert figures["before/action_nats"] == pytest.approx(math.log(4), abs=0.3)
    # Held-out lakes have holes and goals that were never seen. What a policy of this size copies it does not carry over
    # to them (the base does: examples/early_experience.py); how such a world answers it does.
    assert figures["imitation/loss_last"] < figures["imitation/loss_first"] - 0.3
    assert figures["after/world_nats"] < figures["before/world_nats"] - 1.0
    for name in ("world", "imitation"):
        assert figures[f"{name}/loss_last"] < figures[f"{name}/loss_first"]
        assert figures[f"{name}/steps"] > 0
    assert figures["world/examples"] > figures["imitation/examples"] == figures["branches/states"]
    assert figures["expert/success"] == 1.0 and figures["expert/cut"] == 0.0
    assert "reflections/asked" not in figures
    assert 0.0 <= figures["before/success"] <= 1.0 and figures["after/episodes"] == 4
    assert adapter_names(taught_policy.model) == ([POLICY, WORLD] if changes else [])


def test_one_seed_fixes_everything(small: Callable[..., Recipe], taught_folder: Any) -> None:
    from rehearsal.models.load import load_policy

    short = replace(SHORT, episodes=8, imitation_epochs=1, held_out=4)
    runs = [early_experience(load_policy(taught_folder, device="cpu"), small(seed=seed), short) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_with_thoughts_and_rewards_unread(small: Callable[..., Recipe], taught_policy: Any) -> None:
    """In a format that the policy never met: nothing that it writes stands, and imitation teaches the format."""
    recipe = small(agent__thinking=True, agent__max_tokens_per_turn=24, agent__max_context=512, evaluation__episodes=8)
    seen: list[str] = []
    settings = replace(
        SHORT, episodes=60, reflect=True, proposer=any_legal, shortest=1,
        on_reflection=lambda state, text, reason: seen.append(reason),
    )  # fmt: skip
    figures = early_experience(taught_policy, recipe, settings)
    assert figures["reflections/asked"] == figures["branches/states"] == len(seen)
    assert figures["reflections/kept"] == seen.count("")
    assert figures["reflections/asked"] == figures["reflections/kept"] + sum(
        figures[f"reflections/{reason}"] for reason in TURNED_DOWN
    )
    assert figures["imitation/loss_last"] < figures["imitation/loss_first"]
    assert figures["after/format_errors"] < figures["before/format_errors"] == 1.0


def test_each_stage_can_be_left_out(small: Callable[..., Recipe], taught_policy: Any) -> None:
    weights = [parameter.detach().clone() for parameter in taught_policy.model.parameters()]
    settings = replace(SHORT, episodes=3, world_epochs=0, imitation_epochs=0, held_out=0)
    figures = early_experience(taught_policy, small(evaluation__episodes=0), settings)
    assert figures["world/steps"] == figures["imitation/steps"] == 0.0
    assert not any(name.startswith(("before/", "after/")) for name in figures)
    assert all(torch.equal(a, b) for a, b in zip(weights, taught_policy.model.parameters(), strict=True))


@pytest.mark.parametrize(("stage", "own"), [("world", WORLD), ("imitation", POLICY)])
def test_each_stage_changes_its_own_adapter(
    stage: str, own: str, small: Callable[..., Recipe], taught_policy: Any
) -> None:
    epochs: dict[str, Any] = {f"{name}_epochs": int(name == stage) for name in ("world", "imitation")}
    settings = replace(SHORT, episodes=3, held_out=0, **epochs)
    early_experience(taught_policy, small(evaluation__episodes=0, **DUAL), settings)
    # The second factor of an adapter is zero until it is trained.
    for name in (POLICY, WORLD):
        parameters = adapter_parameters(taught_policy.model, name)
        assert any(bool(p.any()) for key, p in parameters.items() if "lora_B" in key) == (name == own)


@pytest.mark.parametrize("mode", ["dual", "policy_only"])
def test_a_policy_whose_world_adapter_was_kept_apart_learns_with_it(
    mode: str, small: Callable[..., Recipe], taught_policy: Any
) -> None:
    changes = {**DUAL, "world__mode": "inactive", "evaluation__episodes": 0}
    trainer = Trainer(small(**changes), policy=taught_policy)
    trainer.close()
    policy = trainer.policy
    assert policy is not None and active_names(policy.model) == (POLICY,)
    settings = replace(SHORT, episodes=3, held_out=0, imitation_epochs=0)
    figures = early_experience(policy, small(**{**changes, "world__mode": mode}), settings)
    assert active_names(policy.model) == (POLICY, WORLD)
    assert figures["world/steps"] > 0
    assert any(bool(p.any()) for key, p in adapter_parameters(policy.model, WORLD).items() if "lora_B" in key)


def test_several_environments(small: Callable[..., Recipe], taught_policy: Any) -> None:
    recipe = small(
        mixture=[{"name": "frozenlake", "params": {"size": 3}}, {"name": "bandit"}], evaluation__episodes=0,
        agent__max_context=400,
    )  # fmt: skip
    figures = early_experience(taught_policy, recipe, replace(SHORT, episodes=8, proposer=any_legal))
    assert figures["after/action_nats"] < figures["before/action_nats"]
    assert figures["expert/episodes"] == 8
