"""Other libraries' environments in text."""

import sys

import gymnasium as gym
import pytest

from rehearsal.environments import GymTextAdapter, ReasoningGymEnv, check_env, make
from rehearsal.environments.splits import content_split
from rehearsal.errors import EnvironmentFault, RecipeError


class Counter(gym.Env):
    """Count up from a random number; observations are numbers or text."""

    def __init__(self, text=True, actions=None, tasks=1000):
        self.text = text
        self.tasks = tasks
        self.action_space = actions or gym.spaces.Text(max_length=5)
        self.observation_space = gym.spaces.Text(max_length=10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options = options
        self.count = int(self.np_random.integers(self.tasks))
        self.start = self.count
        return self.shown(), {"task": str(self.start)}

    def shown(self):
        return f"at {self.count}" if self.text else self.count

    def step(self, action):
        self.last = action
        self.count += 1
        done = self.count - self.start == 3
        return self.shown(), 1, done, False, {"success": done}


def test_text_goes_through():
    env = GymTextAdapter(Counter(), name="counter", instructions="Count.", max_turns=3)
    assert (env.name, env.instructions, env.max_turns, env.legal_actions()) == ("counter", "Count.", 3, None)
    observation, info = env.reset(seed=4, options={"split": "test", "more": 1})
    assert observation.startswith("at ")
    assert "split" not in info
    assert env._inner.options == {"more": 1}
    _, reward, terminated, truncated, info = env.step(" up ")
    assert (reward, type(reward), terminated, truncated, info["success"]) == (1.0, float, False, False, False)
    assert env._inner.last == "up"
    assert check_env(env).ok


def test_named_actions_become_numbers():
    env = GymTextAdapter(Counter(actions=gym.spaces.Discrete(3, start=5)), action_names=["stay", "up", "down"])
    env.reset(seed=0)
    env.step("UP")
    assert env._inner.last == 6
    assert "stay, up, down" in env.instructions
    with pytest.raises(ValueError, match="sideways"):
        env.step("sideways")
    assert check_env(env).ok


def test_numbers_are_put_into_words():
    env = GymTextAdapter(Counter(text=False), observe=lambda count: f"count {count}")
    assert env.reset(seed=0)[0].startswith("count ")
    with pytest.raises(EnvironmentFault, match="observe function"):
        GymTextAdapter(Counter(text=False)).reset(seed=0)


def test_splits_by_content_are_disjoint():
    env = GymTextAdapter(Counter(tasks=100), split_by_content=True)
    seen = {}
    for split in ("train", "validation", "test"):
        seen[split] = {env.reset(seed=seed, options={"split": split})[0] for seed in range(150)}
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & (seen["train"] | seen["test"])
    assert min(map(len, seen.values())) > 2
    assert check_env(env).ok
    single = GymTextAdapter(Counter(tasks=1), split_by_content=True)
    other = next(split for split in seen if split != content_split("at 0"))
    with pytest.raises(EnvironmentFault, match="too little"):
        single.reset(seed=0, options={"split": other})


def test_a_registered_id_works():
    env = GymTextAdapter(
        "FrozenLake-v1", action_names=["Left", "Down", "Right", "Up"], observe=lambda cell: f"cell {cell}"
    )
    assert env.name == "FrozenLake-v1"
    assert env.reset(seed=0)[0] == "cell 0"
    with pytest.raises(RecipeError, match="NoSuchGame"):
        GymTextAdapter("NoSuchGame-v0")


def slippery_lake():
    lake = gym.make("FrozenLake-v1", is_slippery=True)
    return GymTextAdapter(lake, action_names=["Left", "Down", "Right", "Up"], observe=lambda cell: f"cell {cell}")


def walk(env, seed, chance, actions=("Down", "Right") * 6):
    options = None if chance is None else {"split": "train", "chance": chance}
    shown = [env.reset(seed=seed, options=options)[0]]
    for action in actions:
        observation, _, terminated, truncated, _ = env.step(action)
        shown.append(observation)
        if terminated or truncated:
            break
    return shown


def test_members_of_a_group_have_luck_of_their_own():
    """The same seed under eight chances: one first observation, and slips that differ."""
    env = slippery_lake()
    for seed in range(3):
        walks = [walk(env, seed, chance) for chance in range(8)]
        assert len({shown[0] for shown in walks}) == 1
        assert len({tuple(shown) for shown in walks}) > 3
        assert walks == [walk(env, seed, chance) for chance in range(8)], "seed and chance fix an episode"
        assert walks[0] == walk(env, seed, None), "chance 0 is no other than none"
    assert check_env(slippery_lake()).ok


def test_a_chance_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="chance must be a whole number"):
        slippery_lake().reset(seed=0, options={"chance": "good"})


