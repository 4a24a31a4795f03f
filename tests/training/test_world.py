"""Learning from what the environment answers: who learns what, and what stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.presets import preset
from rehearsal.errors import ModelError, RecipeError
from rehearsal.evaluation.probe import Prober
from rehearsal.models.adapters import (
    POLICY,
    WORLD,
    AdapterSettings,
    activate,
    active_names,
    adapter_names,
    adapter_parameters,
    add_adapters,
    load_adapter,
    save_adapters,
    trained_parameters,
)
from rehearsal.models.load import _compute_activations_again, load_policy, save_policy
from rehearsal.rollout import Task
from rehearsal.training import learner as learner_module
from rehearsal.training.learner import Learner
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.optimiser import clipped_updates
from rehearsal.training.options import TrainingOptions
from rehearsal.training.placebo import with_other_answers, with_shuffled_answers
from rehearsal.training.playing import make_processes, make_rollout, policy_of
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder
from rehearsal.training.sequences import answer_mask, collect, surprise_mask
from rehearsal.training.works import hold_work, world_works
from rehearsal.training.world import WORLD_MODES, WorldMode, world_model
from rehearsal.trajectory import Group, Kind, Prediction, Segment, StopReason

MakeGroups = Callable[..., list[Group]]


@pytest.fixture
def build(tiny_qwen3: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a model whose adapters do something; those of the policy are the same with and without the other."""

    def make(policy: int = 3, world: int = 5, dtype: torch.dtype = torch.float32) -> Any:
        base = tiny_qwen3(initializer_range=0.2).to(dtype)
        model = add_adapters(base, AdapterSettings(policy, world, targets="all-linear"))
        with torch.no_grad():
            for name in adapter_names(model):
                generator = torch.Generator().manual_seed(len(name))
                for parameter in adapter_parameters(model, name).values():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return make


def learner_of(
    model: Any, mode: WorldMode = "dual", algorithm: str = "grpo", temperature: float = 1.0, ratio: float = 1.0,
    coefficient: float | None = None, **changes: Any,
) -> Learner:  # fmt: skip
    settings = {"learning_rate": 1e-2, "steps": 10, "groups": 4, "group_size": 3, **changes}
    world = world_model(mode, adapter_names(model), learning_rate_ratio=ratio, coefficient=coefficient)
    return Learner(model, preset(algorithm), TrainingOptions(**settings), temperature=temperature, world=world)


