"""Objectives: by hand, by numeric differentiation, and where numbers explode or are missing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rehearsal.algorithms import (
    CORRECTIONS,
    CISPOLoss,
    EntropyBonus,
    ImportanceCorrection,
    KLLoss,
    PolicyLoss,
    PolicyOutput,
    SAPOLoss,
    TokenBatch,
    ValueLoss,
    VESPOLoss,
)
from rehearsal.errors import RecipeError
from rehearsal.trajectory import Kind

NONE = ImportanceCorrection("none")
OBJECTIVES = {
    "ppo": PolicyLoss(),
    "ppo dual": PolicyLoss(dual_clip=3.0, clip_high=0.28),
    "gspo": PolicyLoss(importance="sequence", clip_low=3e-4, clip_high=4e-4),
    "whole sequences": PolicyLoss(importance="sequence_product"),
    "cispo": CISPOLoss(),
    "sapo": SAPOLoss(),
    "vespo": VESPOLoss(),
    "k1": KLLoss(estimator="k1"),
    "k2": KLLoss(estimator="k2"),
    "k3": KLLoss(estimator="k3"),
    "k3+": KLLoss(estimator="k3+"),
    "entropy": EntropyBonus(),
    "value": ValueLoss(),
    "value unclipped": ValueLoss(clip=None),
}


def one_sequence(logprobs, *, old, advantages, rollout=None, reference=None):
    """One sequence of sampled tokens with what a policy objective reads."""
    n = len(logprobs)
    tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    batch = TokenBatch(
        token_ids_N=torch.arange(n),
        kinds_N=torch.full((n,), int(Kind.ACTION), dtype=torch.int8),
        turns_N=torch.zeros(n, dtype=torch.int64),
        sequence_N=torch.zeros(n, dtype=torch.int64),
        n_sequences=1,
        advantages_N=tensor(advantages),
        policy_mask_N=torch.ones(n, dtype=torch.bool),
        rollout_logprobs_N=tensor(old if rollout is None else rollout),
        old_logprobs_N=tensor(old),
        reference_logprobs_N=None if reference is None else tensor(reference),
    )
    return batch, PolicyOutput(tensor(logprobs).requires_grad_())


def at_ratios(ratios, advantages):
    return one_sequence([math.log(r) - 1 for r in ratios], old=[-1.0] * len(ratios), advantages=advantages)


def gradient(loss_N, leaf):
    return torch.autograd.grad(loss_N.sum(), leaf)[0]


# By hand --------------------------------------------------------------------------------------------------------------


def test_ppo_by_hand():
    batch, output = at_ratios([1.5, 1.5, 0.5, 0.5, 1.1, 20.0], [1.0, -1.0, 1.0, -1.0, 2.0, -1.0])
    result = PolicyLoss(clip_low=0.2, clip_high=0.28, dual_clip=3.0)(batch, output)
    expected = torch.tensor([-1.28, 1.5, -0.5, 0.8, -2.2, 3.0], dtype=torch.float64)
    torch.testing.assert_close(result.loss_N.detach(), expected)
    # Clipped tokens have no gradient; that of the others is -ratio * advantage.
    expected_gradient = torch.tensor([0, 1.5, -0.5, 0, -2.2, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient(result.loss_N, output.logprobs_N), expected_gradient)
    assert result.metrics_N["clipped_high"].tolist() == [1, 0, 0, 0, 0, 0]
    assert result.metrics_N["clipped_low"].tolist() == [0, 0, 0, 1, 0, 0]
    assert result.metrics_N["dual_clipped"].tolist() == [0, 0, 0, 0, 0, 1]


def test_cispo_by_hand_keeps_the_gradient_of_clipped_tokens():
    batch, output = at_ratios([9.0, 0.1, 1.0], [1.0, -1.0, 2.0])
    result = CISPOLoss(ratio_low=0.5, ratio_high=5.0)(batch, output)
    expected = torch.tensor([-5.0, 0.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(result.loss_N, output.logprobs_N), expected)
    torch.testing.assert_close(result.loss_N.detach(), expected * output.logprobs_N.detach())
    assert result.metrics_N["clipped_high"].tolist() == [1, 0, 0]
    assert result.metrics_N["clipped_low"].tolist() == [0, 1, 0]


def test_gspo_by_hand():
    """All tokens of a sequence have the geometric mean of their ratios, and each its own gradient."""
    batch, output = at_ratios([2.0, 0.5, 2.0, 2.0], [1.0] * 4)
    ratio = 2**0.5
    result = PolicyLoss(importance="sequence", clip_high=1.0)(batch, output)
    torch.testing.assert_close(result.loss_N.detach(), torch.full((4,), -ratio, dtype=torch.float64))
    torch.testing.assert_close(
        gradient(result.loss_N, output.logprobs_N), torch.full((4,), -ratio, dtype=torch.float64)
    )
    clipped = PolicyLoss(importance="sequence", clip_high=0.1)(batch, output)
    assert not gradient(clipped.loss_N, output.logprobs_N).any()


@pytest.mark.parametrize("importance", ["sequence", "sequence_product"])
def test_sequence_ratio_looks_at_the_tokens_of_the_mask_only(make_batch, importance):
    batch, output = make_batch((6, 4))
    objective = PolicyLoss(importance=importance, clip_low=1.0, clip_high=10.0)
    ratio_N = objective(batch, output).metrics_N["ratio"]
    for sequence in range(2):
        chosen = (batch.sequence_N == sequence) & batch.policy_mask_N
        logs_N = (output.logprobs_N - batch.old_logprobs_N)[chosen]
        expected = (logs_N.mean() if importance == "sequence" else logs_N.sum()).exp()
        torch.testing.assert_close(ratio_N[chosen], expected.detach().expand(int(chosen.sum())))


def test_value_loss_by_hand():
    batch, output = one_sequence([0.0] * 4, old=[0.0] * 4, advantages=[0.0] * 4)
    batch = dataclasses.replace(
        batch,
        old_values_N=torch.tensor([0.0, 0.0, 0.0, 0.0]),
        returns_N=torch.tensor([1.0, 1.0, 0.25, torch.nan]),
    )
    values_N = torch.tensor([2.0, 0.25, 1.0, 5.0], requires_grad=True)
    result = ValueLoss(clip=0.5)(batch, PolicyOutput(output.logprobs_N, values_N=values_N))
    # clipped values 0.5, 0.25, 0.5; squared errors max(1, .25), .5625, max(.5625, .0625); the fourth has no return
    torch.testing.assert_close(result.loss_N.detach(), torch.tensor([0.5, 0.28125, 0.28125, 0.0]))
    assert result.mask_N.tolist() == [True, True, True, False]
    torch.testing.assert_close(gradient(result.loss_N, values_N), torch.tensor([1.0, -0.75, 0.75, 0.0]))


def test_the_clipped_error_of_a_value_that_ran_away_has_no_gradient():
    batch, output = one_sequence([0.0], old=[0.0], advantages=[0.0])
    batch = dataclasses.replace(batch, old_values_N=torch.tensor([0.0]), returns_N=torch.tensor([0.9]))
    values_N = torch.tensor([0.8], requires_grad=True)
    result = ValueLoss(clip=0.5)(batch, PolicyOutput(output.logprobs_N, values_N=values_N))
    torch.testing.assert_close(result.loss_N.detach(), torch.tensor([0.08]))
    assert gradient(result.loss_N, values_N).item() == 0
    assert result.metrics_N["clipped"].tolist() == [1]


def test_entropy_bonus_raises_the_entropy(make_batch):
    batch, output = make_batch()
    result = EntropyBonus()(batch, output)
    torch.testing.assert_close(gradient(result.loss_N, output.entropy_N), -batch.policy_mask_N.double())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_kl_values_by_hand(estimator):
    batch, output = one_sequence([-1.0, -2.0], old=[-1.0, -2.0], advantages=[0, 0], reference=[-1.5, -1.0])
    d = torch.tensor([-0.5, 1.0], dtype=torch.float64)
    k3 = d.exp() - 1 - d
    expected = {"k1": -d, "k2": d**2 / 2, "k3": k3, "k3+": k3}[estimator]
    torch.testing.assert_close(KLLoss(estimator=estimator)(batch, output).loss_N.detach(), expected)


def expected_kl_gradient(estimator, logits, reference_logits):
    """The gradient of the KL loss, expected over tokens sampled from the policy, by summing over the vocabulary."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    batch, _ = one_sequence(
        logprobs.tolist(),
        old=logprobs.tolist(),
        advantages=[0.0] * len(logits),
        reference=reference_logits.log_softmax(0).tolist(),
    )
    losses = KLLoss(estimator=estimator)(batch, PolicyOutput(logprobs)).loss_N
    return torch.autograd.grad((losses * logprobs.exp().detach()).sum(), logits)[0]


