"""The same tensors through TRL's own loss and advantage code.

TRL's trainers are run without a model: the methods are called on a stand-in that has the attributes they read, and the
log-probabilities are given.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from rehearsal.algorithms import (
    Aggregation,
    CISPOLoss,
    EntropyBonus,
    ImportanceCorrection,
    KLLoss,
    PolicyLoss,
    PolicyOutput,
    SAPOLoss,
    StepTotals,
    TokenBatch,
    VESPOLoss,
    advantages,
    token_weights,
)
from rehearsal.trajectory import Kind

pytest.importorskip("trl", minversion="1.10")
from trl.trainer import grpo_trainer, rloo_trainer

NAN = float("nan")
ROWS, COLUMNS = 6, 9
LENGTHS = torch.tensor([9, 4, 7, 1, 6, 9])
NONE = ImportanceCorrection("none")


class StandInAccelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction="sum"):
        return tensor

    gather_for_metrics = gather


def tensors(seed=0, spread=0.4):
    """Padded tensors as TRL has them: rows of completions, with some tool tokens inside."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda scale: torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    completion_mask = (torch.arange(COLUMNS) < LENGTHS[:, None]).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 3:6] = 0
    tool_mask[4, 2] = 0
    logprobs = -1.5 + noise(0.3)
    return SimpleNamespace(
        completion_mask=completion_mask,
        tool_mask=tool_mask,
        mask=(completion_mask * tool_mask).bool(),
        logprobs=logprobs.requires_grad_(),
        entropy=(1 + noise(0.1)).requires_grad_(),
        old=logprobs.detach() + noise(spread),
        reference=logprobs.detach() + noise(spread),
        rollout=logprobs.detach() + noise(spread),
        advantages=torch.randn(ROWS, generator=generator, dtype=torch.float64),
    )


def trl_loss(t, *, loss_type, level="token", low=0.2, high=0.28, delta=None, beta=0.0, entropy=0.0, weights=None):
    """TRL's scalar loss."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (t.logprobs, t.entropy, None),
        accelerator=StandInAccelerator(),
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=delta,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        _entropy_bonus_enabled=entropy > 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": t.completion_mask,
        "tool_mask": t.tool_mask,
        "advantages": t.advantages,
        "old_per_token_logps": t.old,
        "ref_per_token_logps": t.reference,
        "num_items_in_batch": t.mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(t, objectives):
    """The step's loss as the learner adds it up, flat over all completion tokens."""
    present = t.completion_mask.bool()
    sequence_N = torch.arange(ROWS)[:, None].expand(ROWS, COLUMNS)[present]
    mask_N = t.mask[present]
    hidden = lambda values: torch.where(t.mask, values, torch.nan)[present]  # noqa: E731
    batch = TokenBatch(
        token_ids_N=torch.zeros_like(sequence_N),
        kinds_N=torch.where(mask_N, int(Kind.ACTION), int(Kind.OBSERVATION)).to(torch.int8),
        turns_N=torch.zeros_like(sequence_N),
        sequence_N=sequence_N,
        n_sequences=ROWS,
        advantages_N=torch.where(mask_N, t.advantages[sequence_N], 0.0),
        policy_mask_N=mask_N,
        rollout_logprobs_N=hidden(t.rollout),
        old_logprobs_N=hidden(t.old),
        reference_logprobs_N=hidden(t.reference),
    )
    batch.check()
    output = PolicyOutput(t.logprobs[present], t.entropy[present])
    loss = torch.zeros((), dtype=torch.float64)
    for objective in objectives:
        result = objective(batch, output)
        totals = StepTotals.count(result.mask_N, sequence_N, ROWS)
        weights_N = token_weights(objective.aggregation, result.mask_N, sequence_N, totals)
        loss = loss + objective.coefficient * (result.loss_N * weights_N).sum()
    return loss


def assert_same(t, theirs, ours):
    # Our weights are float32.
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)
    leaves = [t.logprobs, t.entropy]
    expected = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    assert expected[0].any()
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


AGGREGATION_OF = {
    "grpo": Aggregation("sequence_mean"),
    "dr_grpo": Aggregation("constant", 16),
    "dapo": Aggregation("token_mean"),
    "bnpo": Aggregation("token_mean"),
}


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
@pytest.mark.parametrize("delta", [None, 1.5])
def test_clipped_losses(loss_type, delta):
    t = tensors()
    objective = PolicyLoss(0.2, 0.28, delta, correction=NONE, aggregation=AGGREGATION_OF[loss_type])
    assert_same(t, trl_loss(t, loss_type=loss_type, delta=delta), our_loss(t, [objective]))


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_sequence_level_importance(loss_type):
    t = tensors(spread=0.2)
    objective = PolicyLoss(0.05, 0.06, importance="sequence", correction=NONE, aggregation=AGGREGATION_OF[loss_type])
    theirs = trl_loss(t, loss_type=loss_type, level="sequence", low=0.05, high=0.06)
    assert_same(t, theirs, our_loss(t, [objective]))


