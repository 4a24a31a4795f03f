"""Diagnostics in a run: what they measure, what they cost, and what happens on a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rehearsal.algorithms.filters import loss_scale
from rehearsal.diagnostics import RULES, Verdict, judge, thought_of_turn
from rehearsal.errors import CheckpointError, RecipeError
from rehearsal.training import learner as learner_module
from rehearsal.training import monitor as monitor_module
from rehearsal.training.batch import Batch
from rehearsal.training.checkpoint import standing_checkpoints
from rehearsal.training.choices import chosen
from rehearsal.training.export import export_policy
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.plan import describe_plan, memory_plan
from rehearsal.training.playing import policy_of
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder

THINKING = {"model__path": "base", "agent__thinking": True, "agent__max_tokens_per_turn": 48, "agent__max_context": 600}
"""The model that ships: it has thoughts."""


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_measured(small: Callable[..., Recipe]) -> None:
    recipe = small(
        evaluation__episodes=0, diagnostics__every=2, diagnostics__gradients_every=3, diagnostics__max_share=1.0,
        algorithm__options__entropy_coefficient=0.01, **THINKING,
    )  # fmt: skip
    trainer = Trainer(recipe)
    trainer.run()
    for i, row in enumerate(trainer.history):
        assert 0 <= row["signal/dead_groups"] <= 1
        assert row["behaviour/thought_tokens"] > 0
        assert row["policy/mismatch_first"] < 1e-5
        assert row["policy/effective_sample_share"] == pytest.approx(1.0, abs=1e-5)
        assert 0 < row["time/diagnostics_share"] < 1
        assert ("information/first/sequence/share" in row) == (i % 2 == 0)
        assert ("policy/kl_reference" in row) == (i % 2 == 1), "not where the thoughts are looked at"
        assert ("gradient/policy/norm" in row) == (i % 3 == 0)
        assert all(math.isfinite(value) for value in row.values())
    first = trainer.history[0]
    assert first["information/first/prompts"] >= 2
    assert first["information/first/sequence/entropy"] == pytest.approx(
        first["information/first/sequence/conditional_entropy"] + first["information/first/sequence/mutual_information"]
    )
    assert first["gradient/entropy/norm"] > 0


@pytest.mark.parametrize("truncation", [{"sampling__top_p": 0.9}, {"sampling__top_k": 5}])
def test_truncated_sampling_is_no_disagreement(truncation: dict[str, Any], small: Callable[..., Recipe]) -> None:
    """Its log-probs are over a part of the vocabulary, so the learner's differ from them however well both agree."""
    options = {
        "evaluation__episodes": 0, "training__old_logprobs": "recompute", "training__group_size": 6,
        "training__learning_rate": 1e-5, "diagnostics__every": 0,
    }  # fmt: skip
    trainer = Trainer(small(**options, **truncation))
    plain = Trainer(small(**options, training__steps=1))
    blind = Trainer(small(**options, **truncation, training__steps=1))
    blind.learner.truncated = False
    for one in (trainer, plain, blind):
        one.run()
    rows = [row for row in trainer.history if row["policy/updates"]]
    assert len(rows) >= 2
    for row in rows:
        assert not [name for name in row if "mismatch" in name]
        # Of a single update: the policy has not moved yet.
        assert row["policy/kl_sampling"] < 1e-6
        assert row["policy/effective_sample_share"] == pytest.approx(1.0, abs=1e-5)
        assert row["policy/entropy"] > 0
    assert plain.history[0]["policy/mismatch_first"] < 1e-5, "a control: without truncation it is told"
    assert blind.history[0]["policy/mismatch_first"] > 1e-4, "another: unlike distributions were compared"


