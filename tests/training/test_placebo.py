"""The placebo: the same answers, none of them where it is true, as far as that can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rehearsal as rh
from rehearsal.agents.agent import Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import Hindsight, speaker_of
from rehearsal.algorithms.presets import preset
from rehearsal.models.adapters import AdapterSettings, adapter_names, add_adapters
from rehearsal.training.learner import Learner
from rehearsal.training.options import TrainingOptions
from rehearsal.training.placebo import deal, with_other_answers, with_shuffled_answers
from rehearsal.training.sequences import answer_mask
from rehearsal.training.world import world_model
from rehearsal.trajectory import Group

MakeGroups = Callable[..., list[Group]]


def situation(answer: list[int], environment: str = "desk", meaning: str = "", speaker: str = "") -> Hindsight:
    ids = np.array([1, 2, 3, *answer], dtype=np.int32)
    return Hindsight(ids, 3, "company", environment, False, meaning, speaker)


def answers_of(situations: list[Hindsight]) -> list[tuple[int, ...]]:
    return [tuple(one.token_ids[one.first :].tolist()) for one in situations]


@given(
    st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 2), min_size=30, max_size=30),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_as_few_stay_true_as_can_be(meanings: list[int], speakers: list[int], seed: int) -> None:
    count = len(meanings)
    dealt, stayed = deal(meanings, [["all"] * count], np.random.default_rng(seed))
    assert sorted(dealt.tolist()) == list(range(count))
    most = max((meanings.count(meaning) for meaning in set(meanings)), default=0)
    # Where one meaning has more than half of the places, the others cannot fill all that it leaves.
    fewest = max(0, 2 * most - count)
    true = sum(meanings[number] == meaning for number, meaning in zip(dealt, meanings, strict=True))
    assert true == fewest
    assert math.isnan(stayed) if not count else stayed == true / count
    # With speakers first, the same number at the end, and nobody speaks for another one without need.
    by_speaker = speakers[:count]
    dealt, again = deal(meanings, [by_speaker, ["all"] * count], np.random.default_rng(seed))
    assert sorted(dealt.tolist()) == list(range(count))
    assert math.isnan(again) or again <= 1.0
    apart = {who: [m for m, s in zip(meanings, by_speaker, strict=True) if s == who] for who in set(by_speaker)}
    if all(2 * max(own.count(meaning) for meaning in own) <= len(own) for own in apart.values()):
        assert all(by_speaker[number] == who for number, who in zip(dealt, by_speaker, strict=True))
        assert again == 0.0 or not count


def test_every_answer_gets_everywhere() -> None:
    # A rotation would have no true answers either, but a company would always hear the same other one.
    got: list[set[int]] = [set() for _ in range(4)]
    for seed in range(200):
        dealt, _ = deal([0, 1, 2, 3], [["all"] * 4], np.random.default_rng(seed))
        for place, number in enumerate(dealt):
            got[place].add(int(number))
    assert got == [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}]


def test_clerks_speak_to_clerks_and_forms_to_forms() -> None:
    clerks = [situation([10, i], meaning=f"wants {i}", speaker="Clerk") for i in range(6)]
    forms = [situation([20, i], meaning=f"wants {i}", speaker="Form") for i in range(4)]
    for seed in range(20):
        dealt, stayed = with_other_answers([*clerks, *forms], np.random.default_rng(seed))
        assert [answer[0] for answer in answers_of(dealt)] == [10] * 6 + [20] * 4
        assert stayed == 0.0


def test_a_speaker_with_one_answer_changes_with_another_one() -> None:
    clerks = [situation([10, i], meaning=f"wants {i}", speaker="Clerk") for i in range(6)]
    form = situation([20, 9], meaning="wants nothing", speaker="Form")
    dealt, stayed = with_other_answers([*clerks, form], np.random.default_rng(0))
    assert stayed == 0.0
    assert answers_of(dealt)[-1][0] == 10


def test_other_words_of_the_same_are_no_placebo() -> None:
    pin = [situation([10, i], meaning="wants pin", speaker="Clerk") for i in range(5)]
    card = [situation([11, i], meaning="wants card", speaker="Clerk") for i in range(5)]
    for seed in range(20):
        dealt, stayed = with_other_answers([*pin, *card], np.random.default_rng(seed))
        assert [answer[0] for answer in answers_of(dealt)] == [11] * 5 + [10] * 5
        assert stayed == 0.0
    _, stayed = with_other_answers([*pin, *pin, *card], np.random.default_rng(0))
    assert stayed == pytest.approx(5 / 15), "five of ten cannot get one of the five others"


def test_environments_keep_their_answers_to_themselves() -> None:
    desk, lake = [situation([10])] * 3, [situation([20 + i], "lake") for i in range(3)]
    dealt, stayed = with_other_answers([*desk, *lake], np.random.default_rng(0))
    assert [answer[0] >= 20 for answer in answers_of(dealt)] == [False] * 3 + [True] * 3
    assert stayed == 0.5


@pytest.mark.parametrize(
    ("answer", "speaker"),
    [
        ("Clerk: We need the pin.", "Clerk"),
        ("Form: You must enter the card.", "Form"),
        ("Head clerk: No.", "Head clerk"),
        ("You have it. Ready: pin.", ""),
        ("P _ _\n_ O G", ""),
        ("12: no", ""),
        ("", ""),
    ],
)
def test_speakers(answer: str, speaker: str) -> None:
    assert speaker_of(answer) == speaker


def test_the_help_desk_says_what_its_answers_mean() -> None:
    env: Any = rh.make("helpdesk")
    words: dict[str, set[str]] = {}
    for seed in range(60):
        env.reset(seed=seed)
        reach = "call" if env.describe()["channel"] == "phone" else "open form"
        observation, *_, info = env.step(reach)
        words.setdefault(info["meaning"], set()).add(observation)
        assert all((fact in info["meaning"]) == (fact in env.wanted) for fact in ("pin", "card", "document")), info
    assert len(words) < 40 < sum(map(len, words.values())), "many words for few meanings"


def test_the_meaning_reaches_what_was_rehearsed_and_the_turns(make_groups: MakeGroups) -> None:
    from rehearsal.agents.play import play_actions
    from rehearsal.trajectory import Turn

    env = rh.make("helpdesk")
    env.reset(seed=0)
    result = play_actions(env, Turn("", actions=["ask pin"]), Protocol(), Limits.for_env(env).max_actions)
    assert result.meaning == result.observation == "You have it. Ready: pin."


@pytest.fixture
def episodes(tiny_qwen3: Callable[..., Any], make_groups: MakeGroups) -> tuple[Any, list[Group]]:
    model = add_adapters(tiny_qwen3(initializer_range=0.2), AdapterSettings(3, 5))
    return model, make_groups(model, groups=6)


def test_a_step_tells_how_much_stayed_true(episodes: tuple[Any, list[Group]]) -> None:
    model, groups = episodes
    world = world_model("placebo", adapter_names(model))
    learner = Learner(model, preset("grpo"), TrainingOptions(learning_rate=1e-3), world=world)
    alike = [situation([10, i], meaning="wants pin") for i in range(3)]
    figures = learner.step(groups, 0, situations={"hindsight": [*alike, situation([11], meaning="wants card")]})
    assert figures["world/stayed_true"] == 0.0
    assert figures["hindsight/stayed_true"] == 0.5
    for group in groups:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.meaning = "the same"
    figures = learner.step(groups, 1)
    assert figures["world/stayed_true"] == 1.0
    learner.world = world_model("dual", adapter_names(model))
    assert "world/stayed_true" not in learner.step(groups, 2)


def test_what_is_not_learnt_is_not_dealt_out(episodes: tuple[Any, list[Group]]) -> None:
    _, groups = episodes
    for group in groups[:3]:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.foreseeable = True
    dealt, stayed = with_shuffled_answers(groups, np.random.default_rng(0), foreseeable=False)
    assert stayed == 0.0
    changed = [
        not np.array_equal(a.segments[0].token_ids, b.segments[0].token_ids)
        for old, new in zip(groups, dealt, strict=True)
        for a, b in zip(old, new, strict=True)
    ]
    answered = [bool(answer_mask(t.segments[0]).any()) for group in groups for t in group]
    assert changed == [False] * 9 + answered[9:]
