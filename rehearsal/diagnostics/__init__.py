"""Is the learning signal real? Measures on trajectories and the policy, and what they say in plain words.

Does the reasoning depend on the input (:mod:`~rehearsal.diagnostics.information`), is there anything to compare
(:mod:`~rehearsal.diagnostics.rewards`), what does the agent do (:mod:`~rehearsal.diagnostics.behaviour`), and what is
wrong and what to try (:mod:`~rehearsal.diagnostics.verdict`). Nothing here knows of the loop.
"""

from rehearsal.diagnostics.behaviour import behaviour_metrics
from rehearsal.diagnostics.early_rules import EARLY_RULES, judge_early
from rehearsal.diagnostics.information import Information, SmoothedDeviation, information
from rehearsal.diagnostics.rewards import signal_metrics
from rehearsal.diagnostics.rules import RULE_NAMES, RULES, Rule, Thresholds
from rehearsal.diagnostics.series import Series
from rehearsal.diagnostics.thoughts import (
    CrossTable,
    Tags,
    Thought,
    ThoughtInformation,
    any_turn_table,
    first_turn_table,
    measure,
    thought_of_turn,
)
from rehearsal.diagnostics.verdict import Unheard, Verdict, Watch, judge, unheard

__all__ = [
    "EARLY_RULES",
    "RULES",
    "RULE_NAMES",
    "CrossTable",
    "Information",
    "Rule",
    "Series",
    "SmoothedDeviation",
    "Tags",
    "Thought",
    "ThoughtInformation",
    "Thresholds",
    "Unheard",
    "Verdict",
    "Watch",
    "any_turn_table",
    "behaviour_metrics",
    "first_turn_table",
    "information",
    "judge",
    "judge_early",
    "measure",
    "signal_metrics",
    "thought_of_turn",
    "unheard",
]