def trl_rloo_loss(t, low, high):
    """The scalar loss of TRL's trainer for RLOO, which knows no tool tokens."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (t.logprobs, t.entropy.detach(), None),
        accelerator=StandInAccelerator(), model=SimpleNamespace(training=True), aux_loss_enabled=False,
        epsilon_low=low, epsilon_high=high, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": t.completion_mask, "advantages": t.advantages, "old_logps": (t.old * t.mask).sum(1),
    }  # fmt: skip
    return rloo_trainer.RLOOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("importance", ["sequence_product", "token"])
def test_rloo(spread, importance):
    t = tensors(spread=spread)
    t.tool_mask[:] = 1
    t.mask = t.completion_mask.bool()
    objective = PolicyLoss(
        0.2, 0.28, importance=importance, correction=NONE, aggregation=Aggregation("constant", constant=1)
    )
    (theirs,) = torch.autograd.grad(trl_rloo_loss(t, 0.2, 0.28), [t.logprobs])
    (ours,) = torch.autograd.grad(our_loss(t, [objective]), [t.logprobs])
    assert theirs.any()
    if importance == "sequence_product" or spread == 0.0:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    else:
        # Where we differ: our preset has the ratios of tokens, which are those of a sequence only as long as all are 1.
        assert not torch.allclose(ours, theirs, rtol=1e-2)


@pytest.mark.parametrize("high", [1.1, 5.0])
def test_cispo(high):
    t = tensors()
    objective = CISPOLoss(0.0, high, correction=NONE)
    assert_same(t, trl_loss(t, loss_type="cispo", high=high), our_loss(t, [objective]))


def test_luspo_is_sequence_ratios_under_a_constant():
    t = tensors(spread=0.2)
    objective = PolicyLoss(
        0.05, 0.06, importance="sequence", correction=NONE, aggregation=Aggregation("constant", constant=1)
    )
    theirs = trl_loss(t, loss_type="luspo", level="sequence", low=0.05, high=0.06)
    assert_same(t, theirs, our_loss(t, [objective]))


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0])
def test_sapo(spread):
    t = tensors(spread=spread)
    objective = SAPOLoss(correction=NONE, aggregation=Aggregation("sequence_mean"))
    assert_same(t, trl_loss(t, loss_type="sapo"), our_loss(t, [objective]))


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0])
def test_vespo(spread):
    t = tensors(spread=spread)
    assert_same(t, trl_loss(t, loss_type="vespo"), our_loss(t, [VESPOLoss(correction=NONE)]))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_vespo_with_weights_for_off_policy_tokens(mode):
    t = tensors()
    correction = ImportanceCorrection(mode, high=1.5)
    ratio = torch.where(t.mask, (t.old - t.rollout).exp(), 1.0)
    kept = ratio.clamp(max=1.5) if mode == "token_truncate" else torch.where(ratio > 1.5, 0.0, ratio)
    theirs = trl_loss(t, loss_type="vespo", weights=kept)
    assert_same(t, theirs, our_loss(t, [VESPOLoss(correction=correction)]))


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_kl_to_the_reference(loss_type):
    t = tensors()
    aggregation = AGGREGATION_OF[loss_type]
    objectives = [PolicyLoss(0.2, 0.28, correction=NONE, aggregation=aggregation), KLLoss(0.04, "k3", aggregation)]
    assert_same(t, trl_loss(t, loss_type=loss_type, beta=0.04), our_loss(t, objectives))


@pytest.mark.parametrize("loss_type", AGGREGATION_OF)
def test_entropy_bonus(loss_type):
    t = tensors()
    objectives = [PolicyLoss(0.2, 0.28, correction=NONE, aggregation=AGGREGATION_OF[loss_type]), EntropyBonus(0.01)]
    assert_same(t, trl_loss(t, loss_type=loss_type, entropy=0.01), our_loss(t, objectives))


# Scoring: advantages and the weights between sampler and learner ----------------------------------------------------


class StandInTrainer:
    """What ``_generate_and_score_completions`` reads; any other attribute is off."""

    def __init__(self, rewards_PG, t=None, mode="sequence_mask", low=None, high=2.0, scale="group", normalize=False):
        self.rewards_PG = torch.tensor(rewards_PG, dtype=torch.float64)
        self.t = t
        self.accelerator = StandInAccelerator()
        self.model = SimpleNamespace(training=True)
        self.args = SimpleNamespace(
            per_device_train_batch_size=ROWS,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        )
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self.num_iterations = 1
        self.beta = 0.0
        self.num_generations = self.rewards_PG.shape[1]
        self.multi_objective_aggregation = "sum_then_normalize"
        self.scale_rewards = scale
        self.normalize_advantages = normalize
        self.reward_weights = torch.ones(1, dtype=torch.float64)
        self.reward_func_names = ["reward"]
        self.reward_funcs = [None]
        self.use_vllm = t is not None
        self.vllm_importance_sampling_correction = t is not None
        self.vllm_importance_sampling_mode = mode
        self.vllm_importance_sampling_clip_min = low
        self.vllm_importance_sampling_clip_max = high
        self._metrics = {"train": defaultdict(list)}
        self._logs = defaultdict(lambda: defaultdict(list))
        for name in ("prompt", "completion", "advantages"):
            self._logs[name] = []
        self._pending_extra_logs = {}
        self._pending_metrics = {}

    def __getattr__(self, name):
        return None

    @property
    def lengths(self):
        return LENGTHS.tolist() if self.t is not None else [1] * self.rewards_PG.numel()

    def _generate(self, prompts):
        ids = [[1] * length for length in self.lengths]
        rows = range(len(ids))
        tool_mask = None if self.t is None else [self.t.tool_mask[i, : len(ids[i])].tolist() for i in rows]
        sampling = None if self.t is None else [self.t.rollout[i, : len(ids[i])].tolist() for i in rows]
        return [[1]] * len(ids), ids, tool_mask, [""] * len(ids), sampling, {}, None, []

    def _calculate_rewards(self, *_):
        return self.rewards_PG.reshape(-1, 1)

    def _get_per_token_logps_and_entropies(self, *_, **__):
        old = torch.zeros(len(self.lengths), max(self.lengths)) if self.t is None else self.t.old
        return old, None, None


def scored(module, trainer):
    """TRL's scored batch."""
    cls = module.GRPOTrainer if module is grpo_trainer else module.RLOOTrainer
    if module is rloo_trainer:
        grpo_generate = trainer._generate
        trainer._generate = lambda prompts: [grpo_generate(prompts)[i] for i in (0, 1, 3)]
    rows = [{"prompt": "a"} for _ in trainer.lengths]
    identity = lambda value: value  # noqa: E731
    with (
        patch.object(module, "gather_object", identity),
        patch.object(module, "gather", identity),
        patch.object(module, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()),
    ):
        return cls._generate_and_score_completions(trainer, rows)


