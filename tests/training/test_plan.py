"""What a recipe will take, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal.errors import GenerationError, ModelError, RecipeError
from rehearsal.models.load import load_policy
from rehearsal.training.optimiser import make_optimiser
from rehearsal.training.plan import describe_plan, memory_plan
from rehearsal.training.playing import make_rollout, policy_of
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.world import MODE_TEXTS, WORLD_MODES


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve_recipe(
        {
            "model": {"path": str(folder), "device": "cpu"},
            "agent": {"thinking": False, "max_tokens_per_turn": 12, "max_context": 260},
            "engine": {"max_sessions": 8, "memory_gib": 0.05},
        },
        overrides,
    )


def test_weights_and_cache_are_exact(taught_folder: Path) -> None:
    recipe = recipe_of(taught_folder)
    plan = memory_plan(recipe)
    policy = load_policy(taught_folder, device="cpu")
    assert plan["weights"] == 4 * policy.n_parameters
    assert plan["gradients"] == plan["weights"]
    assert plan["optimiser"] == 2 * plan["weights"]
    rollout = make_rollout(recipe, policy)
    # Keys and values of 2 layers, 1 head of width 16, in float32.
    assert plan["keys and values"] == rollout.engine.capacity * 260 * 2 * 2 * 16 * 4
    assert plan["keys and values"] <= 0.05 * 2**30
    rollout.close()


def test_half_the_precision_takes_half_the_memory_and_copies_to_train(taught_folder: Path) -> None:
    whole, half = (memory_plan(recipe_of(taught_folder, model__dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for name in ("weights", "activations (estimate)"):
        assert half[name] == whole[name] / 2
    # Gradients are summed in float32, and beside two moments there is a float32 copy of each weight.
    assert half["gradients"] == whole["gradients"]
    assert half["optimiser"] == 1.5 * whole["optimiser"] == 12 / 4 * whole["weights"]
    ppo = memory_plan(recipe_of(taught_folder, algorithm__name="ppo", model__dtype="bfloat16"))
    assert ppo["critic"] == ppo["weights"] + ppo["gradients"] + ppo["optimiser"]


def test_adapters_need_no_copies(taught_folder: Path) -> None:
    changes = {"adapters__policy_rank": 4, "model__dtype": "bfloat16"}
    policy, plan = policy_of(recipe_of(taught_folder, **changes)), memory_plan(recipe_of(taught_folder, **changes))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert plan["optimiser"] == 2 * plan["gradients"] == 8 * sum(p.numel() for p in trained)


def test_the_plan_is_what_the_optimiser_holds(taught_folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        recipe = recipe_of(taught_folder, model__dtype=dtype)
        plan = memory_plan(recipe)
        weights = [p for p in policy_of(recipe).model.parameters() if p.requires_grad]
        optimiser = make_optimiser(weights, recipe.training)
        for weight in weights:
            optimiser.master(weight).grad = torch.zeros_like(optimiser.master(weight))
        optimiser.step()
        moments = [t for state in optimiser.state.values() for t in state.values() if t.ndim]
        masters = optimiser.state_dict()["masters"].values()
        assert plan["optimiser"] == sum(t.numel() * t.element_size() for t in (*moments, *masters))


def test_what_algorithms_need_beside_the_policy(taught_folder: Path) -> None:
    assert not {"critic", "reference policy"} & memory_plan(recipe_of(taught_folder)).keys()
    ppo = memory_plan(recipe_of(taught_folder, algorithm__name="ppo"))
    assert ppo["critic"] == 4 * ppo["weights"]
    kl = memory_plan(recipe_of(taught_folder, algorithm__options__kl_coefficient=0.1))
    assert kl["reference policy"] == kl["weights"]


def test_activations_follow_the_packs(taught_folder: Path) -> None:
    name = "activations (estimate)"
    plain = memory_plan(recipe_of(taught_folder, training__pack_tokens=1000))[name]
    assert memory_plan(recipe_of(taught_folder, training__pack_tokens=2000))[name] == 2 * plain
    again = memory_plan(recipe_of(taught_folder, training__pack_tokens=1000, model__gradient_checkpointing=True))[name]
    assert again == plain / 2  # one of two layers


def test_the_plan_in_words(taught_folder: Path) -> None:
    text = describe_plan(recipe_of(taught_folder, training__steps=5, training__epochs=2, training__minibatches=3))
    assert "5 steps of 32 x 8 episodes, 30 updates" in text
    assert "algorithm: grpo" in text
    plan = memory_plan(recipe_of(taught_folder))
    (together,) = [line for line in text.splitlines() if "together" in line]
    assert float(together.split()[1]) == pytest.approx(sum(plan.values()) / 2**20, abs=0.1)


@pytest.mark.parametrize("mode", WORLD_MODES)
def test_the_world_model_in_words(mode: str, taught_folder: Path) -> None:
    text = describe_plan(recipe_of(taught_folder, world__mode=mode))
    assert (MODE_TEXTS[mode] in text) == (mode != "policy_only")


def test_what_adapters_take(taught_folder: Path) -> None:
    whole = memory_plan(recipe_of(taught_folder))
    dual = memory_plan(recipe_of(taught_folder, world__mode="dual", adapters__policy_rank=2, adapters__world_rank=2))
    assert dual["gradients"] == dual["weights"] - whole["weights"]
    assert dual["optimiser"] == 2 * dual["gradients"]


def test_what_does_not_fit_is_told_before_anything_runs(taught_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        memory_plan(recipe_of(tmp_path / "nothing"))
    with pytest.raises(GenerationError, match="raise the memory budget"):
        memory_plan(recipe_of(taught_folder, engine__memory_gib=1e-6))
    with pytest.raises(RecipeError, match=r"raise it to \d+ or more"):
        memory_plan(recipe_of(taught_folder, agent__max_context=40))


def test_a_plan_refuses_objectives_that_the_run_would(taught_folder: Path) -> None:
    changes = {"adapters__policy_rank": 4, "algorithm__options__parameters": "world"}
    with pytest.raises(ModelError, match='no adapter "world"'):
        describe_plan(recipe_of(taught_folder, **changes))
    changes = {"world__mode": "world_only", "adapters__world_rank": 4, "adapters__policy_rank": 0}
    assert "world model, world_only" in describe_plan(recipe_of(taught_folder, **changes))


def test_a_plan_says_that_rehearsing_takes_room(taught_folder: Path) -> None:
    changes = {"agent__thinking": True, "agent__max_tokens_per_turn": 13}
    assert "rehearsing" not in describe_plan(recipe_of(taught_folder, **changes))
    told = describe_plan(recipe_of(taught_folder, agent__rehearse=True, agent__max_context=500, **changes))
    assert "rehearsing: expected answers are written within the 13 tokens of an answer" in told