def test_which_kl_each_estimator_descends():
    """k2 and k3+ have the gradient of KL(policy || reference), k3 of the other direction, k1 none."""
    logits = torch.tensor([0.3, -0.2, 0.9, -1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, 0.5, -0.3, 0.2], dtype=torch.float64)

    def kl_gradient(forward):
        leaf = logits.clone().requires_grad_()
        p, q = leaf.log_softmax(0), reference.log_softmax(0)
        kl = (p.exp() * (p - q)).sum() if forward else (q.exp() * (q - p)).sum()
        return torch.autograd.grad(kl, leaf)[0]

    for estimator in ("k2", "k3+"):
        torch.testing.assert_close(expected_kl_gradient(estimator, logits, reference), kl_gradient(True))
    torch.testing.assert_close(expected_kl_gradient("k3", logits, reference), kl_gradient(False))
    torch.testing.assert_close(expected_kl_gradient("k1", logits, reference), torch.zeros(4, dtype=torch.float64))
    assert not torch.allclose(kl_gradient(True), kl_gradient(False), atol=1e-2)


def test_sapo_by_hand():
    """All of the gradient at a ratio of 1, and the same less on whichever side."""
    batch, output = at_ratios([1.0, 1.0, 3.0, 3.0, 0.2], [2.0, -1.0, 1.0, -1.0, 1.0])
    result = SAPOLoss(temperature_positive=1.0, temperature_negative=2.0)(batch, output)
    bend = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    values = [-2 * 2.0, 2 * 0.5, -4 * bend(2), 2 * bend(4), -4 * bend(-0.8)]
    torch.testing.assert_close(result.loss_N.detach(), torch.tensor(values, dtype=torch.float64))
    gates = torch.tensor([1.0, 1.0, *(4 * bend(x) * bend(-x) for x in (2, 4, 0.8))], dtype=torch.float64)
    torch.testing.assert_close(result.metrics_N["gate"], gates)
    expected = -gates * result.metrics_N["ratio"] * batch.advantages_N
    torch.testing.assert_close(gradient(result.loss_N, output.logprobs_N), expected)