def test_looking_changes_nothing(small: Callable[..., Recipe]) -> None:
    plain = Trainer(small(evaluation__episodes=0, diagnostics__every=0, diagnostics__gradients_every=0, **THINKING))
    plain.run()
    watched = Trainer(
        small(
            evaluation__episodes=0,
            diagnostics__every=1,
            diagnostics__gradients_every=1,
            diagnostics__max_share=1.0,
            **THINKING,
        )
    )
    watched.run()
    assert plain.policy is not None
    assert watched.policy is not None
    for (name, one), (_, other) in zip(
        plain.policy.model.named_parameters(), watched.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert "information/first/sequence/share" not in plain.history[0]


def test_thoughts_are_scored_with_the_policy_that_had_them(small: Callable[..., Recipe]) -> None:
    """Under its own prompt a thought is as likely as it was when it was sampled."""
    trainer = Trainer(small(evaluation__episodes=0, **THINKING))
    batch = trainer.play()
    rng = np.random.default_rng(0)
    table = monitor_module.first_turn_table(batch.groups, trainer.monitor._tags, rng, 10**9, 99, 99)
    assert table is not None
    scores_NM = table.scores(trainer.learner.score)
    sampled: dict[bytes, list[float]] = {}
    for group in batch.groups:
        for trajectory in group:
            segment = trajectory.segments[0]
            thought = thought_of_turn(segment, 0, trainer.monitor._tags)
            assert thought is not None
            begin = len(thought.prompt)
            total = float(segment.logprobs[begin : begin + len(thought.tokens)].sum())
            sampled.setdefault(segment.token_ids[: begin + len(thought.tokens)].tobytes(), []).append(total)
    for i, thought in enumerate(table.thoughts):
        key = np.concatenate([thought.prompt, thought.tokens]).tobytes()
        assert scores_NM[i, table.own[i]] == pytest.approx(sampled[key][0], abs=1e-3)


def test_a_run_without_thoughts_has_no_information_to_measure(small: Callable[..., Recipe]) -> None:
    trainer = Trainer(small(evaluation__episodes=0, training__steps=1, **THINKING | {"agent__thinking": False}))
    trainer.run()
    assert not any(name.startswith("information/") for name in trainer.history[0])
    assert "behaviour/answer_tokens" in trainer.history[0]


@pytest.mark.parametrize("size", [(1, 4), (3, 1), (1, 1)])
def test_a_single_prompt_and_groups_of_one(size: tuple[int, int], small: Callable[..., Recipe]) -> None:
    groups, each = size
    trainer = Trainer(
        small(
            evaluation__episodes=0, training__groups=groups, training__group_size=each, training__steps=2,
            diagnostics__every=1, diagnostics__gradients_every=1, diagnostics__max_share=1.0,
            algorithm__name="grpo" if each > 1 else "reinforce_pp",
        )
    )  # fmt: skip
    trainer.run()
    for row in trainer.history:
        assert all(math.isfinite(value) for value in row.values())
        assert ("signal/dead_groups" in row) == (each > 1), (
            "one episode alone is nothing to compare, and nothing is wrong"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "compares the episodes of a group, so training.group_size must be 2 or more"),
        ({"algorithm__name": "reinforce_pp", "filter__name": "constant"}, "set filter.name to none"),
    ],
)
def test_groups_of_one_where_groups_are_compared(
    options: dict[str, Any], message: str, small: Callable[..., Recipe]
) -> None:
    recipe = small(training__group_size=1, **options)
    for asked in (Trainer, describe_plan):
        with pytest.raises(RecipeError, match=message):
            asked(recipe)


