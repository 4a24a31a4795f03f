"""The algorithms by name, and what may be changed about each.

An algorithm is an advantage estimator, a list of objectives and a few switches; a preset is a set of options for them.
``preset("grpo", clip_high=0.28)`` starts from the options of GRPO and changes one.

Where a preset departs from the publication it is named after:

- ``grpo``: no KL term (the paper has 0.04 times k3; most of today's recipes have none). Set ``kl_coefficient``.
- ``rloo``: token ratios with PPO's clip instead of plain REINFORCE. With one update for each rollout the ratio is 1 and
  the gradient is the paper's over ``constant``; afterwards ``importance="sequence_product"`` has the ratio of whole
  sequences, as TRL does. No KL in the reward.
- ``reinforce_pp``: no KL in the reward; set ``kl_coefficient`` for a KL term in the loss instead.
- ``dapo``: the overlong penalty is off until ``overlong_max_tokens`` is set, as it depends on the task.
- ``cispo``: the absolute cap of 5 that ScaleRL recommends, with GRPO's advantages.
- all: off-policy weights between the sampling policy and the old one (``correction``), which are 1 when those are the
  same.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rehearsal.algorithms.aggregation import Aggregation, AggregationKind
from rehearsal.algorithms.batch import Objective
from rehearsal.algorithms.objectives import (
    CISPOLoss,
    EntropyBonus,
    Importance,
    KLEstimator,
    KLLoss,
    PolicyLoss,
    PolicyObjective,
    ValueLoss,
)
from rehearsal.algorithms.ratios import CorrectionMode, ImportanceCorrection
from rehearsal.algorithms.reward_parts import checked_parts
from rehearsal.algorithms.shaping import OverlongPenalty
from rehearsal.algorithms.soft_gates import SAPOLoss, VESPOLoss
from rehearsal.errors import RecipeError

Estimator = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae", "turn_gae", "bi_level_gae"
]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
CRITIC_ESTIMATORS = ("gae", "turn_gae", "bi_level_gae")
"""The estimators that need a critic."""
SEQUENTIAL_ESTIMATORS = ("reinforce_pp", *CRITIC_ESTIMATORS)
"""The estimators that look at when rewards came; the others compare the episodes of a group."""
WHITENED_ESTIMATORS = ("reinforce_pp_baseline", *SEQUENTIAL_ESTIMATORS)
"""The estimators whose advantages are whitened over the step unless said otherwise."""


@dataclass(frozen=True)
class AdvantageSettings:
    """Which advantage estimator, and its numbers.

    Attributes:
        estimator: one of :data:`ESTIMATORS`, see :mod:`rehearsal.algorithms.advantages`.
        gamma: discount of a sampled token (reinforce_pp, gae, bi_level_gae inside a turn).
        lam: lambda of GAE.
        turn_gamma: discount of a turn (turn_gae, bi_level_gae, and reinforce_pp when it discounts by turns).
        discount_unit: what reinforce_pp discounts by, "token" (as published) or "turn".
        eps: added to the deviation of a group (grpo).
        whiten: whether advantages are whitened over the step's sampled tokens; None for what is usual.
    """

    estimator: Estimator = "grpo"
    gamma: float = 1.0
    lam: float = 1.0
    turn_gamma: float = 0.95
    discount_unit: Literal["token", "turn"] = "token"
    eps: float = 1e-6
    whiten: bool | None = None

    @property
    def needs_critic(self) -> bool:
        return self.estimator in CRITIC_ESTIMATORS

    @property
    def is_sequential(self) -> bool:
        """Whether it looks at when rewards came, rather than at the episodes of a group."""
        return self.estimator in SEQUENTIAL_ESTIMATORS

    @property
    def whitens(self) -> bool:
        return self.estimator in WHITENED_ESTIMATORS if self.whiten is None else self.whiten


@dataclass(frozen=True)
class Options:
    """What may be changed about a preset, flat, as a recipe writes it.

    Attributes:
        advantage: the estimator; with gamma, lam, turn_gamma, discount_unit, advantage_eps and whiten as in
            :class:`AdvantageSettings`.
        loss: "clipped" for :class:`PolicyLoss`, "cispo" for :class:`CISPOLoss`, "sapo" for :class:`SAPOLoss`, "vespo"
            for :class:`VESPOLoss`.
        clip_low, clip_high, dual_clip, importance: see :class:`PolicyLoss`; only for ``loss="clipped"``.
        ratio_low, ratio_high: see :class:`CISPOLoss`; only for ``loss="cispo"``.
        temperature_positive, temperature_negative: see :class:`SAPOLoss`; only for ``loss="sapo"``.
        power_positive, decay_positive, power_negative, decay_negative: see :class:`VESPOLoss`; only for
            ``loss="vespo"``.
        correction, correction_low, correction_high: see :class:`rehearsal.algorithms.ratios.ImportanceCorrection`.
        aggregation, constant: see :class:`rehearsal.algorithms.aggregation.Aggregation`; for the policy and the KL
            term. The critic and the entropy are averaged over tokens.
        kl_coefficient, kl_estimator: see :class:`KLLoss`; no term at 0.
        entropy_coefficient: see :class:`EntropyBonus`; no term at 0.
        value_coefficient, value_clip: see :class:`ValueLoss`; only with an estimator that has a critic.
        dynamic_sampling: whether groups that the filter turns down (without a filter: those without reward
            variance) are replaced by fresh ones before the update.
        max_refill_tries: how many times at most.
        overlong_max_tokens, overlong_cache_tokens: see :class:`OverlongPenalty`; no penalty without the first, and a
            fifth of it (as published) without the second.
        mask_truncated: whether the policy does not learn from episodes that were cut off (overlong filtering).
        self_certainty: weight of the policy's certainty as a reward of its own, see
            :mod:`rehearsal.algorithms.intrinsic`; none at 0.
        reward_weight: weight of the environment's reward beside it; 0 learns without any reward.
        parts: weights of the parts of the reward, by name, which are then normalised apart (GDPO), see
            :func:`rehearsal.rewards.groups.normalised_apart` and
            :func:`rehearsal.algorithms.reward_parts.parts_matrix`. Empty for the sum of the rewards as it is.
        parameters: which parameters are updated, "all" or the name of an adapter.
    """

    advantage: Estimator = "grpo"
    gamma: float = 1.0
    lam: float = 1.0
    turn_gamma: float = 0.95
    discount_unit: Literal["token", "turn"] = "token"
    advantage_eps: float = 1e-6
    whiten: bool | None = None
    loss: Literal["clipped", "cispo", "sapo", "vespo"] = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    importance: Importance = "token"
    ratio_low: float = 0.0
    ratio_high: float = 5.0
    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    power_positive: float = 2.0
    decay_positive: float = 3.0
    power_negative: float = 3.0
    decay_negative: float = 2.0
    correction: CorrectionMode = "token_truncate"
    correction_low: float = 0.0
    correction_high: float = 2.0
    aggregation: AggregationKind = "token_mean"
    constant: float = 512.0
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3+"
    entropy_coefficient: float = 0.0
    value_coefficient: float = 0.1
    value_clip: float | None = 0.5
    dynamic_sampling: bool = False
    max_refill_tries: int = 10
    overlong_max_tokens: int | None = None
    overlong_cache_tokens: int | None = None
    mask_truncated: bool = False
    self_certainty: float = 0.0
    reward_weight: float = 1.0
    parts: dict[str, float] = field(default_factory=dict)
    parameters: str = "all"


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # PPO, arXiv:1707.06347, with the defaults of verl for language models (gamma = lambda = 1, dual clip 3).
    "ppo": {"advantage": "gae", "dual_clip": 3.0},
    # GRPO, arXiv:2402.03300.
    "grpo": {"advantage": "grpo", "aggregation": "sequence_mean"},
    # Dr. GRPO, arXiv:2503.20783.
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "constant"},
    # RLOO, arXiv:2402.14740. A constant instead of a length: the sum over a sequence, up to a scale.
    "rloo": {"advantage": "rloo", "aggregation": "constant"},
    # REINFORCE++, arXiv:2501.03262.
    "reinforce_pp": {"advantage": "reinforce_pp"},
    # DAPO, arXiv:2503.14476.
    "dapo": {"advantage": "grpo", "clip_high": 0.28, "dual_clip": 10.0, "dynamic_sampling": True},
    # GSPO, arXiv:2507.18071, section 5.1.
    "gspo": {
        "advantage": "grpo",
        "importance": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
        "correction": "sequence_truncate",
    },
    # CISPO, arXiv:2506.13585, with the cap of ScaleRL, arXiv:2510.13786.
    "cispo": {"advantage": "grpo", "loss": "cispo"},
    # SAPO, arXiv:2511.20347.
    "sapo": {"advantage": "grpo", "loss": "sapo", "aggregation": "sequence_mean"},
    # VESPO, arXiv:2602.10693, with the mean of TRL.
    "vespo": {"advantage": "grpo", "loss": "vespo"},
}
"""What each preset changes about the defaults of :class:`Options`."""

_OPTION_TYPES = get_type_hints(Options)
_NEVER_NEGATIVE = (
    "advantage_eps", "kl_coefficient", "entropy_coefficient", "value_coefficient", "max_refill_tries",
    "self_certainty", "reward_weight",
)  # fmt: skip
_ONLY_FOR_LOSS = {
    "clip_low": "clipped",
    "clip_high": "clipped",
    "dual_clip": "clipped",
    "importance": "clipped",
    "ratio_low": "cispo",
    "ratio_high": "cispo",
    "temperature_positive": "sapo",
    "temperature_negative": "sapo",
    "power_positive": "vespo",
    "decay_positive": "vespo",
    "power_negative": "vespo",
    "decay_negative": "vespo",
}


@dataclass(frozen=True)
class Algorithm:
    """What the learner needs to know.

    Attributes:
        name: of the preset it was made from.
        advantage: the estimator, read by :func:`rehearsal.algorithms.credit.token_advantages`.
        objectives: the terms of the loss, the policy's first.
        dynamic_sampling: whether groups that the step's filter turns down are replaced by fresh ones before the
            update. Without a filter, those without reward variance are.
        max_refill_tries: how many times at most.
        overlong: the penalty on long episodes, or None. ``token_advantages`` applies it.
        mask_truncated: whether the policy does not learn from episodes for which
            :func:`rehearsal.algorithms.shaping.was_cut_off` is True.
        self_certainty: weight of the policy's certainty as a reward of its own.
        reward_weight: weight of the environment's reward beside it.
        parts: weights of the parts of the reward where they are normalised apart.
        options: the options that it was made from, for reports and checkpoints.
    """

    name: str
    advantage: AdvantageSettings
    objectives: tuple[Objective, ...]
    dynamic_sampling: bool = False
    max_refill_tries: int = 10
    overlong: OverlongPenalty | None = None
    mask_truncated: bool = False
    self_certainty: float = 0.0
    reward_weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_critic(self) -> bool:
        """Whether values have to be computed before the update."""
        return self.advantage.needs_critic

    @property
    def aggregation(self) -> Aggregation:
        """The aggregation of the policy's objective."""
        return self.objectives[0].aggregation

    def describe(self) -> str:
        """A few plain lines for people."""
        how = self.advantage
        numbers = {
            "grpo": "reward less the group's mean, over its standard deviation",
            "dr_grpo": "reward less the group's mean",
            "rloo": "reward less the mean of the others in the group",
            "reinforce_pp": f"return to go, discount {how.gamma:g} a token"
            if how.discount_unit == "token"
            else f"return to go, discount {how.turn_gamma:g} a turn",
            "reinforce_pp_baseline": "reward less the group's mean",
            "gae": f"GAE over sampled tokens, gamma {how.gamma:g}, lambda {how.lam:g}",
            "turn_gae": f"GAE over turns, gamma {how.turn_gamma:g}, lambda {how.lam:g}",
            "bi_level_gae": f"GAE over turns (gamma {how.turn_gamma:g}) and inside each turn (gamma {how.gamma:g}), "
            f"lambda {how.lam:g}",
        }
        lines = [
            f"algorithm: {self.name}",
            f"advantage: {how.estimator} ({numbers[how.estimator]}{'; whitened' if how.whitens else ''})",
        ]
        if self.parts:
            weights = ", ".join(f"{weight:g} x {name}" for name, weight in self.parts.items())
            lines.append(f"parts of the reward, normalised apart: {weights}")
        lines += [f"objective: {_describe_objective(objective)}" for objective in self.objectives]
        lines.append(
            f"groups that teach nothing: replaced, {self.max_refill_tries} tries at most"
            if self.dynamic_sampling
            else "groups that teach nothing: not replaced"
        )
        if self.overlong is not None:
            begin = self.overlong.max_tokens - self.overlong.cache_tokens
            lines.append(f"overlong penalty: from {begin} to {self.overlong.max_tokens} sampled tokens, up to -1")
        if self.self_certainty:
            lines.append(f"self-certainty as a reward: {self.self_certainty:g} to {self.reward_weight:g} of the reward")
        if self.mask_truncated:
            lines.append("episodes that were cut off: the policy does not learn from them")
        return "\n".join(lines)


