"""What every built-in environment keeps: the contract, the splits, reproducibility, speed."""

import time
import warnings

import gymnasium as gym
import numpy as np
import pytest

from rehearsal.environments import SPLITS, check_env, make
from rehearsal.environments.splits import content_split
from rehearsal.errors import EnvironmentFault, RecipeError

VARIANTS = {
    "frozenlake": {},
    "frozenlake both": {"view": "both", "size": 5},
    "frozenlake slip": {"slip": 0.3, "view": "coordinates"},
    "sokoban": {},
    "sokoban two boxes": {"size": 8, "boxes": 2, "view": "both"},
    "sokoban coordinates": {"view": "coordinates"},
    "bandit": {},
    "bandit reversed": {"reversed": True},
    "countdown": {},
    "countdown plus and minus": {"operations": "+-", "n_numbers": 4},
    "helpdesk": {},
    "helpdesk later": {"first": 500, "revision": 2, "max_facts": 4},
    "calculate": {},
    "calculate sums": {"operations": "+", "terms": 5, "digits": 2},
    "lookup": {},
    "lookup far": {"hops": 3, "people": 40},
    "repair": {},
    "repair three bugs": {"bugs": 3, "visible": 4},
}

ANY_TEXT = ("countdown", "calculate", "lookup", "repair")
"""The environments in which any text is an action."""


def variant(key):
    return make(key.split()[0], **VARIANTS[key])


@pytest.mark.parametrize("key", VARIANTS)
def test_the_checker_finds_nothing(key):
    report = check_env(variant(key))
    assert report.ok, str(report)
    assert "splits" in report.checked
    assert "the oracle" in report.checked


@pytest.mark.parametrize("key", VARIANTS)
def test_an_oracle_that_is_asked_after_each_step_succeeds(key):
    env = variant(key)
    solved = 0
    for seed in range(30):
        env.reset(seed=seed)
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(env.oracle()[0])
            over = terminated or truncated
        solved += info["success"]
        assert env.oracle() == []
        assert env.optimal_success() == float(info["success"])
    assert solved == 30 if key != "frozenlake slip" else solved >= 24


@pytest.mark.parametrize("key", ["frozenlake", "sokoban", "countdown", "bandit"])
def test_thousands_of_tasks_never_cross_splits(key):
    # Small settings, so that tasks do repeat: disjointness must not come from their being many.
    params = {"frozenlake": {"size": 3}, "sokoban": {"size": 5}, "countdown": {"max_number": 4}, "bandit": {}}
    env = make(key, **params[key])
    tasks = {split: [] for split in SPLITS}
    for split, episodes in (("train", 2000), ("validation", 500), ("test", 500)):
        for seed in range(episodes):
            _, info = env.reset(seed=seed, options={"split": split})
            assert info["split"] == split
            tasks[split].append(info["task"])
    distinct = {split: set(seen) for split, seen in tasks.items()}
    assert len(distinct["train"]) < 2000
    assert all(len(seen) > 5 for seen in distinct.values())
    assert not distinct["train"] & distinct["test"]
    assert not distinct["train"] & distinct["validation"]
    assert not distinct["validation"] & distinct["test"]


@pytest.mark.parametrize(("key", "params"), [("frozenlake", {"size": 3}), ("sokoban", {"size": 5})])
def test_no_screen_of_one_split_is_a_screen_of_another(key, params):
    # Not even from the middle of an episode: the start of one level could be what another looks like after two moves.
    env = make(key, **params)
    rng = np.random.default_rng(0)
    screens = {split: set() for split in SPLITS}
    for split, episodes in (("train", 1500), ("validation", 300), ("test", 300)):
        for seed in range(episodes):
            observation, _ = env.reset(seed=seed, options={"split": split})
            over = False
            while not over:
                screens[split].add(observation)
                observation, _, terminated, truncated, _ = env.step(str(rng.choice(env.legal_actions())))
                over = terminated or truncated or rng.random() < 0.1
            screens[split].add(observation)
    assert all(len(seen) > 20 for seen in screens.values())
    assert not screens["train"] & screens["test"]
    assert not screens["train"] & screens["validation"]
    assert not screens["validation"] & screens["test"]


def test_the_split_of_a_content_never_changes():
    # Fixed for good: a change of the hash would move tasks that people have trained on into the test split.
    assert [content_split(f"task {number}") for number in range(12)] == EXPECTED_SPLITS


def test_splits_have_their_shares():
    seen = [content_split(str(number)) for number in range(20_000)]
    assert abs(seen.count("train") / 20_000 - 0.8) < 0.01
    assert abs(seen.count("test") / 20_000 - 0.1) < 0.01