class Cry:
    """A rule that holds from a step on, and ends as soon as it does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, begin: int, last: int = 99) -> None:
        def condition(series: Any, _: Any) -> str | None:
            return f"It is step {series.step}." if begin <= series.step <= last else None

        rules = [
            monitor_module.Watch()
            .rules[0]
            .__class__(rule.name, rule.title, rule.sentence, rule.suggestion, "train/reward", condition, 1, 1)
            for rule in RULES
            if rule.name == "too_hard"
        ]
        real = monitor_module.Watch
        monkeypatch.setattr(monitor_module, "Watch", lambda: real(rules=rules))


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []
        self.warned: list[str] = []

    def verdict(self, step: int, verdict: Verdict) -> None:
        self.heard.append((step, verdict.rule.name))

    def warning(self, sentence: str) -> None:
        if "verdict" in sentence or "checkpoint" in sentence:
            self.warned.append(sentence)


def test_a_verdict_is_told_when_it_is_called(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Cry(monkeypatch, 3)
    listener = Listener()
    result = train(small(), output=tmp_path / "run", observer=listener)
    assert listener.heard == [(3, "too_hard")]
    assert result.summary["verdicts"] == ["too_hard"]
    assert result.summary["steps"] == 4
    assert "ended_by" not in result.summary


def test_a_run_may_end_on_a_verdict(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Cry(monkeypatch, 2)
    listener = Listener()
    result = train(small(diagnostics__stop_on=["too_hard"]), output=tmp_path / "run", observer=listener)
    assert listener.warned == ["The run ends after step 2 by the verdict too_hard, as diagnostics.stop_on says."]
    assert result.summary["steps"] == 2
    assert "went_back_to" not in result.summary
    assert result.summary["ended_by"] == "too_hard"
    assert "success_after" in result.summary
    folder = RunFolder.open(tmp_path / "run")
    assert folder.info.status == "finished"
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    # Resumed with the same recipe it has nothing left to do.
    again = train(output=tmp_path / "run", resume=True)
    assert again.summary["ended_by"] == "too_hard"
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert len(RunFolder.open(tmp_path / "run").evaluations().rows) == 2
    # It can be taken further, from where it ended.
    further = train(
        output=tmp_path / "run", resume=True, overrides={"diagnostics.stop_on": []},
    )  # fmt: skip
    assert further.summary["steps"] == 4


def test_a_run_may_go_back_on_a_verdict(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Cry(monkeypatch, 3)
    # With room for one checkpoint alone: that of the end must not push out the one to go back to.
    recipe = small(diagnostics__go_back_on=["too_hard"], checkpoint__every=1, checkpoint__keep=1)
    listener = Listener()
    back = train(recipe, output=tmp_path / "back", observer=listener)
    assert (back.summary["steps"], back.summary["went_back_to"]) == (3, 2)
    assert listener.warned == [
        "The run ends after step 3 by the verdict too_hard, as diagnostics.go_back_on says.",
        "The policy is that of step 2, the last checkpoint before the verdict began.",
    ]
    monkeypatch.undo()
    two = train(small(training__steps=4), output=tmp_path / "two", observer=StopAfter(2))
    for (name, one), (_, other) in zip(
        back.policy.model.named_parameters(), two.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert RunFolder.open(tmp_path / "back").info.warnings == [
        "The policy is that of step 2, the last checkpoint before the verdict began."
    ]
    # What is exported is the policy that the run has, not that of its newest checkpoint.
    saved = AutoModelForCausalLM.from_pretrained(export_policy(tmp_path / "back", tmp_path / "exported"))
    for (name, one), (_, other) in zip(saved.named_parameters(), two.policy.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    # Resumed it goes on from there, and not from where it had come to; not from elsewhere if that is gone.
    kept = standing_checkpoints(RunFolder.open(tmp_path / "back"))[-1]
    kept.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="went back to its step 2, whose checkpoint is not there"):
        train(output=tmp_path / "back", resume=True, overrides={"diagnostics.go_back_on": []})
    (tmp_path / "elsewhere").rename(kept)
    further = train(
        output=tmp_path / "back", resume=True, overrides={"diagnostics.go_back_on": [], "checkpoint.keep": 9}
    )
    straight = train(small(training__steps=4), output=tmp_path / "straight")
    for (name, one), (_, other) in zip(
        further.policy.model.named_parameters(), straight.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert further.summary["steps"] == 4
    assert [row["step"] for row in rows_of(tmp_path / "back")] == [1, 2, 3, 4]
    info = RunFolder.open(tmp_path / "back").info
    assert (info.warnings, info.went_back_to) == ([], None)


def test_going_back_without_a_checkpoint_says_so(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Cry(monkeypatch, 1)
    listener = Listener()
    result = train(small(diagnostics__go_back_on=["too_hard"]), output=tmp_path / "run", observer=listener)
    assert result.summary["steps"] == 1
    assert "no checkpoint from before step 1" in RunFolder.open(tmp_path / "run").info.warnings[0]
    assert listener.warned[-1] == RunFolder.open(tmp_path / "run").info.warnings[0], "people are told too"
    assert "went_back_to" not in result.summary


def test_a_run_without_a_folder_cannot_go_back_and_says_so(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    Cry(monkeypatch, 1)
    listener = Listener()
    Trainer(small(diagnostics__go_back_on=["too_hard"], evaluation__episodes=0), observer=listener).run()
    assert listener.warned[-1].startswith("There is no checkpoint from before step 1")


def test_going_back_needs_checkpoints(small: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"go_back_on goes back to a checkpoint, and with checkpoint\.every = 0"):
        small(diagnostics__go_back_on=["too_hard"], checkpoint__every=0)
    small(diagnostics__stop_on=["too_hard"], checkpoint__every=0)


@pytest.mark.parametrize("option", ["stop_on", "go_back_on"])
@pytest.mark.parametrize(("last", "steps"), [(1, 4), (99, 2)])
def test_a_resumed_run_ends_on_a_verdict_that_stands(
    option: str, last: int, steps: int, small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recipe names it only now. One that has ended is past."""
    Cry(monkeypatch, 1, last)
    train(small(), output=tmp_path / "run", observer=StopAfter(2))
    further = train(output=tmp_path / "run", resume=True, overrides={f"diagnostics.{option}": ["too_hard"]})
    assert further.summary["steps"] == steps
    assert further.summary.get("ended_by") == ("too_hard" if last > 2 else None)


