"""Scripted players: what they do, what they say, and that what they say of the world is true."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rehearsal.agents.agent import Limits
from rehearsal.agents.players import Player, SkillMix, World, scripted_episode, world_of
from rehearsal.agents.players.helpdesk import HelpdeskWorld
from rehearsal.agents.players.worlds import MOVES, imagined, moved, way
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import PREDICT_OPEN, hindsight
from rehearsal.environments import make
from rehearsal.environments.bandit import PAIRS
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError
from rehearsal.models.chat import ChatRenderer, base_template
from rehearsal.training.base_tokenizer import MIN_VOCABULARY, train_tokenizer
from rehearsal.trajectory import Kind, StopReason, Trajectory

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("frozenlake", {}),
    ("frozenlake", {"size": 5, "frozen": 0.7, "slip": 0.3, "view": "both"}),
    ("frozenlake", {"size": 3, "view": "coordinates"}),
    ("sokoban", {}),
    ("sokoban", {"size": 7, "boxes": 2, "view": "coordinates"}),
    ("bandit", {}),
    ("bandit", {"reversed": True}),
    ("countdown", {}),
    ("countdown", {"n_numbers": 4, "operations": "+-"}),
]


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(train_tokenizer([], MIN_VOCABULARY))


def episode(env: TextEnv, player: Player, renderer: ChatRenderer, seed: int = 0, **kwargs: Any) -> Trajectory:
    return scripted_episode(env, player, renderer, np.random.default_rng(seed), seed=seed, **kwargs)


@pytest.mark.parametrize(("name", "params"), [s for s in SETTINGS if not s[1].get("slip")])
def test_the_oracle_solves_every_task(renderer: ChatRenderer, name: str, params: dict[str, Any]) -> None:
    env = make(name, **params)
    limits = Limits.for_env(env, max_turns=12) if env.max_turns > 1 else None
    for seed in range(12):
        trajectory = episode(env, Player(), renderer, seed, limits=limits)
        assert trajectory.success is True
        assert trajectory.stop_reason == StopReason.TERMINATED


@pytest.mark.parametrize(("name", "params"), SETTINGS)
@pytest.mark.parametrize("player", [Player(epsilon=1.0, boldness=0.5), Player("blind"), Player(epsilon=0.5)])
def test_nobody_breaks_the_format_or_the_rules(
    renderer: ChatRenderer, name: str, params: dict[str, Any], player: Player
) -> None:
    env = make(name, **params)
    for seed in range(4):
        trajectory = episode(env, player, renderer, seed)
        assert not trajectory.failed
        assert all(turn.valid and turn.actions == turn.executed for turn in trajectory.turns[:-1])
        assert trajectory.turns[-1].valid
        assert not {"format_errors", "illegal_actions", "surplus_actions"} & {
            counter for counter, value in trajectory.counters.items() if value
        }


@pytest.mark.parametrize(("name", "params"), SETTINGS)
def test_what_a_thought_says_is_true(renderer: ChatRenderer, name: str, params: dict[str, Any]) -> None:
    """Each episode is played again, and each thought is held against what the environment says of itself."""
    env, again = make(name, **params), make(name, **params)
    checks = {"frozenlake": lake_is_true, "sokoban": sokoban_is_true, "bandit": bandit_is_true,
              "countdown": countdown_is_true}  # fmt: skip
    for seed in range(15):
        player = (Player(epsilon=1.0), Player(epsilon=0.5, boldness=0.5), Player("blind"), Player())[seed % 4]
        trajectory = episode(env, player, renderer, seed)
        again.reset(seed=seed, options={"split": "train"})
        for turn in trajectory.turns:
            checks[name](turn.thought, turn.actions, again.describe())
            for action in turn.executed:
                again.step(action)


def numbers_after(word: str, thought: str) -> tuple[int, int]:
    found = re.search(rf"\b{word} (\d+) (\d+)", thought)
    assert found is not None, thought
    return int(found[1]), int(found[2])


def displacement(words: str) -> tuple[int, int]:
    steps = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
    found = [(steps[word], int(count)) for word, count in re.findall(r"([a-z]+) (\d+)", words)]
    return sum(step[0] * count for step, count in found), sum(step[1] * count for step, count in found)


def lake_is_true(thought: str, actions: list[str], seen: dict[str, Any]) -> None:
    player, goal = numbers_after("me", thought), numbers_after("goal", thought)
    assert (player, goal) == (seen["player"], seen["goal"])
    assert displacement(thought.partition(":")[2]) == (goal[0] - player[0], goal[1] - player[1])
    told = re.search(r"hole ([a-z ]+)\.", thought)
    near = {move.lower() for move in MOVES if moved(player, move) in seen["holes"]}
    assert set(told[1].split() if told else ()) == near
    assert thought.endswith(f" go {' '.join(actions)}.")


def sokoban_is_true(thought: str, actions: list[str], seen: dict[str, Any]) -> None:
    assert numbers_after("me", thought) == seen["player"]
    box, target = numbers_after("box", thought), numbers_after("target", thought)
    assert box in seen["boxes"]
    assert box not in seen["targets"]
    assert target in seen["targets"]
    assert target not in seen["boxes"]
    facts = thought.partition(":")[2].partition(".")[0]
    assert displacement(facts.partition(",")[0]) == (target[0] - box[0], target[1] - box[1])
    height, width = seen["height"], seen["width"]
    border = {(r, c) for r in range(height) for c in range(width) if r in (0, height - 1) or c in (0, width - 1)}
    for what, cells in (("wall", border | set(seen["walls"])), ("box", set(seen["boxes"]))):
        told = re.search(rf", {what} ([a-z ]+)", facts)
        near = {move.lower() for move in MOVES if moved(seen["player"], move) in cells}
        assert set(told[1].split() if told else ()) == near
    pushed = re.search(r"push ([a-z]+) from (-?\d+) (-?\d+): ([a-z0-9 ]+)\. go (.*)\.$", thought)
    assert pushed is not None
    stand = (int(pushed[2]), int(pushed[3]))
    assert moved(stand, pushed[1].capitalize()) in seen["boxes"]
    assert displacement(pushed[4]) == (stand[0] - seen["player"][0], stand[1] - seen["player"][1])
    assert pushed[5].split() == actions


def bandit_is_true(thought: str, actions: list[str], seen: dict[str, Any]) -> None:
    steady = {pair[0] for pairs in PAIRS.values() for pair in pairs}
    told = re.findall(r"(\w+) (steady|risky)", thought)
    assert [arm for arm, _ in told] == seen["arms"]
    assert all((sound == "steady") == (arm in steady) for arm, sound in told)
    assert thought.endswith(f"pull {actions[0]}.")


def countdown_is_true(thought: str, actions: list[str], seen: dict[str, Any]) -> None:
    facts, _, tries = thought.removesuffix(".").partition(": ")
    assert facts == f"{' '.join(map(str, seen['numbers']))} for {seen['target']}"
    for attempt in tries.split("; "):
        steps, verdict = attempt.rsplit(" ", 1)
        result = None
        for step in steps.split(", "):
            left, right = step.split(" = ")
            assert re.fullmatch(r"\d+ [-+*/] \d+", left)
            result = eval(left)  # two numbers and a sign, as the line above made sure
            assert result == int(right)
        assert verdict == ("yes" if result == seen["target"] else "no")
    # The last try is the answer.
    assert result == eval(actions[0])
    assert sorted(map(int, re.findall(r"\d+", actions[0]))) == seen["numbers"]


def test_the_tokens_are_those_of_the_chat_template(renderer: ChatRenderer) -> None:
    env = make("frozenlake")
    trajectory = episode(env, Player(epsilon=1.0), renderer, 3)
    system = f"{env.instructions}\n{Protocol(max_actions_per_turn=2).format_instructions(env)}"
    messages = [{"role": "system", "content": system}]
    for turn in trajectory.turns:
        messages.append({"role": "user", "content": f"{turn.observation}\n{turn.notice}"})
        messages.append({"role": "assistant", "content": turn.response.removesuffix("<|im_end|>")})
    text = renderer.tokenizer.apply_chat_template(messages, tokenize=False)
    # After the last answer the template writes a line break, which nobody has read or sampled.
    assert renderer.decode(trajectory.segments[0].token_ids) == text.removesuffix("\n")


def test_answers_count_as_sampled_by_nobody(renderer: ChatRenderer) -> None:
    segment = episode(make("frozenlake"), Player(), renderer, 1).segments[0]
    end, close = renderer.single_token("<|im_end|>"), renderer.single_token("</think>")
    assert np.isnan(segment.logprobs).all()
    sampled = segment.token_ids[segment.sampled_mask]
    assert (segment.kinds[segment.sampled_mask][sampled == end] == Kind.ACTION).all()
    assert (sampled == end).sum() == segment.turns[-1] + 1
    assert (segment.kinds[segment.sampled_mask][sampled == close] == Kind.THOUGHT).all()


def test_an_episode_is_fixed_by_its_seeds(renderer: ChatRenderer) -> None:
    player = Player(epsilon=0.5, boldness=0.5, mistakes=0.3)
    first, second, other = (episode(make("sokoban"), player, renderer, seed) for seed in (7, 7, 8))
    assert first.segments[0].token_ids.tolist() == second.segments[0].token_ids.tolist()
    assert first.segments[0].token_ids.tolist() != other.segments[0].token_ids.tolist()


@pytest.mark.parametrize("name", ["frozenlake", "sokoban", "bandit", "countdown"])
@pytest.mark.parametrize("thinking", [True, False])
def test_mistakes_are_mistakes_and_are_told(renderer: ChatRenderer, name: str, thinking: bool) -> None:
    env = make(name)
    told = set()
    for seed in range(12):
        protocol = Protocol(thinking=thinking)
        trajectory = episode(env, Player(epsilon=1.0, boldness=0.3, mistakes=1.0), renderer, seed, protocol=protocol)
        for turn in trajectory.turns:
            # A foreign word behind an action that ended the episode was never looked at.
            unseen = turn is trajectory.turns[-1] and len(turn.executed) < len(turn.actions) and turn.valid
            assert unseen or (not turn.valid and turn.penalty < 0)
        for turn in trajectory.turns[1:]:
            told.add("illegal" if "is not a legal action" in turn.notice else turn.notice.split(".")[0])
    if env.max_turns > 1:
        assert "illegal" in told
        assert len(told) >= 3


def test_without_thinking_there_is_no_thought(renderer: ChatRenderer) -> None:
    trajectory = episode(make("frozenlake"), Player(), renderer, protocol=Protocol(thinking=False))
    assert not (trajectory.segments[0].kinds == Kind.THOUGHT).any()
    assert all("<think>" not in turn.response for turn in trajectory.turns)
    assert trajectory.success


def test_a_thought_that_the_template_opens_is_not_opened_twice() -> None:
    tokenizer = train_tokenizer([], MIN_VOCABULARY)
    head, prompt, tail = base_template().rpartition("'<|im_start|>assistant\\n'")
    tokenizer.chat_template = f"{head}'<|im_start|>assistant\\n<think>'{tail}"
    assert prompt
    renderer = ChatRenderer(tokenizer)
    assert renderer.opens_thought
    trajectory = episode(make("frozenlake"), Player(), renderer)
    assert trajectory.success
    assert all("<think>" not in turn.response and turn.thought.startswith("me ") for turn in trajectory.turns)


def test_an_episode_ends_where_the_context_ends(renderer: ChatRenderer) -> None:
    env = make("frozenlake")
    full = episode(env, Player(epsilon=1.0), renderer, 5)
    cut = episode(env, Player(epsilon=1.0), renderer, 5, limits=Limits.for_env(env, max_context=full.n_tokens - 10))
    assert cut.stop_reason == StopReason.CONTEXT_LIMIT
    assert cut.n_tokens <= full.n_tokens - 10


class Corridor(TextEnv):
    """Two steps to the right; a user's environment that says little of itself."""

    name = "corridor"
    max_turns = 3

    def __init__(self, oracle: bool = True, actions: bool = True) -> None:
        self.knows, self.lists, self.at = oracle, actions, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return "at 0", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.at += action == "on"
        return f"at {self.at}", float(self.at == 2), self.at == 2, False, {"success": self.at == 2}

    def legal_actions(self) -> list[str] | None:
        return ["on", "wait"] if self.lists else None

    def oracle(self) -> list[str] | None:
        return ["on"] * (2 - self.at) if self.knows else None

    def describe(self) -> dict[str, Any]:
        return {"place": self.at, "doors": [(0, 1), (2, 3)], "keys": []}