def test_vespo_by_hand():
    """One weight for a sequence, from the product of its ratios; each sign of the advantage has its own bend."""
    batch, output = at_ratios([2.0, 2.0, 0.5, 1.0], [1.0, 1.0, -1.0, 1.0])
    loss = VESPOLoss(power_positive=2.0, decay_positive=3.0, power_negative=1.0, decay_negative=0.5)
    result = loss(batch, output)
    good, bad = 2**2 * math.exp(3 * (1 - 2)), 2 * math.exp(0.5 * (1 - 2))
    gates = torch.tensor([good, good, bad, good], dtype=torch.float64)
    torch.testing.assert_close(result.metrics_N["gate"], gates)
    torch.testing.assert_close(gradient(result.loss_N, output.logprobs_N), -gates * batch.advantages_N)
    on_policy, output = at_ratios([1.0, 1.0], [1.0, -2.0])
    torch.testing.assert_close(gradient(loss(on_policy, output).loss_N, output.logprobs_N), -on_policy.advantages_N)


def test_vespo_goes_back_to_the_policy_that_sampled():
    """Whether the way from sampling to now is in the ratio or in the correction makes no difference."""
    tokens = {"old": [-1.0, -1.5], "advantages": [1.0, 1.0]}
    through_the_correction = VESPOLoss()(*one_sequence([-1.2, -1.4], rollout=[-1.3, -1.1], **tokens))
    through_the_ratio = VESPOLoss()(*one_sequence([-1.2, -1.4], **{**tokens, "old": [-1.3, -1.1]}))
    torch.testing.assert_close(through_the_correction.loss_N, through_the_ratio.loss_N)


# Numeric differentiation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "ppo dual", "sapo", "k1", "k2", "k3", "entropy", "value", "value unclipped"])
def test_gradients_agree_with_finite_differences(make_batch, name):
    batch, output = make_batch((4, 3, 5), seed=3)

    def losses(logprobs_N, entropy_N, values_N):
        return OBJECTIVES[name](batch, PolicyOutput(logprobs_N, entropy_N, values_N)).loss_N

    assert gradcheck(losses, (output.logprobs_N, output.entropy_N, output.values_N))


