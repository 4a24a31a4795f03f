"""Algorithms by name."""

from __future__ import annotations

import pytest

from rehearsal.algorithms import (
    ESTIMATORS,
    OPTION_NAMES,
    PRESETS,
    Aggregation,
    CISPOLoss,
    EntropyBonus,
    KLLoss,
    OverlongPenalty,
    PolicyLoss,
    SAPOLoss,
    StepTotals,
    ValueLoss,
    VESPOLoss,
    preset,
    token_weights,
)
from rehearsal.errors import RecipeError


def test_the_names():
    wanted = {"ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "cispo", "sapo", "vespo"}
    assert set(PRESETS) == wanted


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_describes_itself_and_runs(name, make_batch):
    algorithm = preset(name)
    assert algorithm.name == name
    assert algorithm.needs_critic == (name == "ppo")
    assert algorithm.describe().startswith(f"algorithm: {name}\nadvantage: ")
    assert 4 <= len(algorithm.describe().splitlines()) <= 8
    batch, output = make_batch()
    for objective in algorithm.objectives:
        result = objective(batch, output)
        totals = StepTotals.count(result.mask_N, batch.sequence_N, batch.n_sequences)
        weights_N = token_weights(objective.aggregation, result.mask_N, batch.sequence_N, totals)
        assert (result.loss_N * weights_N).sum().isfinite()
        assert not objective.needs_reference


def test_what_each_preset_stands_for():
    ppo, grpo, dr_grpo, rloo = (preset(name) for name in ("ppo", "grpo", "dr_grpo", "rloo"))
    assert [type(o) for o in ppo.objectives] == [PolicyLoss, ValueLoss]
    assert (ppo.advantage.estimator, ppo.advantage.whitens, ppo.objectives[0].dual_clip) == ("gae", True, 3.0)
    assert (grpo.advantage.estimator, grpo.aggregation.kind) == ("grpo", "sequence_mean")
    assert (dr_grpo.advantage.estimator, dr_grpo.aggregation.kind) == ("dr_grpo", "constant")
    assert (rloo.advantage.estimator, rloo.aggregation.kind, rloo.advantage.whitens) == ("rloo", "constant", False)
    assert preset("reinforce_pp").advantage.whitens
    dapo, gspo, cispo = (preset(name) for name in ("dapo", "gspo", "cispo"))
    policy = dapo.objectives[0]
    assert (policy.clip_low, policy.clip_high, policy.dual_clip) == (0.2, 0.28, 10.0)
    assert (dapo.aggregation.kind, dapo.dynamic_sampling, dapo.max_refill_tries) == ("token_mean", True, 10)
    policy = gspo.objectives[0]
    assert (policy.importance, policy.clip_low, policy.clip_high) == ("sequence", 3e-4, 4e-4)
    assert gspo.aggregation.kind == "sequence_mean"
    assert isinstance(cispo.objectives[0], CISPOLoss)
    assert (cispo.objectives[0].ratio_low, cispo.objectives[0].ratio_high) == (0.0, 5.0)
    assert preset("sapo").objectives == (SAPOLoss(1.0, 1.05, aggregation=Aggregation("sequence_mean")),)
    assert preset("vespo").objectives == (VESPOLoss(2.0, 3.0, 3.0, 2.0),)


def test_overrides_reach_the_parts():
    algorithm = preset(
        "grpo",
        clip_high=0.3,
        advantage="bi_level_gae",
        gamma=1,
        turn_gamma=0.9,
        kl_coefficient=0.01,
        kl_estimator="k3",
        entropy_coefficient=0.002,
        value_clip=None,
        aggregation="constant",
        constant=100,
        overlong_max_tokens=50,
        mask_truncated=True,
        parameters="actor",
        correction="sequence_mask",
        correction_high=3.0,
    )
    policy, kl, entropy, value = algorithm.objectives
    assert (policy.clip_high, policy.correction.mode, policy.correction.high) == (0.3, "sequence_mask", 3.0)
    assert isinstance(kl, KLLoss)
    assert (kl.coefficient, kl.estimator, kl.aggregation) == (0.01, "k3", Aggregation("constant", 100))
    assert isinstance(entropy, EntropyBonus)
    assert entropy.coefficient == 0.002
    assert (value.clip, value.parameters) == (None, "actor")
    assert algorithm.overlong == OverlongPenalty(50, 10)
    assert algorithm.mask_truncated
    assert algorithm.needs_critic
    assert (algorithm.options["turn_gamma"], set(algorithm.options)) == (0.9, set(OPTION_NAMES))
    text = algorithm.describe()
    for words in ("bi_level_gae", "gamma 0.9", "k3", "constant (100 tokens)", "updates actor", "from 40 to 50"):
        assert words in text
    assert "cut off" in text


def test_options_rebuild_the_algorithm():
    """What a checkpoint stores is enough, apart from options that the loss does not read."""
    algorithm = preset("dapo", clip_low=0.1, overlong_max_tokens=100, overlong_cache_tokens=30)
    others = {"ratio_low", "ratio_high", "temperature_positive", "temperature_negative"}
    others |= {f"{what}_{sign}" for what in ("power", "decay") for sign in ("positive", "negative")}
    stored = {k: v for k, v in algorithm.options.items() if k not in others}
    assert preset("dapo", **stored) == algorithm


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_can_be_described(estimator):
    assert f"advantage: {estimator} (" in preset("grpo", advantage=estimator).describe()


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("grop", {}, "ppo"),
        ("grpo", {"clip": 0.2}, "clip_high"),
        ("grpo", {"advantage": "vtrace"}, "bi_level_gae"),
        ("grpo", {"aggregation": "mean"}, "token_mean"),
        ("grpo", {"clip_high": "0.2"}, "a number"),
        ("grpo", {"clip_high": True}, "a number"),
        ("grpo", {"clip_high": None}, "a number"),
        ("grpo", {"clip_high": -0.1}, "clip_high"),
        ("grpo", {"dynamic_sampling": 1}, "true or false"),
        ("grpo", {"max_refill_tries": 2.5}, "a whole number"),
        ("grpo", {"overlong_max_tokens": 2.5}, "a whole number or nothing"),
        ("grpo", {"overlong_cache_tokens": 5}, "overlong_max_tokens"),
        ("grpo", {"overlong_max_tokens": 5, "overlong_cache_tokens": 6}, "cache_tokens"),
        ("grpo", {"gamma": 1.1}, "between 0 and 1"),
        ("grpo", {"lam": float("nan")}, "between 0 and 1"),
        ("grpo", {"kl_coefficient": -1.0}, "negative"),
        ("grpo", {"ratio_high": 5.0}, "does nothing"),
        ("cispo", {"clip_high": 0.2}, "does nothing"),
        ("sapo", {"power_positive": 2.0}, "does nothing"),
        ("sapo", {"temperature_negative": 0.0}, "temperatures"),
        ("vespo", {"temperature_negative": 1.0}, "does nothing"),
        ("vespo", {"correction": "sequence_truncate"}, "token_truncate"),
        ("grpo", {"constant": 0}, "positive"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(name, overrides, words):
    with pytest.raises(RecipeError) as caught:
        preset(name, **overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
