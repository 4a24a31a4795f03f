"""Tasks from a file: what is drawn, how answers are scored, and what happens where they cannot be."""

import json
import sys
import time
from pathlib import Path

import pytest

from rehearsal.environments import SPLITS, check_env, make
from rehearsal.environments.splits import content_split
from rehearsal.environments.tasks import _POOLS, close_pools
from rehearsal.errors import EnvironmentFault, RecipeError, RewardError
from rehearsal.rewards.answers import prompt_key
from rehearsal.rewards.verifier import Score, Task

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


class Sleeper:
    """Checks for as long as the answer says."""

    name = "sleeper"

    def verify(self, completion: str, task: Task) -> Score:
        time.sleep(float(completion))
        return Score(1.0, True)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a} + {b}", "reference": str(a + b), "level": a} for a in range(10) for b in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_it_keeps_the_contract(source):
    env = make("tasks", source=source, verifier="last-number")
    report = check_env(env)
    assert report.ok, str(report)
    assert {"splits", "the oracle"} <= set(report.checked)


def test_answers_are_scored_by_the_verifier(source):
    env = make("tasks", source=source, verifier="last-number")
    prompt, info = env.reset(seed=3, options={"split": "test"})
    assert content_split(prompt) == info["split"] == "test"
    assert env.describe()["data"].keys() == {"level"}
    (right,) = env.oracle()
    said, reward, terminated, _, info = env.step(f"It is {right}.")
    assert (said, reward, terminated, info["success"]) == ("score 1", 1.0, True, True)
    assert right in info["evidence"]
    env.reset(seed=3, options={"split": "test"})
    assert env.step("It is 99.")[1] == 0.0