def test_an_environment_of_ones_own_has_players_too(renderer: ChatRenderer) -> None:
    assert type(world_of(Corridor())) is World
    trajectory = episode(Corridor(), Player(), renderer)
    assert trajectory.success
    assert trajectory.turns[1].thought == "place 1, doors 0 1 2 3, no keys. go on."


def test_who_needs_what_is_not_there_is_told(renderer: ChatRenderer) -> None:
    with pytest.raises(RecipeError, match="knows no best actions"):
        episode(Corridor(oracle=False), Player(), renderer)
    with pytest.raises(RecipeError, match="lists no legal actions"):
        episode(Corridor(actions=False), Player(epsilon=1.0), renderer)
    # Nobody asks for what is not needed.
    episode(Corridor(oracle=False), Player(epsilon=1.0), renderer)
    assert episode(Corridor(actions=False), Player(), renderer).success


def test_boldness_is_how_many_actions_a_turn_gets() -> None:
    env = make("frozenlake", size=5)
    env.reset(seed=4)
    rng = np.random.default_rng(0)
    timid = [len(Player(epsilon=1.0, boldness=0.0).actions(env, 3, rng)) for _ in range(50)]
    bold = [len(Player(epsilon=1.0, boldness=1.0).actions(env, 3, rng)) for _ in range(50)]
    half = [len(Player(epsilon=1.0, boldness=0.5).actions(env, 3, rng)) for _ in range(400)]
    assert (set(timid), set(bold), set(half)) == ({1}, {3}, {1, 2, 3})
    assert 1.6 < np.mean(half) < 1.9  # 1 + 1/2 + 1/4


