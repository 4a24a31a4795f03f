"""What a recipe will do and how much memory it takes, before anything runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from rehearsal.models.adapters import adapter_names
from rehearsal.models.packed import causal_lm
from rehearsal.models.parallel import pack_workers
from rehearsal.training.choices import check_verdicts, chosen
from rehearsal.training.learner import keeps_start
from rehearsal.training.optimiser import training_bytes
from rehearsal.training.playing import make_rollout, make_toolkit, policy_of
from rehearsal.training.recipe import Recipe
from rehearsal.training.tasks import make_sampler, unlocked_tools, variants_of
from rehearsal.training.works import parameter_sets
from rehearsal.training.world import MODE_TEXTS, all_objectives, world_of

_MIB = 2**20


def memory_plan(recipe: Recipe) -> dict[str, float]:
    """Bytes by purpose. Weights and cache are exact; activations are an estimate within a factor of about two.

    The estimate counts, for each layer and each token of a pack, the tensors that a gated decoder keeps for its
    backward pass: about 16 of the model's width and 5 of the feed-forward layer's.
    """
    return _planned(recipe)[0]


def _planned(recipe: Recipe) -> tuple[dict[str, float], dict[str, str]]:
    """The memory, and what environments, tools and verifiers work with, of a rollout that is made for that."""
    algorithm, _ = chosen(recipe)
    check_verdicts(recipe.diagnostics)
    make_sampler(recipe)
    policy = policy_of(recipe)
    adapters = adapter_names(policy.model)
    parameter_sets(policy.model, all_objectives(algorithm, adapters, world_of(recipe.world, adapters)))
    rollout = make_rollout(recipe, policy)
    model = causal_lm(policy.model)
    config = model.config.get_text_config()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    gradients, optimiser = training_bytes(p for p in model.parameters() if p.requires_grad)
    element = torch.finfo(next(model.parameters()).dtype).bits // 8
    per_token = element * (16 * config.hidden_size + 5 * getattr(config, "intermediate_size", 4 * config.hidden_size))
    layers = 1 if recipe.model.gradient_checkpointing else config.num_hidden_layers
    plan = {
        "weights": float(weights),
        "gradients": float(gradients),
        "optimiser": float(optimiser),
        "keys and values": float(getattr(rollout.engine, "cache_bytes", 0)),
        "activations (estimate)": float(per_token * layers * recipe.training.pack_tokens * pack_workers(model)),
    }
    if any(objective.needs_reference for objective in algorithm.objectives):
        plan["reference policy"] = float(trained)  # it shares what is not trained
    elif keeps_start(recipe.diagnostics, policy.model):
        plan["policy at the start"] = float(trained)
    if algorithm.needs_critic:
        plan["critic"] = float(weights + sum(training_bytes(model.parameters())))
    facts = rollout.facts()
    rollout.close()
    return plan, facts


def describe_plan(recipe: Recipe) -> str:
    """A few plain lines for people."""
    plan, facts = _planned(recipe)
    training = recipe.training
    algorithm, _ = chosen(recipe)
    lines = [algorithm.describe()]
    if recipe.filter.name != "none" or algorithm.dynamic_sampling:
        name = "constant" if recipe.filter.name == "none" else recipe.filter.name
        refill = f", refilled up to {algorithm.max_refill_tries} times" if algorithm.dynamic_sampling else ""
        lines.append(f"filter: {name} {_options(recipe.filter.options)}".rstrip() + refill)
    if recipe.curriculum.name != "fresh":
        lines.append(f"curriculum: {recipe.curriculum.name}")
    for names, what in ((recipe.diagnostics.stop_on, "ends the run"), (recipe.diagnostics.go_back_on, "goes back")):
        if names:
            lines.append(f"a verdict that {what}: {', '.join(names)}")
    if recipe.world.mode != "policy_only":
        lines.append(f"world model, {recipe.world.mode}: {MODE_TEXTS[recipe.world.mode]}")
    if recipe.agent.rehearse:
        lines.append(
            f"rehearsing: expected answers are written within the {recipe.agent.max_tokens_per_turn} tokens of an "
            "answer (agent.max_tokens_per_turn); the first evaluation tells if many are cut off"
        )
    lines += _tool_lines(recipe)
    lines += [f"{name}: {told}" for name, told in facts.items()]
    lines.append("")
    lines.append(
        f"{training.steps} steps of {training.groups} x {training.group_size} episodes, "
        f"{training.steps * training.epochs * training.minibatches} updates"
    )
    lines.append("memory:")
    lines += [f"  {name:<24}{size / _MIB:10.1f} MiB" for name, size in plan.items()]
    lines.append(f"  {'together':<24}{sum(plan.values()) / _MIB:10.1f} MiB")
    return "\n".join(lines)


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _tool_lines(recipe: Recipe) -> list[str]:
    """The tools of the first task of each environment, one a line with what it takes, and their limits."""
    found: dict[str, str] = {}
    with contextlib.closing(make_toolkit(recipe)) as toolkit:
        for variant in variants_of(recipe):
            with contextlib.closing(variant.make()) as env:
                env.reset(seed=0)
                toolbox = toolkit.open(env)
                if toolbox is not None:
                    found |= {tool.signature: tool.description for tool in toolbox.tools.values()}
                    toolbox.close()
    if not found:
        return []
    limits = recipe.tools
    calls = "any number of calls" if limits.max_calls is None else f"{limits.max_calls} calls"
    told = [f"{calls} an episode", f"{limits.max_calls_per_turn} an answer"]
    told += [f"{count} of {name}" for name, count in limits.per_tool.items()]
    told += [f"{limits.cost:g} off the reward for each"] if limits.cost else []
    told += [f"{limits.timeout:g} s for a call that is not fast"]
    lines = [f"tools, at most {', '.join(told)}:", *(f"  {call}: {text}" for call, text in found.items())]
    for stage, unlocked in enumerate(unlocked_tools(recipe), start=1):
        if unlocked and stage > 1:
            lines.append(f"  stage {stage} unlocks {', '.join(sorted(unlocked))}")
    return lines
