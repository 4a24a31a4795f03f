"""MINT's protocol: players whose success after k turns is known beforehand, with and without feedback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal.agents.feedback import Feedback, JudgeFeedback, ScriptedFeedback
from rehearsal.cli import main
from rehearsal.errors import RecipeError, RewardError
from rehearsal.evaluation.mint import mint_environments, mint_figures, play_mint, user_of
from rehearsal.evaluation.remote import ChatRollout
from rehearsal.evaluation.run import evaluate_mint
from rehearsal.evaluation.statistics import wilson_interval
from rehearsal.generation.remote import ChatAnswer
from rehearsal.reports.evaluation import evaluation_parts, turns_chart, write_evaluation_page
from rehearsal.rollout import Task
from rehearsal.training.playing import answer_protocol, make_toolkit
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.trajectory import Group, SampleStop, StopReason, Trajectory, Turn

Messages = list[tuple[str, str]]
RECIPE: dict[str, Any] = {
    "environment": {"name": "calculate", "params": {"terms": 2, "digits": 2}},
    "agent": {"thinking": False},
    "tools": {"names": ["calculator"], "max_calls": 2},
}


class Engine:
    """A server whose model is a function of the chat."""

    capacity = 8

    def __init__(self, player: Callable[[Messages], str]) -> None:
        self.player = player
        self.chats: list[Messages] = []

    def chat(self, key: int) -> Any:
        messages: Messages = []
        self.chats.append(messages)
        engine = self

        class Session:
            def add(self, role: str, text: str) -> None:
                messages.append((role, text))

            async def answer(self, params: Any) -> ChatAnswer:
                assert params.temperature == 0.0
                text = engine.player(messages)
                messages.append(("assistant", text))
                return ChatAnswer(text, None, SampleStop.END, "", 3)

            def close(self) -> None: ...

        return Session()


def value_of(messages: Messages) -> int:
    found = re.search(r"^[\d +*-]+$", messages[1][1], re.MULTILINE)
    assert found
    return int(eval(found[0]))


def who_listens(messages: Messages) -> str:
    """Is one too high until told so."""
    return f"<answer>{value_of(messages) + ('too high' not in messages[-1][1])}</answer>"


def who_calculates(messages: Messages) -> str:
    """Guesses wildly with a single turn; with more, calls the calculator first."""
    if "Turn 1 of 1," in messages[-1][1]:
        return "<answer>-1</answer>"
    if len(messages) == 2:
        line = str(value_of(messages))
        return '<tool_call>{"name": "calculator", "arguments": {"expression": "' + line + '"}}</tool_call>'
    return f"<answer>{messages[-1][1].splitlines()[1]}</answer>"


def play(
    player: Callable[[Messages], str], user: Feedback | None, turns: int = 3, proposals: int = 2, tasks: int = 6,
    first: int = 1,
) -> tuple[list[list[Group]], Engine]:  # fmt: skip
    recipe = resolve_recipe(RECIPE)
    makers, limits = mint_environments(recipe, turns, proposals)
    engine = Engine(player)
    rollout = ChatRollout(
        makers, engine, answer_protocol(recipe), limits, toolkit=make_toolkit(recipe), feedback=user  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        return play_mint(rollout, [Task(seed, "test") for seed in range(tasks)], turns, first=first), engine
    finally:
        rollout.close()


def test_who_listens_gains_by_feedback_from_the_second_turn_on() -> None:
    plain, _ = play(who_listens, None)
    helped, engine = play(who_listens, ScriptedFeedback(), first=2)
    figures = mint_figures(plain, [plain[0], *helped])
    assert [figures[f"success@{k}"] for k in (1, 2, 3)] == [0.0, 0.0, 0.0]
    assert [figures[f"feedback/success@{k}"] for k in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert (figures["feedback/success@2/low"], figures["feedback/success@2/high"]) == wilson_interval(6, 6)
    assert "feedback/gain@1" not in figures
    assert figures["feedback/gain@3"] == figures["feedback/gain@3/low"] == 1.0
    assert figures["feedback/gain@3/p_value"] < 0.05
    assert figures["success"] == figures["success@3"]
    assert (figures["slope"], figures["feedback/slope"]) == (0.0, pytest.approx(0.5))
    assert figures["feedback/remarks"] == 1.0 and figures["feedback/withheld"] == 0.0
    assert figures["feedback/tokens/sampled"] == 6.0 and figures["tokens/sampled"] == 6.0
    # The same tasks, told apart by what they say of turns and tries alone.
    assert {value_of(chat) for chat in engine.chats[:6]} == {value_of(chat) for chat in engine.chats[6:]}


def test_answers_are_used_up_before_turns() -> None:
    (one, two, three), engine = play(who_listens, None, tasks=1)
    counts = [[len(trajectory.turns) for group in groups for trajectory in group] for groups in (one, two, three)]
    assert counts == [[1], [2], [2]]
    last = [chat for chat in engine.chats if "Turn 1 of 3, 2 actions" in chat[1][1]]
    assert len(last) == 1
    assert "Answers left: 1.\nTurn 2 of 3, 1 action, 2 tool calls left." in last[0][3][1]
    single = [chat for chat in engine.chats if "Turn 1 of 1, 1 action" in chat[1][1]]
    assert "may be another" not in single[0][0][1]
    assert three[0].trajectories[0].stop_reason == StopReason.TERMINATED
    (_, _, more), _ = play(who_listens, None, tasks=1, proposals=3)
    assert len(more[0].trajectories[0].turns) == 3


def test_a_call_of_a_tool_takes_a_turn() -> None:
    plain, _ = play(who_calculates, None)
    figures = mint_figures(plain)
    assert [figures[f"success@{k}"] for k in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert figures["tools/calculator/calls"] == 1.0
    assert figures["slope"] == pytest.approx(0.5)
    assert not any(name.startswith("feedback/") for name in figures)


def test_the_remark_stands_in_the_notice() -> None:
    helped, _ = play(who_listens, ScriptedFeedback(), tasks=1)
    turn = helped[2][0].trajectories[0].turns[1]
    assert "too high" in turn.notice and "too high" not in turn.observation


class Silent(ScriptedFeedback):
    def say(self, env: Any, agent: Any, result: Any) -> str:
        raise RewardError("The user has gone.")


def test_a_user_who_fails_fails_the_episode() -> None:
    helped, _ = play(who_listens, Silent(), tasks=2)
    episodes = [one for group in helped[2] for one in group]
    assert all(one.failed and one.error == "The user has gone." for one in episodes)


# Figures


def episode(success: bool | None, category: str = "", failed: bool = False) -> Trajectory:
    one = Trajectory("made-up", 0, "test", success=success, category=category)
    one.turns = [Turn("?", executed=["1"], rewards=[0.0])]
    one.stop_reason = StopReason.ERROR if failed else StopReason.TERMINATED
    return one


def test_kinds_of_tasks_have_figures_of_their_own() -> None:
    plain = [[Group([episode(k > 1, "sums")]), Group([episode(False, "words")])] for k in (1, 2)]
    helped = [plain[0], [Group([episode(True, "sums")]), Group([episode(True, "words")])]]
    figures = mint_figures(plain, helped)
    assert figures["success@2"] == 0.5 and figures["feedback/gain@2"] == 0.5
    assert (figures["category/sums/success@1"], figures["category/sums/success@2"]) == (0.0, 1.0)
    assert figures["category/words/feedback/success@2"] == figures["category/words/feedback/gain@2"] == 1.0
    assert figures["category/sums/feedback/gain@2"] == 0.0
    assert figures["category/words/tasks"] == 1.0
    parts = {part.title: part for part in evaluation_parts(figures)}
    assert [row[:2] for row in parts["By kind of task"].rows] == [["sums", "1"], ["words", "1"]]


def test_failed_episodes_enter_no_rate() -> None:
    plain = [[Group([episode(True)]), Group([episode(True, failed=True)]), Group([episode(False)])]] * 2
    figures = mint_figures(plain)
    assert figures["success@2"] == 0.5 and figures["failed_episodes"] == 1
    with pytest.raises(RecipeError, match="tells no success"):
        mint_figures([[Group([episode(None)])]])


def test_several_samples_have_intervals_over_tasks() -> None:
    plain = [[Group([episode(True), episode(False)]), Group([episode(True), episode(True)])]]
    assert mint_figures(plain)["success@1"] == 0.75


def test_users_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_of("none") is None and user_of(None) is None
    assert isinstance(user_of("scripted"), ScriptedFeedback)
    assert isinstance(user_of("http://localhost:1/v1", "m"), JudgeFeedback)
    with pytest.raises(RecipeError, match="--feedback-model"):
        user_of("http://localhost:1/v1")
    with pytest.raises(RecipeError, match="not 'script'"):
        user_of("script")
    with pytest.raises(RewardError, match="NO_SUCH_KEY"):
        user_of("http://localhost:1/v1", "m", "NO_SUCH_KEY")
    for turns, proposals in ((0, 2), (5, 0), (1000, 2)):
        with pytest.raises(RecipeError, match="must be from 1 to 100"):
            mint_environments(Recipe(), turns, proposals)


# With a policy, on the command line, and as a page


SMALL = {
    "environment.params.size": 3, "agent.thinking": False, "agent.max_tokens_per_turn": 12, "agent.max_context": 400,
}  # fmt: skip


def test_a_policy_that_walks(taught_folder: Path) -> None:
    figures = evaluate_mint(taught_folder, recipe="frozenlake", overrides=SMALL, episodes=4, turns=2, temperature=1.0)
    assert figures["success@1"] <= 1.0 and "feedback/gain@2" in figures
    assert figures["turns"] <= 2
    again = evaluate_mint(taught_folder, recipe="frozenlake", overrides=SMALL, episodes=4, turns=2, temperature=1.0)
    assert again == figures


def test_on_the_command_line(taught_folder: Path, tmp_path: Path, capsys: Any) -> None:
    small = [part for name, value in SMALL.items() for part in (f"--{name}", str(value).lower())]
    file, page = tmp_path / "figures.json", tmp_path / "page.html"
    command = ["eval", str(taught_folder), "--recipe", "frozenlake", "--episodes", "3", "--protocol", "mint",
               "--turns", "2", "--json", str(file), "--page", str(page)]  # fmt: skip
    assert main([*command, *small]) == 0
    said = capsys.readouterr().out
    assert "Success after k turns" in said and "with feedback" in said and "/low" not in said
    figures = json.loads(file.read_text())
    assert {"success@1", "success@2", "feedback/gain@2", "slope"} <= set(figures)
    html = page.read_text()
    assert "<svg" in html and "with feedback" in html and "<script" not in html


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--turns", "3"), "--turns goes with --protocol mint"),
        (("--protocol", "mint", "--against", "base"), "--against does not go with"),
        (("--protocol", "mint", "--turns", "0"), "turns must be from 1"),
        (("--protocol", "mint", "--feedback", "teacher"), "scripted, none, or the address"),
        (("--verifier", "pattern"), "add --samples"),
        (("--samples", "2", "--verifier", "pattern", "--verifier-options", "x"), "not JSON"),
        (("--samples", "2", "--verifier-options", "{}"), "needs a --verifier"),
        (("--page", "/no/such/folder/page.html"), "There is no folder"),
    ],
)
def test_what_does_not_go_together(
    taught_folder: Path, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [part for name, value in SMALL.items() for part in (f"--{name}", str(value).lower())]
    command = ["eval", str(taught_folder), "--recipe", "frozenlake", "--episodes", "1", *options]
    assert main([*command, *small]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_best_of_n_on_the_command_line(taught_folder: Path, tmp_path: Path, capsys: Any) -> None:
    small = [part for name, value in SMALL.items() for part in (f"--{name}", str(value).lower())]
    file = tmp_path / "figures.json"
    command = ["eval", str(taught_folder), "--recipe", "frozenlake", "--episodes", "2", "--samples", "2", "--json",
               str(file), "--verifier", "pattern", "--verifier-options", '{"pattern": "Right"}']  # fmt: skip
    assert main([*command, *small]) == 0
    assert "best@2" in capsys.readouterr().out
    assert {"best@1", "best@2", "unverified", "tokens/sampled"} <= set(json.loads(file.read_text()))


def test_a_page_escapes_what_it_is_told(tmp_path: Path) -> None:
    figures = {"success": 0.5, "success_low": 0.2, "success_high": 0.8, "episodes": 4.0, "tokens/sampled": 3.0,
               "category/<b>/success": 1.0, "category/<b>/success/low": 0.5, "category/<b>/success/high": 1.0,
               "category/<b>/tasks": 2.0}  # fmt: skip
    page = write_evaluation_page(tmp_path / "page.html", figures, {"policy": "<script>"}).read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page and "<script" not in page
    assert "50% (20% to 80%)" in page and "Cost" in page
    assert turns_chart(figures) is None