def test_epsilon_is_how_often_a_player_strays() -> None:
    env = make("frozenlake", size=5)
    env.reset(seed=4)
    rng = np.random.default_rng(0)
    best = env.oracle()[0]
    followed = np.mean([Player(epsilon=0.4).actions(env, 1, rng)[0] == best for _ in range(600)])
    assert abs(followed - (0.6 + 0.4 / 4)) < 0.06


def test_a_blind_player_walks_into_holes() -> None:
    env = make("frozenlake", frozen=0.6)
    deaths = 0
    for seed in range(40):
        env.reset(seed=seed)
        player, goal = env.describe()["player"], env.describe()["goal"]
        actions = Player("blind").actions(env, 10, np.random.default_rng(seed))
        assert len(actions) == abs(player[0] - goal[0]) + abs(player[1] - goal[1])
        for action in actions:
            _, reward, terminated, _, _ = env.step(action)
            if terminated:
                deaths += reward == 0
                break
    assert deaths > 3


def test_a_mix_draws_its_players_by_weight() -> None:
    rng = np.random.default_rng(0)
    mix = SkillMix(oracle=1, wavering=1, blind=1, random=3, epsilon_low=0.2, epsilon_high=0.4, boldness_low=0.1)
    players = [mix.draw(rng) for _ in range(1200)]
    shares = [
        np.mean([p.guide == "oracle" and p.epsilon == 0 for p in players]),
        np.mean([0.2 <= p.epsilon <= 0.4 for p in players]),
        np.mean([p.guide == "blind" for p in players]),
        np.mean([p.epsilon == 1 for p in players]),
    ]
    assert np.allclose(shares, [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.05)
    assert all(mix.boldness_low <= p.boldness <= mix.boldness_high for p in players)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: SkillMix(oracle=-1),
        lambda: SkillMix(oracle=0, wavering=0, blind=0, random=0),
        lambda: SkillMix(random=float("nan")),
        lambda: SkillMix(epsilon_low=0.9, epsilon_high=0.1),
        lambda: SkillMix(mistakes=1.5),
        lambda: Player(epsilon=-0.1),
        lambda: Player("wise"),  # type: ignore[arg-type]
    ],
)
def test_players_that_cannot_be_are_refused(broken: Any) -> None:
    with pytest.raises(RecipeError):
        broken()