def test_prompts_that_count_as_the_same_fall_into_one_split(tmp_path):
    """As check_disjoint compares them: they differ in case and spaces alone."""
    path = tmp_path / "twins.jsonl"
    rows = [{"prompt": form(f"How many are {a}?"), "reference": "1"} for a in range(60)
            for form in (str, str.upper, "  {} ".format)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    env = make("tasks", source=str(path), verifier="last-number")
    seen = {split: {prompt_key(task.prompt) for task in env._tasks[split]} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert sum(len(env._tasks[split]) for split in SPLITS) == 180


def test_without_splits_tasks_are_dealt_out_by_content(source):
    env = make("tasks", source=source, verifier="last-number")
    seen = {split: {env.reset(seed=s, options={"split": split})[0] for s in range(200)} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]


def test_splits_of_the_source(tmp_path):
    for name, numbers in (("train", range(40)), ("held_out", range(40, 50))):
        rows = [{"prompt": f"double {n}", "reference": str(2 * n)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"source": str(tmp_path), "verifier": "last-number"}
    env = make("tasks", **given, splits={"train": "train", "test": "held_out"})
    seen = {split: {env.reset(seed=s, options={"split": split})[0] for s in range(200)} for split in SPLITS}
    assert seen["test"] == {f"double {n}" for n in range(40, 50)}
    assert seen["train"] | seen["validation"] == {f"double {n}" for n in range(40)}
    assert not seen["train"] & seen["validation"]
    with pytest.raises(RewardError, match="share 40 prompts"):
        make("tasks", **given, splits={"train": "train", "test": "train"})
    with pytest.raises(RecipeError, match='"train" and for "test"'):
        make("tasks", **given, splits={"train": "train"})
    with pytest.raises(RecipeError, match="tests"):
        make("tasks", **given, splits={"train": "train", "tests": "held_out"})


def test_a_check_that_hangs_fails_the_episode_and_no_other(source):
    env = make("tasks", source=source, verifier="tests.environments.test_tasks:Sleeper", timeout=0.5)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=r"could not be checked \(timeout\)"):
        env.step("60")
    env.reset(seed=0)
    assert env.step("0")[1] == 1.0


def test_pools_can_be_closed_and_come_back(source):
    env = make("tasks", source=source, verifier="tests.environments.test_tasks:Sleeper", timeout=7.5)
    env.reset(seed=0)
    env.step("0")
    pools = [pool for key, pool in _POOLS.items() if key[1] == 7.5]
    close_pools()
    assert not _POOLS
    with pytest.raises(RewardError, match="closed"):
        pools[0].verify(["0"], [Task("x")])
    env.reset(seed=0)
    assert env.step("0")[1] == 1.0, "whoever needs it makes another one"


def test_a_verifier_of_ones_own_beside_the_data(source, tmp_path, monkeypatch):
    (tmp_path / "own_verifier.py").write_text(
        "from rehearsal.rewards.verifier import Score\n\n\nclass Polite:\n    name = 'polite'\n"
        "    def verify(self, completion, task):\n        return Score(float('please' in completion), True)\n"
    )
    monkeypatch.chdir(tmp_path)
    # As for a console script, which does not look into the folder that it was started in.
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    env = make("tasks", source=source, verifier="own_verifier:Polite")
    env.reset(seed=0)
    assert env.step("please")[1] == 1.0


def test_the_verifier_is_made_once_for_all_environments(source, monkeypatch):
    made = []
    monkeypatch.setattr("rehearsal.environments.tasks.make_verifier", lambda name, **_: made.append(name))
    for _ in range(5):
        make("tasks", source=source, verifier="never-heard-of")
    assert made == ["never-heard-of"]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"source": "nowhere.jsonl"}, "no file"),
        ({"verifier": "maths"}, "math"),
        ({"prompt": "question"}, "no field 'question'"),
        ({"options": {"boxed": True}}, "no option"),
        ({"turns": 0}, "turns"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_bad_parameters(source, params, told):
    with pytest.raises((RecipeError, RewardError), match=told):
        make("tasks", **{"source": source, "verifier": "last-number", **params})


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the shared data")
def test_grade_school_mathematics():
    env = make(
        "tasks", source=str(GSM8K), verifier="last-number", prompt="question", reference="answer",
        splits={"train": "train", "test": "test"},
    )  # fmt: skip
    for split in SPLITS:
        env.reset(seed=1, options={"split": split})
        assert env.step(env.oracle()[0])[1] == 1.0


COMBINED = {
    "also": {"sum": {"verifier": "pattern", "pattern": r"\d+ \+ \d+ = \d+"}},
    "combine": {"how": "gate", "success": "last-number", "bonus": {"sum": 0.5}},
}


@pytest.mark.parametrize(
    ("form", "value", "success"),
    [("It is {}.", 1.0, True), ("1 + 1 = {}", 1.5, True), ("1 + 1 = 999", 0.0, False), ("none", 0.0, False)],
)
def test_several_verifiers_make_one_reward(source, form, value, success):
    env = make("tasks", source=source, verifier="last-number", **COMBINED)
    env.reset(seed=3)
    (right,) = env.oracle()
    _, reward, _, _, info = env.step(form.format(right))
    assert (reward, info["success"]) == (value, success)
    assert info["parts"]["sum"] == float("=" in form)


def test_a_part_that_fails_leaves_no_reward(source):
    env = make(
        "tasks", source=source, verifier="last-number", timeout=0.5,
        also={"slow": {"verifier": "tests.environments.test_tasks:Sleeper"}},
        combine={"how": "sum", "weights": {"last-number": 1.0, "slow": 0.0}},
    )  # fmt: skip
    env.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=r"\(timeout\): slow"):
        env.step("60")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"combine": None}, "give both"),
        ({"also": None}, "give both"),
        ({"also": {"sum": {"pattern": "x"}}}, "also.sum must be a table that names its verifier"),
        ({"also": {"sum": "pattern"}}, "also.sum must be a table"),
        ({"also": {"last-number": {"verifier": "math"}}}, "called other than last-number"),
        ({"also": {"sum": {"verifier": "pattern", "patern": "x"}}}, "no option 'patern'"),
        ({"combine": "gate"}, "must be a table with how"),
        ({"combine": {"how": "gates", "success": "sum"}}, "no combination 'gates'"),
        ({"combine": {"how": "gate"}}, "needs success"),
        ({"combine": {"how": "gate", "success": "last-number", "bonus": {"some": 1.0}}}, "some"),
        ({"combine": {"how": "gate", "success": "last-number", "bonus": ["sum"]}}, "table of numbers"),
        ({"combine": {"how": "gate", "success": "last-number", "needs": "sum"}}, "list of names"),
        ({"combine": {"how": "gate", "success": "last-number"}}, "no use of sum"),
        ({"combine": {"how": "gate", "success": "last-number", "penalty": 1.0}}, "no option 'penalty'"),
        ({"combine": {"how": "partial", "success": "last-number", "levels": {"sum": 1.5}}}, "below 1"),
    ],
)
def test_verifiers_that_cannot_be_combined(source, changes, told):
    with pytest.raises((RecipeError, RewardError), match=told):
        make("tasks", **{"source": source, "verifier": "last-number", **COMBINED, **changes})
