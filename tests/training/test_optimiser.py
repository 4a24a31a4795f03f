"""Updates of weights that have few bits are not rounded away, and a resumed optimiser goes on exactly."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsal.algorithms.presets import preset
from rehearsal.models.parallel import accumulate_gradients
from rehearsal.training.learner import Learner
from rehearsal.training.optimiser import MasterAdamW, make_optimiser
from rehearsal.training.options import TrainingOptions
from rehearsal.trajectory import Group

MakeGroups = Callable[..., list[Group]]
SMALL_STEPS = TrainingOptions(learning_rate=1e-6)


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Weights of the size that they have in models; a bfloat16 step between two of them is 1e-4 or so."""
    generator = torch.Generator().manual_seed(0)
    made = [0.02 * torch.randn(shape, generator=generator) for shape in ((16, 8), (8,))]
    # What bfloat16 can hold, so that all begin alike.
    return [torch.nn.Parameter(tensor.bfloat16().to(dtype)) for tensor in made]


def pull(optimiser: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int, first: int = 0) -> None:
    """Steps along gradients that mostly agree."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            holder = optimiser.master(parameter) if isinstance(optimiser, MasterAdamW) else parameter
            gradient = 1.0 + 0.1 * torch.randn(parameter.shape, generator=generator)
            holder.grad = gradient.to(holder.dtype)
        optimiser.step()
        optimiser.zero_grad()


def test_two_hundred_small_steps_move_bfloat16_weights_as_they_move_float32_ones() -> None:
    exact, ours, plain = weights(torch.float32), weights(torch.bfloat16), weights(torch.bfloat16)
    before = [weight.detach().clone() for weight in ours]
    options = {"lr": 1e-6, "betas": (SMALL_STEPS.beta1, SMALL_STEPS.beta2), "weight_decay": 0.0}
    pull(make_optimiser(exact, SMALL_STEPS), exact, 200)
    pull(make_optimiser(ours, SMALL_STEPS), ours, 200)
    pull(torch.optim.AdamW(plain, **options), plain, 200)
    for mine, other, unmoved, began in zip(ours, exact, plain, before, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, other.bfloat16()), "as in float32, to the last bit of what is left of it"
        moved = (other - began.float()).abs()
        assert moved.min() > 1.5e-4 and moved.max() < 2.5e-4
        assert (mine != began).float().mean() > 0.95
        large = began.float().abs() > 0.01
        assert torch.equal(unmoved[large], began[large]), "without copies they stay where they are"


def test_float32_weights_are_their_own_masters() -> None:
    ours, plain = weights(torch.float32), weights(torch.float32)
    optimiser = make_optimiser(ours, TrainingOptions(learning_rate=1e-3, weight_decay=0.1))
    groups = [{"params": plain[:1], "weight_decay": 0.1}, {"params": plain[1:], "weight_decay": 0.0}]
    pull(optimiser, ours, 5)
    pull(torch.optim.AdamW(groups, lr=1e-3), plain, 5)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    assert optimiser.master(ours[0]) is ours[0]
    assert optimiser.state_dict()["masters"] == {}


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimiser_ends_where_one_ends_that_was_not_stopped(dtype: torch.dtype) -> None:
    whole, cut = weights(dtype), weights(dtype)
    pull(make_optimiser(whole, SMALL_STEPS), whole, 90)
    first = make_optimiser(cut, SMALL_STEPS)
    pull(first, cut, 41)
    state = saved(first.state_dict())
    fresh = [torch.nn.Parameter(weight.detach().clone()) for weight in cut]
    second = make_optimiser(fresh, SMALL_STEPS)
    second.load_state_dict(state)
    pull(second, fresh, 49, first=41)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fresh, whole, strict=True))


def test_a_run_of_bfloat16_may_go_on_in_float32_and_the_other_way() -> None:
    narrow = weights(torch.bfloat16)
    optimiser = make_optimiser(narrow, SMALL_STEPS)
    pull(optimiser, narrow, 30)
    wide = [torch.nn.Parameter(weight.detach().float()) for weight in narrow]
    make_optimiser(wide, SMALL_STEPS).load_state_dict(saved(optimiser.state_dict()))
    assert all(torch.equal(mine, optimiser.master(theirs)) for mine, theirs in zip(wide, narrow, strict=True))
    old = torch.optim.AdamW([{"params": wide[:1]}, {"params": wide[1:]}])
    again = make_optimiser(narrow, SMALL_STEPS)
    again.load_state_dict(saved(old.state_dict()))
    assert all(torch.equal(again.master(weight), weight.float()) for weight in narrow), "there was no copy to take up"


def test_rates_and_decay_are_those_of_the_recipe_after_a_resume() -> None:
    parameters = weights(torch.float32)
    first = make_optimiser(parameters, TrainingOptions(weight_decay=0.0, beta2=0.99))
    pull(first, parameters, 1)
    second = make_optimiser(parameters, TrainingOptions(weight_decay=0.1, beta2=0.9))
    second.load_state_dict(saved(first.state_dict()))
    assert [group["weight_decay"] for group in second.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in second.param_groups} == {(0.9, 0.9)}


def test_gradients_of_many_packs_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 1 stays where it is when 0.001 is added to it, however often."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = make_optimiser([parameter], SMALL_STEPS)

    def losses_of(scale: float) -> tuple[list[Tensor | None], None]:
        return [(parameter * scale).sum()], None

    packs = [1.0, *[0.001] * 1000]
    for _ in accumulate_gradients([], [[parameter]], losses_of, packs, 1, optimiser.master):
        pass
    assert parameter.grad is None
    total = optimiser.master(parameter).grad
    assert total is not None
    assert torch.allclose(total, torch.full((4,), 2.0), rtol=1e-2)
    optimiser.zero_grad()
    assert optimiser.master(parameter).grad is None


# In the learner


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_learner_moves_a_bfloat16_model_by_small_steps_and_resumes_exactly(
    algorithm: str, tiny_qwen3: Callable[..., Any], make_groups: MakeGroups
) -> None:
    options = TrainingOptions(learning_rate=1e-6, critic_learning_rate=1e-6, pack_tokens=64)
    torch.manual_seed(0)
    whole = tiny_qwen3(64).bfloat16()
    began = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    groups = make_groups(whole)
    cut = copy.deepcopy(whole)

    def learner_of(model: Any) -> Learner:
        return Learner(model, preset(algorithm), options)

    learner = learner_of(whole)
    for step in range(8):
        figures = learner.step(groups, step)
        assert figures["policy/grad_norm"] > 0
    master = learner.optimisers["all"].master
    drift = {name: (master(w) - began[name].float()).abs().max() for name, w in whole.named_parameters()}
    assert all(0 < moved < 1e-5 for moved in drift.values()), drift
    assert all(torch.equal(weight, master(weight).bfloat16()) for weight in whole.parameters())

    first = learner_of(cut)
    for step in range(3):
        first.step(groups, step)
    state = saved(first.state_dict())
    second_model = copy.deepcopy(cut)
    second = learner_of(second_model)
    second.load_state_dict(state)
    for step in range(3, 8):
        second.step(groups, step)
    for one, other in zip(whole.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(master(one), second.optimisers["all"].master(other))


def test_a_run_of_a_bfloat16_model_resumes_exactly(small: Callable[..., Any], tmp_path: Path) -> None:
    from rehearsal.training.observer import SilentObserver
    from rehearsal.training.run import train

    class StopAfterTwo(SilentObserver):
        def started(self, trainer: Any) -> None:
            self.trainer = trainer

        def learning(self) -> None:
            self.trainer.stop_requested = self.trainer.steps_done == 1

    recipe = small(model__dtype="bfloat16", training__learning_rate=1e-4)
    whole = train(recipe, output=tmp_path / "whole")
    train(recipe, output=tmp_path / "cut", observer=StopAfterTwo())
    again = train(output=tmp_path / "cut", resume=True)
    for one, other in zip(whole.policy.model.parameters(), again.policy.model.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)