def test_a_way_in_words() -> None:
    assert way((1, 2), (3, 0)) == "down 2 left 2"
    assert way((3, 0), (3, 1)) == "right 1"
    assert way((2, 2), (2, 2)) == "here"


# Rehearsing


@pytest.mark.parametrize(("name", "params"), [s for s in SETTINGS if not s[1].get("slip")])
def test_where_nothing_is_left_to_chance_a_rehearsal_comes_true(
    renderer: ChatRenderer, name: str, params: dict[str, Any]
) -> None:
    env = make(name, **params)
    if name == "bandit":
        return  # what an arm pays is chance
    limits = Limits.for_env(env, max_tokens_per_turn=2000, max_context=40_000)  # this tokenizer spells in bytes
    for seed in range(8):
        player = Player(epsilon=0.7, boldness=0.5)
        trajectory = episode(env, player, renderer, seed, protocol=Protocol(rehearse=True), limits=limits)
        for turn in trajectory.turns:
            assert turn.predictions
            assert list(turn.predictions[-1].actions) == turn.actions
        answered = hindsight(trajectory, renderer)
        assert len(answered) >= len(trajectory.turns)
        assert all(one.foretold for one in answered)


def test_to_imagine_changes_nothing_and_sees_no_dice() -> None:
    env = make("frozenlake", slip=0.8)
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(40):
        env.reset(seed=seed)
        before, action = env.describe(), env.oracle()[0]
        foretold = imagined(env, [action], rng)
        assert env.describe() == before
        wrong += env.step(action)[0] != foretold
    assert wrong > 10


