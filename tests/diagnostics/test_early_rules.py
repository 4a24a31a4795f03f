"""Verdicts on learning before any reward, on figures made by hand."""

import pytest

from rehearsal.diagnostics import EARLY_RULES, judge_early

GOOD = {
    "expert/success": 1.0, "branches/states": 100.0, "branches/alternatives": 250.0, "reflections/asked": 100.0,
    "reflections/kept": 80.0, "reflections/label": 8.0, "reflections/future": 6.0, "before/world_nats": 1.2,
    "after/world_nats": 0.4, "before/action_nats": 1.3, "after/action_nats": 0.9, "before/success": 0.2,
    "before/success_low": 0.15, "before/success_high": 0.25, "after/success": 0.1, "after/success_low": 0.06,
    "after/success_high": 0.16,
}  # fmt: skip


def names(**changes):
    return [verdict.rule.name for verdict in judge_early({**GOOD, **changes})]


def test_nothing_is_said_where_nothing_is_wrong_or_measured():
    assert names() == []
    assert judge_early({}) == []
    assert judge_early({"reflections/asked": 0.0, "reflections/kept": 0.0, "reflections/label": 0.0}) == []


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"expert/success": 0.85}, "expert_fails", "85% of its episodes"),
        ({"branches/alternatives": 40.0}, "few_branches", "40 other actions were found in 100 states"),
        ({"reflections/label": 10.0, "reflections/future": 5.0}, "thoughts_tell", "10% gave away"),
        ({"reflections/kept": 24.0}, "few_thoughts", "Of 100 reflections 24 were kept"),
        ({"after/world_nats": 1.2}, "world_memorised", "words takes 1.20 nats, from 1.20"),
        ({"after/action_nats": 2.0}, "expert_memorised", "2.00 nats, from 1.30"),
        ({"after/success": 0.05, "after/success_high": 0.14}, "plays_worse", "from 20% to 5%"),
    ],
)
def test_each_rule(changes, name, words):
    assert names(**changes) == [name]
    (verdict,) = judge_early({**GOOD, **changes})
    assert words in verdict.evidence
    assert verdict.text().endswith(verdict.rule.suggestion)


def test_rules_have_names_of_their_own():
    assert len({rule.name for rule in EARLY_RULES}) == len(EARLY_RULES) == 7