REWARDS = [
    [[0.0, 1.0, 1.0, 0.0], [0.3, 0.7, -2.0, 0.1]],
    [[0.0, NAN, 1.0, 3.0], [0.5, 0.5, 0.5, 0.5]],
    [[NAN, 2.0, NAN, NAN], [NAN, NAN, NAN, NAN], [1.0, NAN, NAN, 4.0]],
]


@pytest.mark.parametrize("rewards_PG", REWARDS)
def test_group_advantages(rewards_PG):
    for scale, ours in (("group", advantages.grpo(rewards_PG, eps=1e-4)), ("none", advantages.dr_grpo(rewards_PG))):
        theirs = scored(grpo_trainer, StandInTrainer(rewards_PG, scale=scale))["advantages"]
        # TRL corrects its deviation by a factor in float32.
        np.testing.assert_allclose(theirs.numpy(), ours.reshape(-1), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("rewards_PG", REWARDS)
def test_rloo_advantages(rewards_PG):
    theirs = scored(rloo_trainer, StandInTrainer(rewards_PG))["advantages"]
    np.testing.assert_allclose(theirs.numpy(), advantages.rloo(rewards_PG).reshape(-1), atol=1e-12)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("low", [None, 0.8])
def test_importance_correction(mode, low):
    t = tensors(seed=1, spread=0.15)
    t.rollout = t.rollout.float().double()  # TRL's lists of log-probabilities become float32
    theirs = scored(grpo_trainer, StandInTrainer([[0.0, 1.0, 2.0]] * 2, t, mode, low, 1.3))
    weights = theirs["importance_sampling_ratio"]
    assert weights.any()
    assert not (weights == 1).all()
    correction = ImportanceCorrection(mode, 0.0 if low is None else low, 1.3)
    objective = PolicyLoss(0.2, 0.28, correction=correction)
    assert_same(t, trl_loss(t, loss_type="dapo", weights=weights), our_loss(t, [objective]))


def test_where_we_differ_rows_without_a_token_to_learn_from():
    """TRL divides by all rows, we by those that have a token: the same up to that factor."""
    t = tensors()
    t.tool_mask[2] = 0
    t.mask = (t.completion_mask * t.tool_mask).bool()
    for loss_type in ("grpo", "dr_grpo"):
        objective = PolicyLoss(0.2, 0.28, correction=NONE, aggregation=AGGREGATION_OF[loss_type])
        theirs = trl_loss(t, loss_type=loss_type)
        assert_same(t, theirs, our_loss(t, [objective]) * (ROWS - 1) / ROWS)