def test_without_the_protocol_nothing_is_rehearsed(renderer: ChatRenderer) -> None:
    for name in ("frozenlake", "helpdesk"):
        assert PREDICT_OPEN not in episode(make(name), Player(), renderer).turns[0].response


def test_the_help_desk_is_played_by_what_is_believed(renderer: ChatRenderer) -> None:
    env, world = make("helpdesk"), HelpdeskWorld()
    limits = Limits.for_env(env, max_tokens_per_turn=2000, max_context=40_000)
    won = true = 0
    for seed in range(80):
        env.reset(seed=seed)
        believed, wanted = world.belief(env), env.unwrapped.wanted
        trajectory = episode(env, Player(), renderer, seed, protocol=Protocol(rehearse=True), limits=limits)
        first = trajectory.turns[0]
        (prediction,) = first.predictions
        assert prediction.actions[0] in ("call", "open form")
        assert all(fact in prediction.text for fact in believed)
        assert f"need {' '.join(believed)}, ready nothing" in first.thought
        assert not any(turn.predictions for turn in trajectory.turns[1:])
        gathered = {
            turn.actions[0].rpartition(" ")[2] for turn in trajectory.turns if turn.actions[0][:3] in ("ask", "loo")
        }
        assert gathered == set(believed)
        assert trajectory.success == (set(wanted) <= set(believed))
        # The call is answered later in the episode, so a horizon is needed for its answer to be learnt.
        assert not hindsight(trajectory, renderer) or believed == ()
        (answer,) = hindsight(trajectory, renderer, horizon=8)
        assert answer.topic == env.unwrapped.company(env.unwrapped._company.index).name
        won += bool(trajectory.success)
        true += believed == wanted
    assert 60 <= true <= 76
    assert true <= won < 80


def test_players_of_the_help_desk_know_as_much_as_they_are_given() -> None:
    env = make("helpdesk")
    for knowledge, low, high in ((0.0, 0, 40), (1.0, 200, 200)):
        world = HelpdeskWorld(knowledge)
        right = 0
        for seed in range(200):
            env.reset(seed=seed)
            right += world.belief(env) == env.unwrapped.wanted
        assert low <= right <= high