class StopAfter(SilentObserver):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def step(self, step: int, metrics: Any) -> None:
        self.trainer.stop_requested = step >= self.steps


def test_a_resumed_run_knows_its_verdicts(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Cry(monkeypatch, 1)
    train(small(), output=tmp_path / "run", observer=StopAfter(2))
    listener = Listener()
    result = train(output=tmp_path / "run", resume=True, observer=listener)
    assert listener.heard == [], "it was told before"
    assert result.summary["verdicts"] == ["too_hard"]


def test_a_resumed_run_knows_where_it_began(small: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = small(diagnostics__every=1, evaluation__episodes=0)
    whole = train(recipe, output=tmp_path / "whole")
    train(recipe, output=tmp_path / "run", observer=StopAfter(2))
    train(output=tmp_path / "run", resume=True)
    each = [[row["policy/kl_reference"] for row in rows_of(path)] for path in (whole.path, tmp_path / "run")]
    assert each[0] == each[1]
    assert each[0][0] < 1e-6 < min(each[0][1:])


def test_a_copy_of_the_start_is_kept_where_it_is_small(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(diagnostics__every=1, evaluation__episodes=0, training__steps=1)
    trained = 4 * sum(parameter.numel() for parameter in policy_of(recipe).model.parameters())
    for limit, every in ((trained, 1), (trained - 1, 1), (trained, 0)):
        monkeypatch.setattr(learner_module, "_START_BYTES", limit)
        chosen_recipe = small(diagnostics__every=every, evaluation__episodes=0, training__steps=1)
        trainer = Trainer(chosen_recipe)
        trainer.run()
        kept = limit == trained and every == 1
        assert ("policy/kl_reference" in trainer.history[0]) == kept
        assert memory_plan(chosen_recipe).get("policy at the start") == (trained if kept else None)


def test_verdicts_can_be_had_from_the_files(small: Callable[..., Recipe], tmp_path: Path) -> None:
    train(small(), output=tmp_path / "run")
    rows = RunFolder.open(tmp_path / "run").metrics().rows
    assert isinstance(judge(rows), list)


@pytest.mark.parametrize("option", ["stop_on", "go_back_on"])
def test_a_verdict_that_does_not_exist(option: str, small: Callable[..., Recipe]) -> None:
    recipe = small(**{f"diagnostics__{option}": ["collapse"]})
    for asked in (Trainer, describe_plan):
        with pytest.raises(RecipeError, match="There is no verdict 'collapse'; there are too_easy, too_hard"):
            asked(recipe)


def test_a_plan_names_filter_curriculum_and_verdicts(small: Callable[..., Recipe]) -> None:
    plan = describe_plan(
        small(
            filter__name="top_p", filter__options__p=0.5, curriculum__name="difficulty",
            algorithm__options__dynamic_sampling=True, diagnostics__stop_on=["format_lost"],
        )
    )  # fmt: skip
    assert "filter: top_p p=0.5, refilled up to 10 times" in plan
    assert "curriculum: difficulty" in plan
    assert "a verdict that ends the run: format_lost" in plan
    with pytest.raises(RecipeError, match="There is no filter 'foo'"):
        describe_plan(small(filter__name="foo"))


def test_filters_in_a_run(small: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = small(filter__name="top_k", filter__options__k=2, filter__loss_scaling="sqrt", evaluation__episodes=0)
    train(recipe, output=tmp_path / "run")
    for row in rows_of(tmp_path / "run"):
        assert row["signal/kept_groups"] <= 2
        assert row["signal/kept_share"] == row["signal/kept_groups"] / 4
        assert row["signal/kept_episodes"] == row["signal/kept_groups"] * 3
        assert row["policy/updates"] == float(row["signal/kept_groups"] > 0)


REFILLED: list[tuple[str, dict[str, Any]]] = [
    ("none", {}), ("constant", {}), ("top_p", {}), ("top_k", {}), ("top_k", {"k": 4}), ("top_k", {"k": 1.0}),
    ("min_p", {}), ("random", {}), ("random", {"like": "top_k", "k": 4}), ("extremes", {"top": 1, "bottom": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), REFILLED)
def test_refilling_goes_with_every_filter(name: str, options: dict[str, Any], small: Callable[..., Recipe]) -> None:
    def play(tries: int) -> Batch:
        recipe = small(
            algorithm__options__dynamic_sampling=True, algorithm__options__max_refill_tries=tries, filter__name=name,
            filter__options=options, filter__loss_scaling="share", evaluation__episodes=0,
        )  # fmt: skip
        trainer = Trainer(recipe)
        batch = trainer.play()
        trainer.close()
        assert 1 <= batch.rounds <= tries + 1
        assert len(batch.kept.reasons) == len(batch.groups)
        return batch

    batch = play(10)
    assert int(batch.kept.keep_P.sum()) == 4, "it is really filled"
    assert batch.rounds > 1
    assert len(batch.groups) > 4
    # Two of three episodes of each group are the extremes; of the other filters every group is whole.
    assert loss_scale(batch.kept, "share", 4) == pytest.approx(2 / 3 if name == "extremes" else 1.0)
    assert batch.kept.share < loss_scale(batch.kept, "share", 4)
    assert np.array_equal(play(10).kept.keep_PG, batch.kept.keep_PG)
    short = play(1)
    assert short.rounds == 2
    assert int(short.kept.keep_P.sum()) < 4, "a control: one round more is not enough"
    assert loss_scale(short.kept, "share", 4) < loss_scale(batch.kept, "share", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"filter__name": "top_k", "filter__options__k": 3},
            "^With filter.options.k at 3 dynamic sampling never fills a step of 4 groups: set filter.options.k to 4 or",
        ),
        ({"filter__name": "random", "filter__options": {"like": "top_k", "k": 1}}, "never fills a step of 4 groups:"),
        (
            {
                "filter__name": "top_k", "filter__options__k": 2,
                "mixture": [{"name": "frozenlake", "weight": 3.0}, {"name": "bandit"}],
            },
            "never fills a step of 3 groups of one environment: set filter.options.k to 3",
        ),
    ],
)  # fmt: skip
def test_a_filter_that_never_lets_a_step_be_filled(
    options: dict[str, Any], message: str, small: Callable[..., Recipe]
) -> None:
    for asked in (chosen, describe_plan):
        with pytest.raises(RecipeError, match=message):
            asked(small(algorithm__options__dynamic_sampling=True, **options))
    chosen(small(**options))
    chosen(small(algorithm__options__dynamic_sampling=True, **{**options, "training__groups": 1}))


def test_scaling_by_what_is_kept_needs_a_filter(small: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="scales by what a filter keeps, and there is none"):
        chosen(small(filter__loss_scaling="share"))
    chosen(small(filter__loss_scaling="share", filter__name="constant"))
    chosen(small(filter__loss_scaling="share", algorithm__options__dynamic_sampling=True))