def weights(model: Any, name: str) -> dict[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in adapter_parameters(model, name).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return not any(torch.equal(before[key], after[key]) for key in before)


# Isolation


@pytest.mark.parametrize(
    "how",
    [{}, {"autocast": True}, {"minibatches": 3, "epochs": 2}, {"pack_tokens": 16}, {"share_prefixes": False}, "again"],
    ids=str,
)
def test_with_an_inactive_world_adapter_the_policy_is_that_without(
    how: Any, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    changes = {} if how == "again" else how
    alone, both = build(3, 0), build(3, 5)
    if how == "again":
        for model in (alone, both):
            _compute_activations_again(model.get_base_model())
    activate(both, (POLICY,))
    groups = make_groups(alone)
    policy_only, inactive = learner_of(alone, "policy_only", **changes), learner_of(both, "inactive", **changes)
    before = weights(both, WORLD)
    for step in range(3):
        one, two = policy_only.step(groups, step), inactive.step(groups, step)
        assert one["policy/grad_norm"] == two["policy/grad_norm"] > 0
        assert two["world/prediction_loss"] > 0
    assert same(weights(alone, POLICY), weights(both, POLICY))
    assert moved(before, weights(both, WORLD))


@pytest.mark.parametrize("autocast", [False, True])
def test_so_it_is_over_a_base_in_bfloat16(
    autocast: bool, build: Callable[..., Any], make_groups: MakeGroups
) -> None:  # fmt: skip
    alone, both = build(3, 0, torch.bfloat16), build(3, 5, torch.bfloat16)
    assert next(both.get_base_model().parameters()).dtype == torch.bfloat16
    activate(both, (POLICY,))
    groups = make_groups(alone)
    policy_only = learner_of(alone, "policy_only", autocast=autocast)
    inactive = learner_of(both, "inactive", autocast=autocast)
    before = {name: weights(both, name) for name in (POLICY, WORLD)}
    for step in range(3):
        one, two = policy_only.step(groups, step), inactive.step(groups, step, situations=rehearsed(groups))
        assert one["policy/grad_norm"] == two["policy/grad_norm"] > 0
        assert two["world/prediction_loss"] > 0
    assert same(weights(alone, POLICY), weights(both, POLICY))
    assert moved(before[POLICY], weights(both, POLICY))
    assert moved(before[WORLD], weights(both, WORLD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_no_loss_reaches_the_parameters_of_the_other(
    autocast: bool, dtype: torch.dtype, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    def after(coefficient: float = 1.0, scale: float = 1.0, **changes: Any) -> tuple[dict[str, float], Any]:
        model = build(3, 5, dtype)
        learner = learner_of(model, "dual", coefficient=coefficient, autocast=autocast, **changes)
        return learner.step(make_groups(model), 0, scale=scale, situations=rehearsed(make_groups(model))), model

    # Not clipped: a gradient that leaks would be seen in its whole size.
    plain, model = after(max_grad_norm=1e9)
    louder_world, world_model_ = after(1000.0, max_grad_norm=1e9)
    louder_policy, policy_model = after(scale=1000.0, max_grad_norm=1e9)
    assert louder_world["policy/grad_norm"] == plain["policy/grad_norm"] > 0
    assert louder_world["world/grad_norm"] > 100 * plain["world/grad_norm"] > 0
    assert same(weights(model, POLICY), weights(world_model_, POLICY))
    assert louder_policy["world/grad_norm"] == plain["world/grad_norm"]
    assert louder_policy["policy/grad_norm"] > 100 * plain["policy/grad_norm"]
    assert same(weights(model, WORLD), weights(policy_model, WORLD))
    # And where one has nothing to learn, its gradient is nothing, to the last bit.
    silent, still = after(scale=0.0)
    assert silent["policy/grad_norm"] == 0.0 < silent["world/grad_norm"]
    assert same(weights(still, POLICY), weights(build(3, 5, dtype), POLICY))


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_apart_to_the_last_bit_in_float64(
    again: bool, build: Callable[..., Any], make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AdamW forgets the size of its first gradient: what is compared is what it is given.
    given: dict[str, list[Tensor]] = {}

    def record(updates: Any, *rest: Any) -> list[float]:
        for update in updates:
            given[update.name] = [p.grad.clone() for group in update.optimiser.param_groups for p in group["params"]]
        return clipped_updates(updates, *rest)

    monkeypatch.setattr(learner_module, "clipped_updates", record)

    def gradients(coefficient: float = 1.0, scale: float = 1.0) -> dict[str, list[Tensor]]:
        model = build(3, 5, torch.float64)
        if again:
            _compute_activations_again(model.get_base_model())
        given.clear()
        learner_of(model, "dual", coefficient=coefficient).step(make_groups(model), 0, scale=scale)
        assert {gradient.dtype for some in given.values() for gradient in some} == {torch.float64}
        return dict(given)

    plain, loud_world, loud_policy = gradients(), gradients(coefficient=1024.0), gradients(scale=1024.0)
    for own, other in ((POLICY, loud_world), (WORLD, loud_policy)):
        assert all(torch.equal(a, b) for a, b in zip(plain[own], other[own], strict=True))
        assert all(float(gradient.abs().max()) > 0 for gradient in plain[own])
    for own, other in ((WORLD, loud_world), (POLICY, loud_policy)):
        # Weights are float32 numbers in the sum, so a factor is not kept to the last bit.
        assert all(torch.allclose(1024 * a, b, rtol=1e-5) for a, b in zip(plain[own], other[own], strict=True))


def test_an_adapter_that_was_frozen_by_a_switch_is_trained_all_the_same(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    switched, plain = build(), build()
    switched.set_adapter(POLICY)  # PEFT's own: freezes the other, and leaves it out of passes
    activate(switched, (POLICY, WORLD))
    for model in (switched, plain):
        learner_of(model, "dual").step(make_groups(plain), 0)
    assert moved(weights(build(), WORLD), weights(switched, WORLD))
    assert all(same(weights(switched, name), weights(plain, name)) for name in (POLICY, WORLD))


@pytest.mark.parametrize("mode", ["dual", "world_only"])
def test_an_adapter_that_passes_do_not_go_through_cannot_be_learnt(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = build()
    activate(model, (POLICY,))
    learner = learner_of(model, mode)
    with pytest.raises(ModelError, match=r'"world" is to be learnt .*\(but through: policy\)'):
        learner.step(make_groups(model), 0)


def plain_step(model: Any, groups: list[Group], rate: float, ratio: float, max_norm: float) -> None:
    """One step of GRPO and of the observation loss, one sequence at a time, in plain PyTorch."""
    policy_loss = world_loss = torch.zeros(())
    total = sum(len(group) for group in groups)
    answers = sum(int(answer_mask(t.segments[0]).sum()) for group in groups for t in group)
    for group in groups:
        rewards = torch.tensor([trajectory.reward for trajectory in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for trajectory, advantage in zip(group, advantages.float(), strict=True):
            segment = trajectory.segments[0]
            ids = torch.from_numpy(segment.token_ids.astype(np.int64))
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            logprobs = logprobs.gather(1, ids[1:, None])[:, 0]
            sampled, told = torch.from_numpy(segment.sampled_mask)[1:], torch.from_numpy(answer_mask(segment))[1:]
            ratios = (logprobs - torch.from_numpy(segment.logprobs)[1:])[sampled].exp()
            surrogate = torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage)
            policy_loss = policy_loss - surrogate.mean() / total
            world_loss = world_loss - logprobs[told].sum() / answers
    for name, loss in ((POLICY, policy_loss), (WORLD, world_loss)):
        trained = trained_parameters(model, name)
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, retain_graph=True), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimisers = [
        torch.optim.AdamW(trained_parameters(model, name), lr=rate * share, weight_decay=0.0)
        for name, share in ((POLICY, 1.0), (WORLD, ratio))
    ]
    for optimiser in optimisers:
        optimiser.step()


def test_a_step_is_that_of_a_plain_implementation(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model, plain = build(), build()
    groups = make_groups(model)
    learner_of(model, ratio=2.5, max_grad_norm=0.05).step(groups, 0)
    plain_step(plain, groups, 1e-2, 2.5, 0.05)
    for name in (POLICY, WORLD):
        ours, theirs = weights(model, name), weights(plain, name)
        start = weights(build(), name)
        for key, tensor in theirs.items():
            step = float((tensor - start[key]).abs().max())
            assert step > 0
            # AdamW's first step is the sign of the gradient times the rate: an entry near zero may take either.
            wrong = (ours[key] - tensor).abs() > 0.05 * step
            assert float(wrong.float().mean()) < 0.02, key


def test_gradients_of_both_losses_are_those_of_each_alone(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    norms = {}
    for mode in ("dual", "inactive"):
        model = build()
        groups = make_groups(model)
        norms[mode] = learner_of(model, mode).step(groups, 0)
    # With both active the two passes of "inactive" differ from the one of "dual" by rounding alone.
    for name in ("policy/grad_norm", "world/grad_norm", "world/prediction_loss", "policy/loss/policy"):
        assert norms["dual"][name] == pytest.approx(norms["inactive"][name], rel=1e-4), name


def test_experts_learn_the_same_however_many_threads_there_are(
    tiny_experts: Callable[..., Any], make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their adapters are put into the weights for the time of a pass: two at once would be in each other's way.
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        model = add_adapters(tiny_experts(), AdapterSettings(3, 5))
        learner = learner_of(model, "dual", pack_tokens=64, share_prefixes=False)
        for step in range(2):
            figures = learner.step(make_groups(model), step)
            assert figures["policy/grad_norm"] > 0 and figures["world/grad_norm"] > 0
        found.append({name: weights(model, name) for name in (POLICY, WORLD)})
    assert all(same(found[0][name], found[1][name]) for name in (POLICY, WORLD))


def test_a_model_whose_adapters_are_more_than_factors_is_refused(tiny_qwen3: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_qwen3(tie_word_embeddings=False), config, adapter_name=POLICY)
    with pytest.raises(ModelError, match="cannot be trained here: lm_head is trained beside the low-rank factors"):
        learner_of(model, "policy_only")


@pytest.mark.parametrize("pack_tokens", [16, 64])
def test_however_a_step_is_cut(pack_tokens: int, build: Callable[..., Any], make_groups: MakeGroups) -> None:
    whole, cut = build(), build()
    groups = make_groups(whole)
    one, two = learner_of(whole).step(groups, 0), learner_of(cut, pack_tokens=pack_tokens).step(groups, 0)
    for name in ("policy/grad_norm", "world/grad_norm", "world/prediction_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)


# Who sees what


def test_what_a_filter_turns_down_still_teaches_the_world_model(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = build()
    groups = make_groups(model)
    before = {name: weights(model, name) for name in (POLICY, WORLD)}
    figures = learner_of(model).step(groups, 0, np.zeros(len(groups), dtype=bool))
    assert same(before[POLICY], weights(model, POLICY))
    assert moved(before[WORLD], weights(model, WORLD))
    assert figures["policy/grad_norm"] == 0
    assert figures["world/grad_norm"] > 0


def with_failures(groups: list[Group], some: Callable[[int], bool] = lambda number: number % 3 == 1) -> list[Group]:
    """The same episodes, of which some broke after their last answer."""
    for number, trajectory in enumerate(trajectory for group in groups for trajectory in group):
        if some(number):
            trajectory.stop_reason, trajectory.error = StopReason.ERROR, "It broke."
    return groups


@pytest.mark.parametrize("mode", [mode for mode in WORLD_MODES if mode != "policy_only"])
def test_what_was_answered_before_an_episode_failed_is_learnt(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = in_mode(build, mode)
    groups = with_failures(make_groups(model))
    answers = [int(answer_mask(t.segments[0]).sum()) for group in groups for t in group]
    failed = [t.failed for group in groups for t in group]
    assert any(count for count, broke in zip(answers, failed, strict=True) if broke)
    learner = learner_of(model, mode)
    told = learner.prediction_losses(groups)["prediction_loss"]
    figures = learner.step(groups, 0)
    assert figures["world/target_tokens"] == sum(answers)
    assert mode == "placebo" or figures["world/prediction_loss"] == pytest.approx(told, rel=1e-4)
    # One that broke before anything was answered has nothing to teach.
    for trajectory in (trajectory for group in groups for trajectory in group if trajectory.failed):
        segment = trajectory.segments[0]
        begun = np.flatnonzero(segment.turns == 0)
        parts = (segment.token_ids, segment.logprobs, segment.kinds, segment.turns)
        trajectory.segments = [Segment(*(part[begun] for part in parts))]
    figures = learner.step(groups, 1)
    assert figures["world/target_tokens"] == sum(c for c, broke in zip(answers, failed, strict=True) if not broke)


@pytest.mark.parametrize("changes", [{}, {"algorithm": "ppo"}], ids=str)
def test_failed_episodes_teach_the_policy_nothing_in_any_mode(
    changes: dict[str, Any], build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    after: dict[str, dict[str, Tensor]] = {}
    told: dict[str, dict[str, float]] = {}
    for mode in CONTROLS:
        model = in_mode(build, mode)
        # Of the first group nobody is left.
        groups = with_failures(make_groups(model), lambda number: number < 3 or number % 3 == 1)
        learner = learner_of(model, mode, **changes)
        told[mode] = learner.step(groups, 0, probe=2)
        after[mode] = weights(model, POLICY)
    assert same(after["policy_only"], after["inactive"])
    for name in ("policy/updates", "policy/loss/policy", "policy/grad_norm", "gradient/policy/norm"):
        assert told["policy_only"][name] == told["inactive"][name]
        # The same passes, but for the tokens of answers in them.
        assert told["dual"][name] == pytest.approx(told["placebo"][name], rel=1e-3), name


def test_the_policys_minibatches_are_the_same_whoever_learns_failed_episodes(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    parts: dict[str, list[list[tuple[int, int]]]] = {}
    for mode in ("policy_only", "dual"):
        model = in_mode(build, mode)
        groups = with_failures(make_groups(model))
        learner = learner_of(model, mode, minibatches=3)
        ((work,), _) = learner._works(groups, None, 0, None)
        cuts = [part for _ in range(2) for part in learner._minibatches(work)]
        assert all(sorted(np.concatenate(cuts[i : i + 3])) == list(range(len(work.sequences))) for i in (0, 3))
        episodes, failed = work.sequences.episodes(), work.sequences.failed
        parts[mode] = [[episodes[s] for s in part if not failed[s]] for part in cuts]
        assert any(failed) == (mode == "dual")
    assert parts["dual"] == parts["policy_only"]


def test_where_every_episode_failed_the_world_is_learnt(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    for algorithm in ("grpo", "ppo", "reinforce_pp"):
        model = build()
        before = {name: weights(model, name) for name in (POLICY, WORLD)}
        learner = learner_of(model, "dual", algorithm, minibatches=2)
        figures = learner.step(with_failures(make_groups(model), lambda number: True), 0, probe=1)
        assert same(before[POLICY], weights(model, POLICY)) and moved(before[WORLD], weights(model, WORLD))
        assert figures["policy/updates"] == 0.0 and all(math.isfinite(value) for value in figures.values())


def test_environments_are_brought_to_the_same_scale_whoever_learns_answers(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    norms = {}
    for mode in CONTROLS:
        model = in_mode(build, mode)
        figures = learner_of(model, mode).step(make_groups(model), 0, families=[0, 0, 1, 1])
        norms[mode] = figures["policy/grad_norm"]
    assert norms["dual"] == pytest.approx(norms["placebo"], rel=1e-4)
    assert norms["inactive"] == norms["policy_only"]


def test_groups_without_reward_variance_teach_it_too(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build()
    groups = make_groups(model)
    for group in groups:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.rewards = [0.0]
    before = weights(model, WORLD)
    learner_of(model).step(groups, 0)
    assert moved(before, weights(model, WORLD))


CONTROLS: tuple[WorldMode, ...] = ("policy_only", "inactive", "placebo", "dual")
"""The modes that are compared with each other: what they do to the policy must differ by the answers alone."""


def in_mode(build: Callable[..., Any], mode: WorldMode) -> Any:
    model = build(3, 0) if mode in ("policy_only", "shared") else build()
    if mode == "inactive":
        activate(model, (POLICY,))
    return model


def with_equal_rewards(groups: list[Group], some: Callable[[int], bool] = lambda number: True) -> list[Group]:
    for number, group in enumerate(groups):
        for trajectory in group if some(number) else ():
            for turn in trajectory.turns:
                turn.rewards = [1.0 / len(trajectory.turns)]
    return groups


@pytest.mark.parametrize(
    ("changes", "filtered"),
    [
        ({}, False), ({}, True), ({"weight_decay": 0.1}, False), ({"minibatches": 3}, False),
        # Its critic learns from the rewards of episodes that the policy may not learn from.
        ({"algorithm": "ppo"}, True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", CONTROLS)
def test_a_step_that_teaches_the_policy_nothing_leaves_it_where_it_is(
    mode: WorldMode, changes: dict[str, Any], filtered: bool, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = in_mode(build, mode)
    groups = make_groups(model)
    learner = learner_of(model, mode, **changes)
    learner.step(groups, 0)  # gives the optimisers momentum to move by
    before = {name: weights(model, name) for name in adapter_names(model)}
    if filtered:
        figures = learner.step(groups, 1, np.zeros(len(groups), dtype=bool))
    else:
        figures = learner.step(with_equal_rewards(groups), 1)
    assert same(before[POLICY], weights(model, POLICY))
    assert figures["policy/updates"] == figures["policy/grad_norm"] == 0.0
    if mode != "policy_only":
        assert moved(before[WORLD], weights(model, WORLD)) and figures["world/grad_norm"] > 0


@pytest.mark.parametrize("changes", [{}, {"kl": 0.1}, {"entropy": 0.1}], ids=str)
@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_policy_takes_as_many_steps_in_every_mode(
    minibatches: int, changes: dict[str, float], build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    algorithm = {f"{name}_coefficient": value for name, value in changes.items()}
    told: dict[str, list[float]] = {}
    for mode in CONTROLS:
        model = in_mode(build, mode)
        options = TrainingOptions(learning_rate=1e-2, steps=10, groups=4, group_size=3, minibatches=minibatches)
        world = world_model(mode, adapter_names(model))
        learner = Learner(model, preset("grpo", **algorithm), options, world=world)
        groups = make_groups(model)
        first = learner.step(groups, 0)
        # All of one step, and then one group of four: with minibatches there are some that teach nothing.
        second = learner.step(with_equal_rewards(make_groups(model)), 1)
        third = learner.step(with_equal_rewards(make_groups(model), lambda number: number > 0), 2)
        told[mode] = [figures["policy/updates"] for figures in (first, second, third)]
        assert {int(s["step"]) for s in learner.optimisers[POLICY].state.values()} == {int(sum(told[mode]))}
    assert all(told[mode] == told["policy_only"] for mode in CONTROLS)
    assert told["dual"][0] == minibatches
    # A term that keeps the policy near another, or broad, has a gradient without any advantage.
    assert told["dual"][1] == (minibatches if changes else 0)
    assert told["dual"][2] == minibatches if changes or minibatches == 1 else 0 < told["dual"][2] < minibatches


def test_minibatches_without_answers_leave_the_world_adapter_where_it_is(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    taken = {}
    for mode in ("dual", "placebo", "inactive"):
        model = in_mode(build, mode)
        groups = make_groups(model)
        learner = learner_of(model, mode)
        learner.step(groups, 0)
        before = weights(model, WORLD)
        for trajectory in (trajectory for group in groups for trajectory in group):
            segment = trajectory.segments[0]
            kinds = np.where(segment.kinds == Kind.OBSERVATION, int(Kind.NOTICE), segment.kinds)
            trajectory.segments = [replace(segment, kinds=kinds)]
        assert learner.step(groups, 1)["policy/updates"] == 1.0
        taken[mode] = same(before, weights(model, WORLD))
    assert all(taken.values())


def test_one_set_of_parameters_takes_a_step_where_anything_teaches_it(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = in_mode(build, "shared")
    groups = make_groups(model)
    learner = learner_of(model, "shared")
    learner.step(groups, 0)
    before = weights(model, POLICY)
    figures = learner.step(with_equal_rewards(groups), 1)
    assert figures["policy/updates"] == 1.0 and figures["policy/grad_norm"] > 0
    assert moved(before, weights(model, POLICY))


@pytest.mark.parametrize("mode", ["dual", "inactive"])
def test_a_weight_of_0_tells_the_loss_and_moves_nothing(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = in_mode(build, mode)
    before = weights(model, WORLD)
    learner = learner_of(model, mode, coefficient=0.0, weight_decay=0.1)
    figures = [learner.step(make_groups(model), step) for step in range(2)]
    assert same(before, weights(model, WORLD))
    assert all(one["world/prediction_loss"] > 0 and one["policy/updates"] == 1.0 for one in figures)


def test_world_only_leaves_the_policy_alone(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build()
    groups = make_groups(model)
    before = {name: weights(model, name) for name in (POLICY, WORLD)}
    learner = learner_of(model, "world_only")
    losses = [learner.step(groups, step)["world/prediction_loss"] for step in range(8)]
    assert same(before[POLICY], weights(model, POLICY))
    assert moved(before[WORLD], weights(model, WORLD))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mode", ["shared", "world_only"])
def test_without_adapters_all_parameters_learn(
    mode: WorldMode, tiny_qwen3: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = tiny_qwen3(initializer_range=0.2)
    groups = make_groups(model)
    learner = learner_of(model, mode, coefficient=1.0)
    losses = [learner.step(groups, step)["world/prediction_loss"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mode", ["policy_only", "inactive"])
def test_evaluations_tell_the_loss_of_a_control_that_asks(mode: str, taught_folder: Path) -> None:
    changes: dict[str, Any] = {"world__mode": mode, "training__steps": 1}
    trainers = [
        Trainer(recipe_of(taught_folder, diagnostics__prediction_loss=asked, **changes)) for asked in (False, True)
    ]
    for trainer in trainers:
        trainer.run()
    silent, asked = ([figures for _, _, figures in trainer.evaluations] for trainer in trainers)
    assert all("prediction_loss" in figures for figures in asked)
    assert all(("prediction_loss" in figures) == (mode == "inactive") for figures in silent)
    # To be asked changes nothing that is learnt; what ends an episode is told all the same.
    one, two = (trainer.policy.model for trainer in trainers)  # type: ignore[union-attr]
    assert same(weights(one, POLICY), weights(two, POLICY))
    assert asked[0]["success"] == silent[0]["success"]


def test_the_control_is_scored_on_the_same_words_as_the_others(taught_folder: Path) -> None:
    told = {}
    for mode in ("policy_only", "inactive", "dual"):
        trainer = Trainer(recipe_of(taught_folder, world__mode=mode, diagnostics__prediction_loss=True))
        told[mode] = trainer.evaluate("validation", 4).figures["prediction_loss"]  # type: ignore[union-attr]
        trainer.close()
    # A fresh world adapter changes nothing yet.
    assert told["policy_only"] == pytest.approx(told["inactive"], rel=1e-5)
    assert told["policy_only"] == pytest.approx(told["dual"], rel=1e-5)


def test_a_probe_measures_the_policy_that_is_saved(taught_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        taught_folder, world__mode="inactive", diagnostics__probes=6, training__steps=1,
        world__learning_rate_ratio=30.0,
    )  # fmt: skip
    trainer = Trainer(recipe)
    trainer.run()
    assert trainer.policy is not None
    last = trainer.evaluations[-1][2]
    policy_only = Trainer(recipe_of(taught_folder, world__mode="policy_only", diagnostics__probes=6,
                                    training__steps=1, adapters__world_rank=0))  # fmt: skip
    policy_only.run()
    other = policy_only.evaluations[-1][2]
    names = [name for name in last if name.startswith("probe/")]
    assert names
    assert {name: last[name] for name in names} == {name: other[name] for name in names}
    # The world adapter would have said something else.
    activate(trainer.policy.model, (POLICY, WORLD))
    assert trainer.probe()["probe/perplexity"] != last["probe/perplexity"]
    activate(trainer.policy.model, (POLICY,))
    save_policy(trainer.policy.model, trainer.policy.tokenizer, tmp_path / "policy")
    saved = Prober(recipe, trainer.policy.renderer, 6).measure(load_policy(tmp_path / "policy", device="cpu").model)
    assert saved["perplexity"] == pytest.approx(last["probe/perplexity"], rel=1e-4)


def test_a_world_without_news_is_told_of(taught_folder: Path) -> None:
    watch = Figures()
    recipe = recipe_of(
        taught_folder, world__mode="dual", world__foreseeable=False, training__steps=1, evaluation__episodes=0
    )
    trainer = Trainer(recipe, observer=watch)
    summary = trainer.run()
    assert watch.steps[0]["world/target_tokens"] == 0.0
    assert summary["verdicts"] == ["nothing_to_foretell"]
    (verdict,) = trainer.monitor.watch.verdicts
    assert "world.foreseeable" in verdict.text()


@pytest.mark.parametrize("mode", ["dual", "shared", "inactive", "world_only", "policy_only"])
def test_the_tokens_to_be_foretold_are_counted(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = build(3, 0) if mode == "shared" else build()
    groups = make_groups(model)
    answers = sum(int(answer_mask(t.segments[0]).sum()) for group in groups for t in group)
    told = learner_of(model, mode).step(groups, 0)
    assert told.get("world/target_tokens") == (None if mode == "policy_only" else answers)


class Warnings(SilentObserver):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.mark.parametrize("evaluated", [4, 0])
@pytest.mark.parametrize("rehearse", [True, False])
def test_a_rehearsal_without_room_is_told_of(
    rehearse: bool, evaluated: int, taught_folder: Path, tmp_path: Path
) -> None:
    watch = Warnings()
    recipe = recipe_of(
        taught_folder, agent__thinking=True, agent__rehearse=rehearse, agent__max_tokens_per_turn=3,
        training__steps=2, evaluation__episodes=evaluated, diagnostics__every=0,
    )  # fmt: skip
    result = train(recipe, output=tmp_path / "run", observer=watch)
    found = RunFolder.open(result.path).info.warnings
    assert found == watch.said
    # That an agent that is always cut off never acts is told beside it.
    told = [said for said in found if not said.startswith("The policy wrote no legal action")]
    assert len(found) == len(told) + 1
    assert [said.partition(" of the answers")[0] for said in told] == (["100%"] if rehearse else [])
    assert not rehearse or "raise agent.max_tokens_per_turn" in found[0]


def test_a_shared_loss_is_weighted(tiny_qwen3: Callable[..., Any], make_groups: MakeGroups) -> None:
    norms = []
    for coefficient in (None, 0.05, 0.5):
        model = tiny_qwen3(initializer_range=0.2)
        learner = learner_of(model, "shared", coefficient=coefficient)
        norms.append(learner.step(make_groups(model), 0)["policy/grad_norm"])
    assert norms[0] == norms[1] != norms[2]


def test_answers_are_scored_at_temperature_1(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    losses = []
    for temperature in (1.0, 0.5):
        model = build()
        groups = make_groups(model, temperature=temperature)
        learner = learner_of(model, temperature=temperature)
        held_out = learner.prediction_losses(groups)["prediction_loss"]
        figures = learner.step(groups, 0)
        assert figures["world/prediction_loss"] == pytest.approx(held_out, rel=1e-4)
        losses.append(held_out)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_prediction_losses_are_told_by_environment(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build()
    groups = make_groups(model)
    learner = learner_of(model)
    assert set(learner.prediction_losses(groups)) == {"prediction_loss"}
    for trajectory in groups[0]:
        trajectory.environment = "another"
    told = learner.prediction_losses(groups)
    assert set(told) == {"prediction_loss", "prediction_loss/made-up", "prediction_loss/another"}
    low, high = sorted(told[f"prediction_loss/{name}"] for name in ("made-up", "another"))
    assert low < told["prediction_loss"] < high


def test_the_control_is_scored_as_the_others_are(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build(3, 0)
    groups = make_groups(model)
    (told,) = learner_of(model, "policy_only").prediction_losses(groups).values()
    # Before anything is learnt policy_only and shared are the same model.
    assert told == learner_of(model, "shared").prediction_losses(groups)["prediction_loss"] > 0


@pytest.mark.parametrize("mode", [mode for mode in WORLD_MODES if mode != "policy_only"])
def test_environments_that_never_answer(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:  # fmt: skip
    model = build()
    groups = make_groups(model)
    for group in groups:
        for trajectory in group:
            segment = trajectory.segments[0]
            told = segment.kinds == Kind.OBSERVATION
            kinds = np.where(told, int(Kind.NOTICE), segment.kinds)
            trajectory.segments = [replace(segment, kinds=kinds)]
    before = weights(model, WORLD)
    learner = learner_of(model, mode)
    figures = learner.step(groups, 0)
    assert all(math.isfinite(value) for value in figures.values())
    assert learner.prediction_losses(groups) == {}
    assert mode == "shared" or same(before, weights(model, WORLD))


def test_rewards_alone_leave_a_world_adapter_as_it_is(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build()
    before = {name: weights(model, name) for name in (POLICY, WORLD)}
    learner_of(model, "policy_only").step(make_groups(model), 0)
    assert moved(before[POLICY], weights(model, POLICY))
    assert same(before[WORLD], weights(model, WORLD))


# The placebo


def test_answers_are_dealt_out_within_their_turn(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    groups = make_groups(build(), groups=6)
    shuffled, stayed = with_shuffled_answers(groups, np.random.default_rng(0))
    assert stayed == 0.0

    def told(some: list[Group]) -> list[bytes]:
        return [s.token_ids[answer_mask(s)].tobytes() for group in some for t in group for s in t.segments]

    assert sorted(told(shuffled)) == sorted(told(groups))
    assert told(shuffled) != told(groups)
    for old, new in zip(groups, shuffled, strict=True):
        for before, after in zip(old, new, strict=True):
            first, second = before.segments[0], after.segments[0]
            assert np.array_equal(first.token_ids[~answer_mask(first)], second.token_ids[~answer_mask(second)])
            assert np.array_equal(first.kinds, second.kinds)
            assert before.reward == after.reward
    # The episodes themselves are as they were.
    assert told(groups) == told(make_groups(build(), groups=6))


def test_answers_of_different_lengths_change_places(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    groups = make_groups(build(), groups=2)
    segment = next(t.segments[0] for t in groups[0] if answer_mask(t.segments[0]).any())
    at = int(np.flatnonzero(answer_mask(segment))[-1])

    def longer(array: np.ndarray, value: float) -> np.ndarray:
        return np.insert(array, at, value)

    stretched = Segment(
        longer(segment.token_ids, 7), longer(segment.logprobs, np.nan), longer(segment.kinds, int(Kind.OBSERVATION)),
        longer(segment.turns, segment.turns[at]),
    )  # fmt: skip
    for trajectory in groups[0]:
        if trajectory.segments[0] is segment:
            trajectory.segments = [stretched]
    lengths = set()
    for seed in range(5):
        shuffled, _ = with_shuffled_answers(groups, np.random.default_rng(seed))
        lengths.add(tuple(int(answer_mask(t.segments[0]).sum()) for group in shuffled for t in group))
        assert all(np.isfinite(t.segments[0].logprobs[t.segments[0].sampled_mask]).all() for g in shuffled for t in g)
    assert len(lengths) > 1


@pytest.mark.parametrize("mode", ["dual", "inactive", "world_only", "shared"])
def test_foreseeable_answers_are_left_out_where_news_is_asked_for(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    def after(foreseeable: bool, known: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = build(3, 0) if mode == "shared" else build()
        groups = make_groups(model, groups=3)
        for trajectory in (trajectory for group in groups for trajectory in group):
            for turn in trajectory.turns:
                turn.foreseeable = known == "all" or (known == "some" and trajectory.sample % 2 == 0)
        learner = learner_of(model, mode)
        learner.world = replace(learner.world, foreseeable=foreseeable)
        return learner.step(groups, 0), weights(model, POLICY if mode == "shared" else WORLD)

    everything, moved_by_all = after(True, "all")
    told, moved_by_told = after(False, "none")
    assert told["world/prediction_loss"] == everything["world/prediction_loss"], "nothing is known: all of it is news"
    assert same(moved_by_all, moved_by_told)
    news, moved_by_news = after(False, "some")
    assert not math.isclose(news["world/prediction_loss"], everything["world/prediction_loss"])
    assert not same(moved_by_all, moved_by_news)
    assert "world/prediction_loss" not in after(False, "all")[0], "there is nothing to learn"


def test_the_tokens_of_news_are_those_behind_what_could_not_be_foreseen(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    (group,) = make_groups(build(), groups=1)
    answered = 0
    for trajectory in group:
        (segment,) = trajectory.segments
        answered += int(answer_mask(segment)[segment.turns == 1].any())
        assert np.array_equal(surprise_mask(segment, trajectory), answer_mask(segment))
        trajectory.turns[0].foreseeable = True
        kept = surprise_mask(segment, trajectory)
        assert not kept[segment.turns <= 1].any()
        assert np.array_equal(kept[segment.turns > 1], answer_mask(segment)[segment.turns > 1])
    assert answered


def test_a_placebo_learns_something_else(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    after = {}
    for mode in ("dual", "placebo"):
        model = build()
        learner_of(model, mode).step(make_groups(model), 0)
        after[mode] = {name: weights(model, name) for name in (POLICY, WORLD)}
    assert moved(after["dual"][WORLD], after["placebo"][WORLD])
    # What the policy learns differs by rounding alone: its pass is the same.
    for key, tensor in after["dual"][POLICY].items():
        assert float(((after["placebo"][POLICY][key] - tensor).abs() > 1e-3).float().mean()) < 0.02


# Bad input


@pytest.mark.parametrize("mode", ["dual", "inactive", "placebo"])
def test_a_mode_without_its_adapters(mode: WorldMode, build: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"adapters.world_rank above 0"):
        learner_of(build(3, 0), mode)
    with pytest.raises(RecipeError, match=r"adapters.policy_rank is 0"):
        learner_of(build(0, 3), mode)


def test_objectives_that_name_a_missing_adapter(build: Callable[..., Any], tiny_qwen3: Callable[..., Any]) -> None:
    for model in (build(3, 0), tiny_qwen3()):
        with pytest.raises(ModelError, match='no adapter "second"'):
            Learner(model, preset("grpo", parameters="second"), TrainingOptions())


def test_one_for_all_and_one_for_a_part_is_refused(build: Callable[..., Any]) -> None:
    objectives = (*preset("grpo").objectives, replace(preset("cispo", parameters=WORLD).objectives[0], name="other"))
    with pytest.raises(RecipeError, match=r"is a part of them"):
        Learner(build(0, 3), replace(preset("grpo"), objectives=objectives), TrainingOptions())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"world.mode": "dual", "adapters.world_rank": 0}, "adapters.world_rank above 0"),
        ({"world.mode": "dual", "adapters.policy_rank": 0}, "adapters.policy_rank above 0"),
        ({"world.mode": "both"}, "Option world.mode cannot be 'both'"),
        ({"adapters.policy_rank": -1}, "adapters.policy_rank"),
    ],
)
def test_recipes_that_cannot_be_used(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve_recipe("frozenlake", changes)


# In a run


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    small: dict[str, Any] = {
        "model.path": str(folder), "environment.name": "frozenlake", "environment.params.size": 3,
        "agent.thinking": False, "agent.max_turns": 3, "agent.max_tokens_per_turn": 12, "agent.max_context": 400,
        "training.steps": 3, "training.groups": 4, "training.group_size": 3, "training.learning_rate": 3e-3,
        "evaluation.episodes": 4, "evaluation.every": 0, "engine.max_sessions": 12, "engine.memory_gib": 0.05,
        "adapters.policy_rank": 4, "adapters.world_rank": 4, "checkpoint.every": 1,
    }  # fmt: skip
    return resolve_recipe({}, small | {name.replace("__", "."): value for name, value in changes.items()})


def test_the_last_words_are_tokens_where_a_world_model_learns(taught_folder: Path) -> None:
    found = {}
    for mode in ("policy_only", "dual"):
        recipe = recipe_of(taught_folder, world__mode=mode)
        policy = policy_of(recipe)
        rollout = make_rollout(recipe, policy)
        (group,) = rollout.play([Task(3)], 4)
        rollout.close()
        found[mode] = group
        for trajectory in group:
            segment = trajectory.segments[0]
            tail = segment.token_ids[segment.turns == len(trajectory.turns)]
            if mode == "policy_only" or not trajectory.turns[-1].executed:
                assert len(tail) == 0
            else:
                assert trajectory.final_observation in policy.tokenizer.decode(tail)
                assert segment.kinds[-1] == Kind.OBSERVATION
    # The policy's own sequences end where they ended before.
    one, two = (collect([found[mode]]).items() for mode in ("policy_only", "dual"))
    for first, second in zip(one, two, strict=True):
        assert np.array_equal(first.token_ids, second.token_ids)
        assert np.array_equal(first.targets, second.targets)


class Figures(SilentObserver):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, step: int, figures: dict[str, float]) -> None:
        self.steps.append(figures)


@pytest.mark.parametrize("mode", WORLD_MODES)
def test_a_run_in_every_mode(mode: str, taught_folder: Path) -> None:
    watch = Figures()
    trainer = Trainer(recipe_of(taught_folder, world__mode=mode), observer=watch)
    trainer.run()
    for figures in watch.steps:
        # World updates move the policy too. What is sampled next is sampled with them, so the first ratio is 1.
        assert mode == "world_only" or figures["policy/mismatch_first"] < 1e-5
        assert ("world/prediction_loss" in figures) == (mode != "policy_only")
    assert ("prediction_loss" in trainer.evaluations[-1][2]) == (mode != "policy_only")


def test_the_world_adapter_moves_the_policy_between_steps(taught_folder: Path) -> None:
    recipe = recipe_of(taught_folder, world__mode="dual", world__learning_rate_ratio=20.0)
    trainer = Trainer(recipe)
    batch = trainer.play()
    before = trainer.learner.logprobs(batch.groups)
    trainer.learner.step(batch.groups, 0, np.zeros(len(batch.groups), dtype=bool))
    after = trainer.learner.logprobs(batch.groups)
    trainer.close()
    assert max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True)) > 1e-3


def test_a_run_leaves_adapters_and_a_policy_that_others_load(taught_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(taught_folder, world__mode="dual")
    result = train(recipe, output=tmp_path / "run", observer=SilentObserver())
    assert {path.name for path in (result.path / "adapters").iterdir()} == {"policy", "world", "merged"}
    model = AutoModelForCausalLM.from_pretrained(result.path / "policy")
    adapted = policy_of(
        recipe_of(
            taught_folder, world__mode="dual", adapters__policy_folder=str(result.path / "adapters" / "policy"),
            adapters__world_folder=str(result.path / "adapters" / "world"),
        )
    )  # fmt: skip
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted.model(ids).logits, atol=1e-4)
    assert not any("lora" in name for name in load_file(result.path / "policy" / "model.safetensors"))


class StopAfter(SilentObserver):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def started(self, trainer: Any) -> None:
        self.trainer = trainer

    def learning(self) -> None:
        self.trainer.stop_requested = self.trainer.steps_done + 1 >= self.steps


def test_a_stopped_run_goes_on_with_both_adapters(taught_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(taught_folder, world__mode="dual")
    whole = train(recipe, output=tmp_path / "whole", observer=SilentObserver())
    train(recipe, output=tmp_path / "cut", observer=StopAfter(1))
    again = train(recipe, output=tmp_path / "cut", observer=SilentObserver(), resume=True)
    for name in ("policy", "world"):
        one, two = (load_file(run.path / "adapters" / name / "adapter_model.safetensors") for run in (whole, again))
        assert same(one, two)


@pytest.mark.parametrize(
    ("first", "then", "at_work"),
    [
        ("inactive", "dual", (POLICY, WORLD)), ("inactive", "world_only", (POLICY, WORLD)),
        ("dual", "inactive", (POLICY,)), ("dual", "placebo", (POLICY, WORLD)),
        # Rewards alone say nothing of a world adapter: the policy plays on as it was.
        ("dual", "policy_only", (POLICY, WORLD)), ("inactive", "policy_only", (POLICY,)),
    ],
)  # fmt: skip
def test_a_policy_goes_from_one_mode_to_another(
    first: WorldMode, then: WorldMode, at_work: tuple[str, ...], taught_folder: Path
) -> None:
    policy = policy_of(recipe_of(taught_folder, world__mode=first))
    trainer = Trainer(recipe_of(taught_folder, world__mode=then, training__steps=1), policy=policy)
    assert active_names(policy.model) == at_work
    before = weights(policy.model, WORLD)
    trainer.run()
    assert same(before, weights(policy.model, WORLD)) == (then == "policy_only")
    if then != "policy_only":
        assert trainer.history[-1]["world/grad_norm"] > 0


def test_an_adapter_that_an_algorithm_names_is_put_to_work(taught_folder: Path, tmp_path: Path) -> None:
    policy = policy_of(recipe_of(taught_folder, world__mode="policy_only", adapters__world_rank=0))
    save_adapters(policy.model, tmp_path)
    policy.model = load_adapter(policy.model, tmp_path / POLICY, "anna")
    activate(policy.model, (POLICY,))
    recipe = recipe_of(
        taught_folder, world__mode="policy_only", adapters__world_rank=0, training__steps=1,
        algorithm__options__parameters="anna",
    )  # fmt: skip
    Trainer(recipe, policy=policy)
    assert active_names(policy.model) == (POLICY, "anna")


@pytest.mark.parametrize(("ranks", "missing"), [((4, 0), "world"), ((0, 4), "policy")])
@pytest.mark.parametrize("mode", ["dual", "inactive", "placebo"])
def test_a_policy_without_the_adapters_of_a_mode(
    mode: WorldMode, ranks: tuple[int, int], missing: str, taught_folder: Path
) -> None:
    policy = load_policy(taught_folder, device="cpu")
    policy.model = add_adapters(policy.model, AdapterSettings(*ranks))
    with pytest.raises(ModelError, match=rf"world.mode {mode} needs .* lacks {missing} \(it has: ") as caught:
        Trainer(recipe_of(taught_folder, world__mode=mode), policy=policy)
    assert "\n" not in str(caught.value)


def test_other_processes_play_with_the_adapters(taught_folder: Path) -> None:
    recipe = recipe_of(taught_folder, world__mode="dual")
    policy = policy_of(recipe)
    with torch.no_grad():
        for name in (POLICY, WORLD):
            generator = torch.Generator().manual_seed(1)
            for parameter in adapter_parameters(policy.model, name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tasks = [Task(seed) for seed in range(4)]
    here = make_rollout(recipe, policy)
    there = make_processes(recipe, policy, 2)
    try:
        one, two = here.play(tasks, 2), there.play(tasks, 2)
    finally:
        here.close()
        there.close()
    for first, second in zip(one, two, strict=True):
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a.segments[0].token_ids, b.segments[0].token_ids)
            assert np.allclose(a.segments[0].logprobs, b.segments[0].logprobs, atol=1e-4, equal_nan=True)


# Rehearsing


def situations_of(groups: list[Group], count: int = 6) -> list[Hindsight]:
    """Made-up situations: the beginnings of episodes, with answers of different lengths."""
    rng = np.random.default_rng(3)
    made = []
    for number, trajectory in zip(range(count), (t for group in groups for t in group), strict=False):
        ids = np.concatenate([trajectory.segments[0].token_ids[:20], rng.integers(0, 97, 3 + number)])
        made.append(Hindsight(ids.astype(np.int32), 20, f"topic {number}", "made-up", False))
    return made


def rehearsed(groups: list[Group]) -> dict[str, list[Hindsight]]:
    return {"hindsight": situations_of(groups)}


@pytest.mark.parametrize("mode", ["dual", "inactive", "world_only", "shared"])
def test_what_was_rehearsed_is_learnt_with_the_true_answer(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = build(3, 0) if mode == "shared" else build()
    groups = make_groups(model)
    situations = {"hindsight": situations_of(groups)}
    learner = learner_of(model, mode, coefficient=1.0, share_prefixes=False)
    losses = [learner.step(groups, step, situations=situations)["hindsight/prediction_loss"] for step in range(10)]
    ids = [torch.from_numpy(one.token_ids.astype(np.int64)) for one in situations["hindsight"]]
    assert losses[-1] < losses[0] - 0.2
    with torch.no_grad():
        fresh = build(3, 0) if mode == "shared" else build()
        each = [fresh(input_ids=one[None], use_cache=False).logits[0, :-1].log_softmax(-1) for one in ids]
    nats = [-logits.gather(1, one[1:, None])[19:, 0] for logits, one in zip(each, ids, strict=True)]
    assert losses[0] == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)


def test_the_policy_of_an_inactive_world_adapter_knows_no_rehearsals_either(
    build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    alone, both = build(3, 0), build(3, 5)
    activate(both, (POLICY,))
    groups = make_groups(alone)
    policy_only, inactive = learner_of(alone, "policy_only"), learner_of(both, "inactive")
    for step in range(3):
        policy_only.step(groups, step)
        inactive.step(groups, step, situations={"hindsight": situations_of(groups), "replay": situations_of(groups)})
    assert same(weights(alone, POLICY), weights(both, POLICY))


@pytest.mark.parametrize("mode", ["dual", "inactive"])
def test_further_updates_move_the_world_adapter_alone(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    once, often = build(), build()
    groups = make_groups(once)
    situations = {"hindsight": situations_of(groups)}
    first = learner_of(once, mode).step(groups, 0, situations=situations)
    learner = learner_of(often, mode)
    learner.world = replace(learner.world, updates=5)  # type: ignore[type-var]
    more = learner.step(groups, 0, situations=situations)
    assert same(weights(once, POLICY), weights(often, POLICY))
    assert not same(weights(once, WORLD), weights(often, WORLD))
    # The loss that is told is the mean over all five: each is lower than the one before.
    assert more["hindsight/prediction_loss"] < first["hindsight/prediction_loss"] - 0.05
    assert more["policy/updates"] == first["policy/updates"] == 1.0
    # Without a rehearsal there is nothing more to learn.
    plain = build()
    learner = learner_of(plain, mode)
    learner.world = replace(learner.world, updates=5)  # type: ignore[type-var]
    learner.step(groups, 0)
    unchanged = build()
    learner_of(unchanged, mode).step(groups, 0)
    assert same(weights(plain, WORLD), weights(unchanged, WORLD))


@pytest.mark.parametrize("mode", ["dual", "inactive", "placebo", "world_only"])
def test_what_the_agent_said_is_held_and_what_it_foretold_is_not(
    mode: WorldMode, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    free, held = build(), build()
    groups = make_groups(free)
    for group in groups:
        for trajectory in group:
            first = np.flatnonzero(trajectory.segments[0].sampled_mask)[0]
            trajectory.turns[0].predictions.append(Prediction(("Left",), "", int(first), int(first) + 2))
    situations = {"hindsight": situations_of(groups)}
    lost = {}
    for model, hold in ((free, 1e-9), (held, 20.0)):
        learner = learner_of(model, mode)
        learner.world = replace(learner.world, updates=9, hold=hold)  # type: ignore[type-var]
        assert learner.world is not None
        work = hold_work(learner.world, groups, learner.passes)
        assert work is not None
        for (p, g), targets in zip(work.sequences.episodes(), work.sequences.targets, strict=True):
            segment = groups[p].trajectories[g].segments[0]
            assert np.array_equal(targets, np.flatnonzero(segment.sampled_mask)[2:])
        now_N = np.concatenate([logprobs[2:] for logprobs in learner.logprobs(groups)])
        assert np.allclose(work.batch.old_logprobs_N.numpy(), now_N, atol=1e-5)
        lost[hold] = learner.step(groups, 0, situations=situations)["hold/lost"]
    assert same(weights(free, POLICY), weights(held, POLICY)), "only the world adapter is held"
    assert lost[20.0] < 0.7 * lost[1e-9]


def test_each_further_update_replays_a_draw_of_its_own(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    model = build()
    groups = make_groups(model)
    fresh = situations_of(groups)
    learner = learner_of(model, "dual")
    learner.world = replace(learner.world, updates=3)  # type: ignore[type-var]
    assert learner.world is not None
    works, _ = world_works(learner.world, groups, {"hindsight": fresh, "replay": [*fresh, *fresh, *fresh]}, 0, 0)
    of = {work.objectives[0].name: work for work in works}
    parts = list(learner._parts(works, groups, {"hindsight": fresh, "replay": fresh}, 0))
    learnt = [{work.objectives[0].name: numbers.tolist() for work, numbers in part} for part, _ in parts]
    assert [share for _, share in parts] == pytest.approx([1.0, 2 / 3, 1 / 3]), "the last one moves least"
    count = len(fresh)
    assert [part["replay"] for part in learnt] == [list(range(k * count, (k + 1) * count)) for k in range(3)]
    assert learnt[0]["hindsight"] == list(range(count))
    assert all(len(part["hindsight"]) == max(1, round(count / 2)) for part in learnt[1:])
    assert of["hindsight"].draws == 1


def test_a_placebo_learns_the_answers_of_others(build: Callable[..., Any], make_groups: MakeGroups) -> None:
    situations = situations_of(make_groups(build()))
    dealt, stayed = with_other_answers(situations, np.random.default_rng(0))

    def answers(some: list[Hindsight]) -> list[bytes]:
        return [one.token_ids[one.first :].tobytes() for one in some]

    assert answers(dealt) != answers(situations)
    assert sorted(answers(dealt)) == sorted(answers(situations))
    assert stayed == 0.0
    assert all(a != b for a, b in zip(answers(dealt), answers(situations), strict=True))
    assert all(np.array_equal(a.token_ids[:20], b.token_ids[:20]) for a, b in zip(dealt, situations, strict=True))


def test_a_run_that_rehearses_and_replays(taught_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "world__mode": "dual", "agent__thinking": True, "agent__rehearse": True, "world__replay": 4,
        "agent__max_tokens_per_turn": 40,
    }  # fmt: skip
    result = train(recipe_of(taught_folder, **changes), output=tmp_path / "run", observer=SilentObserver())
    assert "rehearse/predictions" in RunFolder.open(result.path).metrics().rows[-1]


REHEARSING = {"agent.rehearse": True, "agent.thinking": True}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"world.mode": "shared", "world.learning_rate_ratio": 5}, "world.mode shared trains none"),
        ({"world.mode": "world_only", "world.learning_rate_ratio": 5}, "world.mode world_only trains none"),
        ({"world.learning_rate_ratio": 5}, "world.mode policy_only trains none"),
        ({"world.horizon": 5, **REHEARSING}, "world.horizon is about learning what was rehearsed"),
        ({"world.hindsight": 0.5, **REHEARSING}, "world.hindsight is about learning what was rehearsed"),
        ({"world.mode": "dual", "world.horizon": 5}, "world.horizon is about learning what was rehearsed"),
        ({"world.mode": "dual", "world.hindsight": 0.5}, "world.hindsight is about learning what was rehearsed"),
        ({"world.mode": "dual", "world.replay_size": 5, **REHEARSING}, "set world.replay above 0"),
        ({"world.foreseeable": False}, "world.foreseeable is about learning from answers"),
        ({"world.coefficient": 0.5}, "world.coefficient is about learning from answers"),
        ({"world.mode": "dual", "world.hold": 1, **REHEARSING}, "set world.updates above 1"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve_recipe("frozenlake", changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"world.mode": "world_only", "world.learning_rate_ratio": 5, "adapters.world_rank": 8},
        {"world.mode": "dual", "world.learning_rate_ratio": 5, "world.foreseeable": False, "world.coefficient": 2},
        {"world.mode": "shared", "world.horizon": 5, "world.hindsight": 0.5, **REHEARSING},
        {"world.mode": "dual", "world.replay": 4, "world.replay_size": 5, **REHEARSING},
        # What is as it always is, is no mistake: a resolved recipe says everything.
        {"world.learning_rate_ratio": 1, "world.horizon": 0, "world.hindsight": 1, "world.replay_size": 2048},
    ],
)
def test_options_that_do_something_are_taken(changes: dict[str, Any]) -> None:
    recipe = resolve_recipe("frozenlake", changes)
    assert resolve_recipe(recipe) == recipe


def test_replay_without_rehearsals_is_refused(taught_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"world.replay replays what was rehearsed"):
        recipe_of(taught_folder, world__mode="dual", world__replay=4)
    for changes in (
        {"world__mode": "dual"},
        {"world__mode": "shared", "agent__thinking": True, "agent__rehearse": True},
    ):
        with pytest.raises(RecipeError, match=r"world.updates above 1 learns from what was rehearsed"):
            recipe_of(taught_folder, world__updates=2, **changes)
    with pytest.raises(RecipeError, match=r"agent.rehearse needs a thought"):
        recipe_of(taught_folder, agent__rehearse=True, agent__thinking=False)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("mode", ["dual", "inactive", "world_only"])
@pytest.mark.parametrize("minibatches", [1, 5])
def test_one_situation_and_many_minibatches(
    minibatches: int, mode: WorldMode, algorithm: str, build: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = build()
    if mode == "inactive":
        activate(model, (POLICY,))
    groups = make_groups(model)
    before = weights(model, WORLD)
    learner = learner_of(model, mode, algorithm, minibatches=minibatches)
    figures = learner.step(groups, 0, situations={"hindsight": situations_of(groups, 1)})
    assert figures["hindsight/prediction_loss"] > 0
    assert (mode != "world_only") <= figures["policy/updates"] <= minibatches * (mode != "world_only")
    assert ("policy/loss/value" in figures) == (algorithm == "ppo" and mode != "world_only")
    assert moved(before, weights(model, WORLD))