def _describe_objective(objective: Objective) -> str:
    if isinstance(objective, PolicyLoss):
        what = f"clipped {objective.importance} ratio, {1 - objective.clip_low:g} to {1 + objective.clip_high:g}"
        if objective.dual_clip is not None:
            what += f", dual clip {objective.dual_clip:g}"
    elif isinstance(objective, CISPOLoss):
        what = f"CISPO, ratio as a weight between {objective.ratio_low:g} and {objective.ratio_high:g}"
    elif isinstance(objective, SAPOLoss):
        what = f"SAPO, temperatures {objective.temperature_positive:g} and {objective.temperature_negative:g}"
    elif isinstance(objective, VESPOLoss):
        what = (
            f"VESPO, powers {objective.power_positive:g} and {objective.power_negative:g}, decays "
            f"{objective.decay_positive:g} and {objective.decay_negative:g}"
        )
    elif isinstance(objective, KLLoss):
        what = f"KL to the reference, estimator {objective.estimator}"
    elif isinstance(objective, ValueLoss):
        clip = "not clipped" if objective.clip is None else f"clipped at {objective.clip:g}"
        what = f"squared error of the critic, {clip}"
    else:
        what = objective.name
    where = "" if objective.parameters == "all" else f", updates {objective.parameters}"
    return f"{objective.name} x {objective.coefficient:g}: {what}; {objective.aggregation}{where}"