@pytest.mark.parametrize("key", VARIANTS)
def test_a_seed_fixes_task_and_chance_in_a_fresh_environment(key):
    def transcript(env, seed):
        observation, info = env.reset(seed=seed)
        out = [observation, info]
        for turn in range(6):
            actions = env.legal_actions() or ["1 + 1"]
            *step, info = env.step(actions[(seed + turn) % len(actions)])
            out += [*step, info]
            if step[2] or step[3]:
                break
        return out

    used = variant(key)
    transcript(used, 99)
    for seed in range(10):
        assert transcript(used, seed) == transcript(variant(key), seed)
    assert len({used.reset(seed=seed)[1]["task"] for seed in range(20)}) > 5


@pytest.mark.parametrize(("name", "params"), [("bandit", {}), ("frozenlake", {"slip": 0.5, "frozen": 1.0, "size": 6})])
def test_chance_changes_the_luck_and_not_the_task(name, params):
    env = make(name, **params)

    def outcome(seed, chance):
        options = {"split": "test"} | ({} if chance is None else {"chance": chance})
        first = env.reset(seed=seed, options=options)
        action = env.describe().get("risky", "Right")
        return first, env.step(action)[:2]

    for seed in range(5):
        outcomes = [outcome(seed, chance) for chance in [*range(40), None]]
        assert outcomes == [outcome(seed, chance) for chance in [*range(40), None]]
        assert len({repr(first) for first, _ in outcomes}) == 1
        assert len({repr(after) for _, after in outcomes}) >= 2
    with pytest.raises(RecipeError, match="chance"):
        env.reset(options={"chance": "good"})


@pytest.mark.parametrize("key", VARIANTS)
def test_resets_without_a_seed_go_on_to_new_tasks(key):
    env = variant(key)
    assert len({env.reset()[1]["task"] for _ in range(20)}) > 3


@pytest.mark.parametrize("key", VARIANTS)
def test_steps_outside_an_episode_ask_for_a_reset(key):
    env = variant(key)
    for call in (env.oracle, env.describe, env.optimal_success, lambda: env.step("Up")):
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            call()
    env.reset(seed=0)
    over = False
    while not over:
        action = env.oracle()[0]
        _, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)


@pytest.mark.parametrize("key", [key for key in VARIANTS if key.split()[0] not in ANY_TEXT])
def test_actions_are_read_leniently_and_refused_strictly(key):
    env = variant(key)
    env.reset(seed=1)
    for action in env.legal_actions():
        assert env.parse_action(f"  {action.upper()} ") == action
    assert env.parse_action("Jump") is None
    with pytest.raises(ValueError, match="not a legal action"):
        env.step("Jump")


@pytest.mark.parametrize("split", ["tests", 3])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(RecipeError, match="train, validation, test"):
        make("bandit").reset(options={"split": split})


def test_a_split_that_cannot_be_filled_says_so():
    env = make("countdown", n_numbers=2, max_number=2, max_target=2, operations="+")  # 1 + 1 = 2 is the only puzzle
    other = next(split for split in SPLITS if split != content_split("1 1 = 2"))
    with pytest.raises(EnvironmentFault, match="too few"):
        env.reset(options={"split": other})


@pytest.mark.parametrize("name", ["FrozenLake", "Sokoban", "Bandit", "Countdown", "Helpdesk", "Calculate", "Lookup"])
def test_gymnasium_makes_them_without_a_complaint(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"rehearsal/{name}-v0")
        observation, _ = env.reset(seed=3)
        assert env.observation_space.contains(observation)
        action = env.unwrapped.oracle()[0]
        assert env.action_space.contains(action)
        env.step(action)


@pytest.mark.parametrize(
    ("name", "limit_ms"), [("frozenlake", 5.0), ("sokoban", 25.0), ("bandit", 5.0), ("countdown", 5.0), ("lookup", 5.0)]
)
def test_resets_are_cheap(name, limit_ms):
    env = make(name)
    assert env.fast
    best = float("inf")
    for _ in range(5):  # the best of a few, because other programs may have the processor
        start = time.thread_time()
        for seed in range(50):
            env.reset(seed=seed)
        best = min(best, (time.thread_time() - start) / 50 * 1000)
    assert best < limit_ms


EXPECTED_SPLITS = [
    "test",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "train",
    "validation",
    "train",
]


def test_environments_tell_what_could_be_foreseen() -> None:
    """Two resets to the same task with other luck: where an answer is said to follow, it does not depend on luck."""
    for name, params, foreseeable in (
        ("frozenlake", {}, True), ("frozenlake", {"slip": 0.5}, False), ("sokoban", {}, True),
        ("countdown", {}, True),
    ):  # fmt: skip
        env = make(name, **params)
        env.reset(seed=3)
        assert env.step(env.oracle()[0])[4]["foreseeable"] is foreseeable, name
    desk = make("helpdesk")
    desk.reset(seed=0)
    reach = next(action for action in desk.oracle() if action in ("call", "open form"))
    other = "call" if reach == "open form" else "open form"
    gather = desk.oracle()[0]
    assert desk.step(gather)[4]["foreseeable"], "to gather a fact has the answer that it always has"
    assert desk.step(other)[4]["foreseeable"], "the channel was named"
    assert not desk.step(reach)[4]["foreseeable"], "what a company wants is news"