def test_gspo_gradient_agrees_with_finite_differences_of_the_sequence(make_batch):
    """Token by token the published form stops gradients; over a sequence with one advantage it is the true one."""
    batch, output = make_batch((4, 3, 5), seed=3)
    correction = ImportanceCorrection("sequence_truncate")
    objective = PolicyLoss(importance="sequence", clip_low=0.5, clip_high=0.5, correction=correction)

    def losses(logprobs_N):
        loss_N = objective(batch, PolicyOutput(logprobs_N)).loss_N
        return torch.zeros(3, dtype=torch.float64).index_add(0, batch.sequence_N, loss_N)

    analytic = torch.autograd.functional.jacobian(losses, output.logprobs_N.detach())
    step = 1e-6
    for token in range(len(batch)):
        moved = torch.zeros(len(batch), dtype=torch.float64)
        moved[token] = step
        base = output.logprobs_N.detach()
        numeric = (losses(base + moved) - losses(base - moved)) / (2 * step)
        torch.testing.assert_close(analytic[:, token], numeric, rtol=1e-6, atol=1e-8)


def test_stopped_gradients_agree_with_finite_differences_of_what_is_left(make_batch):
    """CISPO and VESPO with their weights frozen, and k3+ as k2."""
    batch, output = make_batch((4, 3, 5), seed=3)
    cispo = CISPOLoss()(batch, output)
    frozen = (cispo.metrics_N["ratio"].clamp(0, 5) * cispo.metrics_N["correction"]).detach()
    expected = torch.where(batch.policy_mask_N, -frozen * batch.advantages_N, 0.0)
    torch.testing.assert_close(gradient(cispo.loss_N, output.logprobs_N), expected)
    vespo = VESPOLoss()(batch, output)
    expected = torch.where(batch.policy_mask_N, -vespo.metrics_N["gate"] * batch.advantages_N, 0.0)
    torch.testing.assert_close(gradient(vespo.loss_N, output.logprobs_N), expected)
    straight, k2 = OBJECTIVES["k3+"](batch, output), OBJECTIVES["k2"](batch, output)
    torch.testing.assert_close(gradient(straight.loss_N, output.logprobs_N), gradient(k2.loss_N, output.logprobs_N))


# What holds for all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_leaks_from_outside_the_mask(make_batch, name):
    """Losses and gradients are exactly 0 there, although log-probabilities and returns are NaN."""
    batch, output = make_batch((5, 1, 7, 3), excluded=(1, 2))
    objective = OBJECTIVES[name]
    result = objective(batch, output)
    assert torch.equal(result.mask_N, objective.mask(batch))
    assert not result.loss_N[~result.mask_N].any()
    leaves = [output.logprobs_N, output.entropy_N, output.values_N]
    for leaf in torch.autograd.grad(result.loss_N.sum(), leaves, allow_unused=True):
        if leaf is not None:
            assert leaf.isfinite().all()
            assert not leaf[~result.mask_N].any()
    for figure_N in result.metrics_N.values():
        assert not figure_N.requires_grad
        assert figure_N[result.mask_N].isfinite().all()
    wild = PolicyOutput(*(torch.where(result.mask_N, leaf.detach(), torch.nan).requires_grad_() for leaf in leaves))
    again = objective(batch, wild)
    torch.testing.assert_close(again.loss_N, result.loss_N)
    again.loss_N.sum().backward()
    for leaf in (wild.logprobs_N, wild.entropy_N, wild.values_N):
        assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mask_does_not_move_with_the_parameters(make_batch, name):
    batch, output = make_batch()
    moved = PolicyOutput(output.logprobs_N - 50, output.entropy_N * 0, output.values_N + 50)
    assert torch.equal(OBJECTIVES[name](batch, output).mask_N, OBJECTIVES[name](batch, moved).mask_N)


@pytest.mark.parametrize("name", ["ppo", "ppo dual", "gspo", "cispo", "sapo", "vespo", "k1", "k2", "k3", "k3+"])
@given(
    logprobs=st.lists(st.sampled_from([-1e6, -300.0, -45.0, -1.0, -1e-9]), min_size=3, max_size=3),
    old=st.lists(st.sampled_from([-1e6, -300.0, -45.0, -1.0, -1e-9]), min_size=3, max_size=3),
    rollout=st.lists(st.sampled_from([-1e6, -300.0, -45.0, -1.0, -1e-9]), min_size=3, max_size=3),
    mode=st.sampled_from(CORRECTIONS),
)
def test_exploding_ratios_stay_finite(name, logprobs, old, rollout, mode):
    objective = OBJECTIVES[name]
    if hasattr(objective, "correction") and not (name == "vespo" and mode.startswith("sequence")):
        objective = dataclasses.replace(objective, correction=ImportanceCorrection(mode))
    batch, output = one_sequence(logprobs, old=old, advantages=[1.0, -1.0, 3.0], rollout=rollout, reference=rollout)
    result = objective(batch, output)
    assert result.loss_N.isfinite().all()
    assert gradient(result.loss_N, output.logprobs_N).isfinite().all()
    assert all(figure_N.isfinite().all() for figure_N in result.metrics_N.values())


