"""Our environments under inspect-ai, played by its mock model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import eval as inspect_eval
from inspect_ai.model import ContentReasoning, ContentText, ModelOutput, get_model

from rehearsal.environments import make
from rehearsal.evaluation.inspect_tasks import environment
from rehearsal.training.recipe import resolve_recipe
from rehearsal.training.tasks import TaskSource


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "sums.toml"
    file.write_text(
        'name = "sums"\n[environment]\nname = "calculate"\nparams = {terms = 2, digits = 2}\n'
        '[agent]\nthinking = false\n[tools]\nnames = ["calculator"]\nmax_calls = 1\n'
    )
    return str(file)


def played(task: Any, answer: Any, tmp_path: Path, **options: Any) -> Any:
    def reply(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        said = answer([message.text for message in messages])
        return said if isinstance(said, ModelOutput) else ModelOutput.from_content("mockllm/model", said)

    model = get_model("mockllm/model", custom_outputs=reply, memoize=False)
    model.api.count_text_tokens = counted  # the mock model's own way fetches a tokenizer
    (log,) = inspect_eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none", **options)
    assert log.status == "success", log.error
    return log


async def counted(text: str) -> int:
    return len(text)


def figures(log: Any) -> dict[str, float]:
    return {score.name: score.metrics["mean"].value for score in log.results.scores}


def value_of(texts: list[str]) -> int:
    found = re.search(r"^[\d +*-]+$", texts[1], re.MULTILINE)
    assert found
    return int(eval(found[0]))


def test_right_and_wrong_answers(recipe: str, tmp_path: Path) -> None:
    right = played(environment(recipe, episodes=3), lambda texts: f"<answer>{value_of(texts)}</answer>", tmp_path)
    assert figures(right) == {"success": 1.0, "reward": 1.0}
    wrong = played(environment(recipe, episodes=3), lambda texts: f"<answer>{value_of(texts) + 1}</answer>", tmp_path)
    assert figures(wrong) == {"success": 0.0, "reward": 0.0}
    nothing = played(environment(recipe, episodes=1), lambda texts: "hm", tmp_path)
    assert figures(nothing)["reward"] < 0 and len(nothing.samples[0].messages) > 4


def test_the_tasks_are_the_held_out_ones(recipe: str) -> None:
    resolved = resolve_recipe(recipe)
    expected = []
    for one in TaskSource(resolved).held_out(resolved.evaluation.seed, "test", 4):
        expected.append(make("calculate", terms=2, digits=2).reset(seed=one.seed, options={"split": "test"})[0])
    assert [sample.input for sample in environment(recipe, episodes=4).dataset] == expected


def test_tasks_of_a_list_are_there_once(tmp_path: Path) -> None:
    file = tmp_path / "lookup.toml"
    file.write_text('[environment]\nname = "lookup"\nparams = {people = 12}\n[agent]\nthinking = false\n')
    task = environment(str(file), episodes=1000)
    asked = [sample.input for sample in task.dataset]
    assert len(asked) == len(set(asked)) == make("lookup", people=12).task_count("test")
    log = played(task, lambda texts: "<answer>nobody</answer>", tmp_path, limit=3)
    for sample in log.samples:
        assert sample.input in sample.messages[1].text, "what is played is what the sample says"


def test_tools_are_called_and_their_results_shown(recipe: str, tmp_path: Path) -> None:
    def answer(texts: list[str]) -> str:
        if len(texts) == 2:
            line = re.search(r"^[\d +*-]+$", texts[1], re.MULTILINE)
            assert line
            return '<tool_call>{"name": "calculator", "arguments": {"expression": "' + line[0] + '"}}</tool_call>'
        assert texts[-1].startswith("Result 1, calculator:")
        return f"<answer>{texts[-1].splitlines()[1]}</answer>"

    assert figures(played(environment(recipe, episodes=2), answer, tmp_path)) == {"success": 1.0, "reward": 1.0}


def test_thoughts_that_were_taken_out_are_put_back(tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(texts: list[str]) -> ModelOutput:
        seen.append(len(texts))
        output = ModelOutput.from_content("mockllm/model", "")
        output.choices[0].message.content = [
            ContentReasoning(reasoning="left"),
            ContentText(text="<answer>Left</answer>"),
        ]
        return output

    log = played(environment("frozenlake", episodes=1), answer, tmp_path, epochs=2)
    assert all("no <think> tag" not in message.text for one in log.samples for message in one.messages)
    assert len(log.samples) == 2