def test_luck_keeps_to_the_split():
    class Dice(Counter):
        def step(self, action):
            self.count += int(self.np_random.integers(1, 7))
            return self.shown(), 0, self.count > self.start + 9, False, {}

    env = GymTextAdapter(Dice(tasks=100), split_by_content=True)
    walks = []
    for chance in range(6):
        first, info = env.reset(seed=3, options={"split": "test", "chance": chance})
        walks.append((first, info["task"], env.step("go")[0]))
    assert len({walk[:2] for walk in walks}) == 1
    assert len({walk[2] for walk in walks}) > 1


def test_what_a_wrapped_environment_tells_is_brought_into_form():
    class Loose(Counter):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {"task": 7, "state": (1, 2), "success": 0}

    env = GymTextAdapter(Loose())
    info = env.reset(seed=0)[1]
    assert (info["task"], info["state"], info["success"]) == ("7", "(1, 2)", False)
    assert check_env(env).problems == [] or {p.code for p in check_env(env)} == {"task-key"}


def test_text_that_is_no_unicode_is_refused():
    env = GymTextAdapter(Counter(text=False), observe=lambda count: "\ud800")
    with pytest.raises(EnvironmentFault, match="text that is not valid Unicode"):
        env.reset(seed=0)


def test_the_end_of_an_episode_is_kept():
    env = GymTextAdapter(Counter())
    with pytest.raises(gym.error.ResetNeeded):
        env.step("up")
    env.reset()
    for _ in range(3):
        *_, terminated, _, _ = env.step("up")
    assert terminated
    with pytest.raises(gym.error.ResetNeeded):
        env.step("up")


@pytest.mark.parametrize(
    ("space", "names", "message"),
    [
        (gym.spaces.Discrete(2), None, "action_names"),
        (gym.spaces.Discrete(2), ["a"], "2 different names"),
        (gym.spaces.Discrete(2), ["a", "A"], "2 different names"),
        (gym.spaces.Box(0, 1), None, "Box"),
        (gym.spaces.Text(5), ["a"], "leave it out"),
    ],
)
def test_actions_that_cannot_be_spelled_are_refused(space, names, message):
    with pytest.raises(EnvironmentFault, match=message):
        GymTextAdapter(Counter(actions=space), action_names=names)


def test_reasoning_gym_questions():
    pytest.importorskip("reasoning_gym")
    env = make("reasoning-gym", dataset="leg_counting", max_animals=4)
    tasks = {}
    for split in ("train", "test"):
        tasks[split] = set()
        for seed in range(20):
            question, info = env.reset(seed=seed, options={"split": split})
            assert "legs" in question
            tasks[split].add(info["task"])
            _, reward, terminated, _, info = env.step(env.oracle()[0])
            assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert not tasks["train"] & tasks["test"]
    assert len(tasks["train"]) > 15
    env.reset(seed=0)
    _, reward, _, _, info = env.step("no idea")
    assert reward < 1
    assert info["success"] is False
    assert check_env(env).ok


def test_an_answer_that_breaks_the_scorer_counts_as_wrong_and_is_told():
    pytest.importorskip("reasoning_gym")
    env = ReasoningGymEnv("prime_factorization")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("banana")
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert "ValueError" in info["scorer_error"]
    env.reset(seed=0)
    assert "scorer_error" not in env.step(env.oracle()[0])[4]


def test_a_scorer_that_always_raises_is_a_fault_of_the_environment(monkeypatch):
    pytest.importorskip("reasoning_gym")
    env = ReasoningGymEnv("leg_counting")
    env.reset(seed=0)

    def scorer(answer, entry):
        raise OSError("no disk")

    monkeypatch.setattr(env._dataset, "score_answer", scorer)
    with pytest.raises(EnvironmentFault, match="no disk"):
        env.step("4")


def test_reasoning_gym_that_is_missing_or_misused_is_explained(monkeypatch):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(RecipeError, match="did you mean leg_counting"):
        ReasoningGymEnv("leg_countin")
    with pytest.raises(RecipeError, match="paws"):
        ReasoningGymEnv("leg_counting", paws=4)
    with pytest.raises(RecipeError, match="needs the parameter dataset"):
        make("reasoning-gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RecipeError, match="pip install reasoning-gym"):
        ReasoningGymEnv("leg_counting")