def test_dual_clip_bounds_what_one_token_can_do():
    batch, output = one_sequence([-0.1], old=[-12.0], advantages=[-1.0])
    assert PolicyLoss()(batch, output).loss_N.item() > 1e4
    assert PolicyLoss(dual_clip=3.0)(batch, output).loss_N.item() == 3.0


# Importance correction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_bypass_counts_the_ratio_once(make_batch, mode):
    """With old = rollout the ratio holds everything; a second weight would square it."""
    batch, output = make_batch(bypass=True)
    correction = ImportanceCorrection(mode)
    assert torch.equal(correction.weights(batch, batch.policy_mask_N), torch.ones(len(batch), dtype=torch.float64))
    result = PolicyLoss(correction=correction)(batch, output)
    expected = PolicyLoss(correction=NONE)(batch, output)
    assert torch.equal(result.loss_N, expected.loss_N)


def test_correction_by_hand():
    batch, _ = one_sequence(
        [-1.0] * 3, old=[-1.0] * 3, advantages=[1.0] * 3, rollout=[-1 - math.log(r) for r in (3.0, 0.25, 1.5)]
    )
    everything = batch.policy_mask_N
    expected = {
        "none": [1, 1, 1],
        "token_truncate": [2, 0.5, 1.5],
        "token_mask": [0, 0, 1.5],
        "sequence_truncate": [1.125] * 3,
        "sequence_mask": [1.125] * 3,
    }
    for mode, weights in expected.items():
        got = ImportanceCorrection(mode, low=0.5, high=2.0).weights(batch, everything)
        torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64))
    narrow = ImportanceCorrection("sequence_mask", low=0.5, high=1.1)
    assert narrow.weights(batch, everything).tolist() == [0, 0, 0]


def test_correction_weights_have_no_gradient_and_stay_inside_their_sequence(make_batch):
    batch, _ = make_batch((4, 4))
    batch.rollout_logprobs_N[:4] -= 0.5
    batch.old_logprobs_N.requires_grad_()
    weights_N = ImportanceCorrection("sequence_truncate", high=10.0).weights(batch, batch.policy_mask_N)
    assert not weights_N.requires_grad
    difference_N = (batch.old_logprobs_N - batch.rollout_logprobs_N).detach()
    for sequence in range(2):
        chosen = (batch.sequence_N == sequence) & batch.policy_mask_N
        expected = difference_N[chosen].sum().exp().clamp(max=10.0)
        torch.testing.assert_close(weights_N[chosen], expected.expand(int(chosen.sum())))
    assert (weights_N[~batch.policy_mask_N] == 1).all()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: PolicyLoss(clip_low=-0.1),
        lambda: PolicyLoss(clip_high=math.nan),
        lambda: PolicyLoss(dual_clip=1.0),
        lambda: PolicyLoss(importance="turn"),
        lambda: CISPOLoss(ratio_low=1.2),
        lambda: CISPOLoss(ratio_high=0.2),
        lambda: SAPOLoss(temperature_positive=0.0),
        lambda: SAPOLoss(temperature_negative=math.nan),
        lambda: VESPOLoss(power_negative=-1.0),
        lambda: VESPOLoss(decay_positive=0.0),
        lambda: VESPOLoss(correction=ImportanceCorrection("sequence_mask")),
        lambda: KLLoss(estimator="k4"),
        lambda: ValueLoss(clip=0.0),
        lambda: ImportanceCorrection("tis"),
        lambda: ImportanceCorrection(high=0.9),
        lambda: ImportanceCorrection(low=1.1),
    ],
)
def test_values_out_of_range_are_refused_with_one_sentence(build):
    with pytest.raises(RecipeError) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["k3+", "entropy", "value"])
def test_a_missing_input_is_named(name):
    batch, output = one_sequence([-1.0], old=[-1.0], advantages=[1.0])
    with pytest.raises(ValueError, match="needs"):
        OBJECTIVES[name](batch, output)
