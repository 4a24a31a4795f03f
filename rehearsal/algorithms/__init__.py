"""What to learn from a step: advantages, filters and the terms of the loss.

Pure functions and small dataclasses: no models, no sampling, no files. A :class:`Filter` says which groups
the policy learns from; the learner calls, in this order, :func:`token_advantages` (whole step), ``objective.mask`` and
:meth:`StepTotals.count` (whole step), and then for every micro-batch ``objective(batch, output)`` and
:func:`token_weights`.
"""

from rehearsal.algorithms.aggregation import AGGREGATIONS, Aggregation, StepTotals, token_weights
from rehearsal.algorithms.batch import Objective, PolicyOutput, TokenBatch, TokenLoss
from rehearsal.algorithms.credit import SequenceRewards, token_advantages
from rehearsal.algorithms.filters import FILTERS, Filter, Kept, make_filter
from rehearsal.algorithms.objectives import CISPOLoss, EntropyBonus, KLLoss, PolicyLoss, ValueLoss
from rehearsal.algorithms.presets import (
    ESTIMATORS,
    OPTION_NAMES,
    PRESETS,
    AdvantageSettings,
    Algorithm,
    Options,
    preset,
)
from rehearsal.algorithms.ratios import CORRECTIONS, ImportanceCorrection
from rehearsal.algorithms.shaping import OverlongPenalty, was_cut_off
from rehearsal.algorithms.soft_gates import SAPOLoss, VESPOLoss
from rehearsal.algorithms.variance import has_variance

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "FILTERS",
    "OPTION_NAMES",
    "PRESETS",
    "AdvantageSettings",
    "Aggregation",
    "Algorithm",
    "CISPOLoss",
    "EntropyBonus",
    "Filter",
    "ImportanceCorrection",
    "KLLoss",
    "Kept",
    "Objective",
    "Options",
    "OverlongPenalty",
    "PolicyLoss",
    "PolicyOutput",
    "SAPOLoss",
    "SequenceRewards",
    "StepTotals",
    "TokenBatch",
    "TokenLoss",
    "VESPOLoss",
    "ValueLoss",
    "has_variance",
    "make_filter",
    "preset",
    "token_advantages",
    "token_weights",
    "was_cut_off",
]
