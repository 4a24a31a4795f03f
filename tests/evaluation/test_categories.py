"""Figures of each kind of task, the cost in tokens, and best-of-n by a verifier."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rehearsal.environments import make
from rehearsal.errors import RecipeError, RewardError
from rehearsal.evaluation.best_of import best_of_figures, told, verify_episodes
from rehearsal.evaluation.categories import category_figures, token_figures
from rehearsal.evaluation.held_out import evaluation_figures
from rehearsal.evaluation.statistics import wilson_interval
from rehearsal.rewards import registry
from rehearsal.rewards.verifier import Score, Task, VerificationError
from rehearsal.trajectory import Group, Segment, StopReason, ToolCall, Trajectory, Turn

NAN = math.nan


def episode(
    success: bool | None, category: str = "", environment: str = "made-up", failed: bool = False, answer: str = "1"
) -> Trajectory:
    one = Trajectory(environment, 0, "test", success=success, category=category)
    one.turns = [Turn("What?", response=f"<answer>{answer}</answer>", executed=[answer], rewards=[0.0])]
    one.segments = [Segment([1, 2, 3, 4, 5], [NAN, NAN, NAN, -1.0, -1.0], [0, 1, 2, 5, 5], [0] * 5)]
    if failed:
        one.stop_reason = StopReason.ERROR
    return one


def test_success_of_each_kind() -> None:
    groups = [Group([episode(True, "sums")]), Group([episode(False, "sums")]), Group([episode(True, "words")]),
              Group([episode(True, "sums", failed=True)])]  # fmt: skip
    figures = category_figures(groups)
    assert figures["category/sums/success"] == 0.5
    assert (figures["category/sums/success/low"], figures["category/sums/success/high"]) == wilson_interval(1, 2)
    assert (figures["category/sums/tasks"], figures["category/words/tasks"]) == (2, 1)
    assert set(category_figures([*groups, Group([episode(False)])])) > {"category/others/success"}
    assert figures.items() <= evaluation_figures(groups).items()
    several = [Group([episode(True, "a"), episode(False, "a")]), Group([episode(True, "b")] * 2)]
    assert category_figures(several)["category/a/success"] == 0.5


def test_kinds_of_several_environments_are_told_apart() -> None:
    kinds = ((True, "sums", "x"), (False, "sums", "y"), (True, "", "y"))
    groups = [Group([episode(*kind)]) for kind in kinds]
    assert {name for name in category_figures(groups) if name.endswith("/success")} == {
        "category/x/sums/success", "category/y/sums/success", "category/y/success",
    }  # fmt: skip


def test_one_kind_has_no_table() -> None:
    assert category_figures([Group([episode(True, "a")]), Group([episode(False, "a")])]) == {}
    assert category_figures([]) == {}


def test_what_answers_cost() -> None:
    groups = [Group([episode(True), episode(False)]), Group([episode(True, failed=True)])]
    assert token_figures(groups) == {"tokens/sampled": 2.0, "tokens/shown": 3.0, "tokens/per_success": 6.0}
    assert "tokens/per_success" not in token_figures([Group([episode(False)])])
    remote = episode(True)
    remote.segments, remote.counters = [], {"server_tokens": 7.0}
    assert token_figures([Group([remote])]) == {"tokens/sampled": 7.0, "tokens/per_success": 7.0}


def test_tasks_of_a_file_have_kinds(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "reference": str(i), "kind": "odd" if i % 2 else "even"} for i in range(40)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    env = make("tasks", source=str(file), verifier="last-number", category="kind")
    for seed in range(5):
        shown, info = env.reset(seed=seed)
        assert info["category"] == ("odd" if int(shown.split()[1]) % 2 else "even")
    with pytest.raises(RecipeError, match="no field 'colour' to take categories from; it is one of kind"):
        make("tasks", source=str(file), verifier="last-number", category="colour")


# Best of n


class Longest:
    """Likes long answers; cannot say anything of those with a question mark."""

    name = "longest"
    runs_in = "thread"

    def verify(self, completion: str, task: Task) -> Score:
        if "?" in completion or task.reference is not None:
            raise VerificationError("It asks.")
        return Score(float(len(completion)), False)


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that it has for one test: whoever lists all verifiers must not meet it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register_verifier("longest-of-tests", Longest)
    return "longest-of-tests"


def test_a_verifier_picks_among_samples(longest: str) -> None:
    groups = [
        Group([episode(False, answer="1"), episode(True, answer="longer"), episode(False, answer="?" * 20)]),
        Group([episode(True, answer="1"), episode(False, answer="longer"), episode(True, failed=True)]),
    ]
    scores = verify_episodes(groups, longest)
    assert [[score is None for score in own] for own in scores] == [[False, False, True], [False, False, True]]
    figures = best_of_figures(groups, scores)
    assert figures["best@1"] == 0.5
    assert figures["best@2"] == 0.5, "right of the first task, wrong of the second"
    assert figures["unverified"] == pytest.approx(1 / 5)
    assert figures["best@2/low"] <= 0.5 <= figures["best@2/high"]
    assert best_of_figures([Group([episode(None)])], [[1.0]]) == {}


def test_a_verifier_that_knows_nothing_is_told_of(longest: str) -> None:
    with pytest.raises(RewardError, match=r"could say nothing about any of 1 episodes: .*It asks"):
        verify_episodes([Group([episode(True, answer="?")])], longest)
    with pytest.raises(RewardError, match="no verifier"):
        verify_episodes([Group([episode(True)])], "longest-of-test")


def test_an_episode_of_several_turns_is_read_whole() -> None:
    one = episode(True)
    one.turns = [Turn("a", response="<think>hm</think>b"), Turn("c", response="<think>hm</think>d")]
    one.final_observation = "e"
    assert told(one) == "b\n\nc\n\nd", "not what was said last, which may be the verdict"


def test_a_verifier_reads_what_the_environment_was_given() -> None:
    one = episode(True)
    one.turns = [
        Turn("q", response="<think>hm</think><tool_call>...</tool_call><|im_end|>", calls=[ToolCall("find", {"a": 1})]),
        Turn("found", response="<think>hm</think><answer>4</answer><|im_end|>", executed=["4"]),
    ]
    assert told(one) == 'find({"a": 1})\n\nfound\n\n4'


def test_a_verifier_that_looks_for_the_verdict_picks_at_random() -> None:
    def searched(right: bool) -> Trajectory:
        one = episode(right)
        one.turns = [Turn("What?", response="<tool_call>{}</tool_call>"), Turn("found", response="<answer>x</answer>")]
        one.final_observation = "right" if right else "wrong"
        return one

    groups = [Group([searched(sample % 4 == 0) for sample in range(4)]) for _ in range(8)]
    peeking = {"pattern": "right$", "how": "search", "where": "completion"}
    figures = best_of_figures(groups, verify_episodes(groups, "pattern", peeking))
    assert figures["unverified"] == 0.0
    assert figures["best@1"] == figures["best@2"] == figures["best@4"] == 0.25