def preset(name: str, **overrides: Any) -> Algorithm:
    """The algorithm with this name, with some of its :class:`Options` changed.

    Args:
        name: a key of :data:`PRESETS`.
        overrides: options by name; a number may be given as int where a float is wanted.

    Raises:
        RecipeError: for an unknown name, an unknown option, a value of the wrong type or out of range, or an option
            that the algorithm does not read.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no algorithm {name!r}: choose one of {', '.join(sorted(PRESETS))}")
    for option, value in overrides.items():
        if option not in _OPTION_TYPES:
            raise RecipeError(
                f"algorithm {name!r} has no option {option!r}: choose among {', '.join(sorted(_OPTION_TYPES))}"
            )
        _check_type(option, value)
    options = Options(**{**PRESETS[name], **overrides})
    _check_values(name, options, overrides)
    return _build(name, options)


def _check_type(option: str, value: Any) -> None:
    """Whether a value fits its option; recipes are files, so this is the first time anybody looks."""
    wanted = _OPTION_TYPES[option]
    alternatives = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    names = []
    for kind in alternatives:
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            if value in choices:
                return
            names.append("one of " + ", ".join(choices))
        elif get_origin(kind) is dict:
            if isinstance(value, Mapping):
                return
            names.append("a table of weights")
        elif kind is type(None):
            if value is None:
                return
            names.append("nothing")
        else:
            accepted = (int, float) if kind is float else (kind,)
            # bool is an int to Python, but `clip_low = true` is a mistake.
            if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
                return
            names.append({float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind])
    raise RecipeError(f"option {option!r} must be {' or '.join(names)}, not {value!r}")


def _check_values(name: str, options: Options, overrides: Mapping[str, Any]) -> None:
    """Ranges that no other class looks after, and options that would be given and never read."""
    for option in ("gamma", "lam", "turn_gamma"):
        value = getattr(options, option)
        if not 0 <= value <= 1:
            raise RecipeError(f"option {option!r} must lie between 0 and 1, and is {value:g}")
    for option in _NEVER_NEGATIVE:
        value = getattr(options, option)
        if not value >= 0:
            raise RecipeError(f"option {option!r} must not be negative, and is {value:g}")
    for option in overrides:
        if _ONLY_FOR_LOSS.get(option, options.loss) != options.loss:
            raise RecipeError(f"option {option!r} does nothing in {name!r}, whose loss is {options.loss!r}")
    if options.reward_weight != 1.0 and not options.self_certainty:
        raise RecipeError("option 'reward_weight' does nothing without 'self_certainty'")
    if options.parts and options.advantage in SEQUENTIAL_ESTIMATORS:
        raise RecipeError(
            f"option 'parts' normalises parts of the reward within groups, which {options.advantage} does not; "
            "use grpo, dr_grpo, rloo or reinforce_pp_baseline"
        )
    if options.overlong_max_tokens is None and options.overlong_cache_tokens is not None:
        raise RecipeError("option 'overlong_cache_tokens' does nothing without 'overlong_max_tokens'")


def _build(name: str, options: Options) -> Algorithm:
    aggregation = Aggregation(options.aggregation, options.constant)
    correction = ImportanceCorrection(options.correction, options.correction_low, options.correction_high)
    advantage = AdvantageSettings(
        estimator=options.advantage,
        gamma=options.gamma,
        lam=options.lam,
        turn_gamma=options.turn_gamma,
        discount_unit=options.discount_unit,
        eps=options.advantage_eps,
        whiten=options.whiten,
    )
    objectives: list[Objective] = [_policy_objective(options, correction, aggregation)]
    if options.kl_coefficient > 0:
        objectives.append(
            KLLoss(options.kl_coefficient, options.kl_estimator, aggregation, parameters=options.parameters)
        )
    if options.entropy_coefficient > 0:
        objectives.append(EntropyBonus(options.entropy_coefficient, parameters=options.parameters))
    if advantage.needs_critic:
        objectives.append(ValueLoss(options.value_clip, options.value_coefficient, parameters=options.parameters))
    overlong = None
    if options.overlong_max_tokens is not None:
        cache = options.overlong_cache_tokens
        overlong = OverlongPenalty(
            options.overlong_max_tokens, max(1, options.overlong_max_tokens // 5) if cache is None else cache
        )
    return Algorithm(
        name=name,
        advantage=advantage,
        objectives=tuple(objectives),
        dynamic_sampling=options.dynamic_sampling,
        max_refill_tries=options.max_refill_tries,
        overlong=overlong,
        mask_truncated=options.mask_truncated,
        self_certainty=options.self_certainty,
        reward_weight=options.reward_weight,
        parts=checked_parts(options.parts, overlong is not None),
        options=asdict(options),
    )


def _policy_objective(options: Options, correction: ImportanceCorrection, aggregation: Aggregation) -> PolicyObjective:
    common: Any = {"correction": correction, "aggregation": aggregation, "parameters": options.parameters}
    if options.loss == "cispo":
        return CISPOLoss(options.ratio_low, options.ratio_high, **common)
    if options.loss == "sapo":
        return SAPOLoss(options.temperature_positive, options.temperature_negative, **common)
    if options.loss == "vespo":
        return VESPOLoss(
            options.power_positive, options.decay_positive, options.power_negative, options.decay_negative, **common
        )
    return PolicyLoss(options.clip_low, options.clip_high, options.dual_clip, options.importance, **common)


OPTION_NAMES: tuple[str, ...] = tuple(option.name for option in fields(Options))
"""The names of all options, in order."""
