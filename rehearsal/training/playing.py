"""What plays the episodes of a recipe: environment, answer format, limits, engine, and the processes they live in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rehearsal.agents.agent import Limits
from rehearsal.agents.feedback import Feedback
from rehearsal.agents.protocol import Protocol as AnswerProtocol
from rehearsal.agents.toolbox import Toolkit, ToolLimits
from rehearsal.agents.toolkit import make_source, source_name, tool_path
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import check_names, import_path
from rehearsal.errors import EnvironmentFault, ModelError, RecipeError
from rehearsal.generation.local import LocalEngine, free_memory
from rehearsal.generation.sampling import SamplingParams
from rehearsal.models.adapters import (
    POLICY,
    WORLD,
    AdapterSettings,
    activate,
    active_names,
    adapter_names,
    add_adapters,
    load_adapter,
)
from rehearsal.models.load import Policy, load_policy, save_policy
from rehearsal.rollout import ProcessRollout, Rollout, may_share
from rehearsal.time_limit import LateError, in_time
from rehearsal.training.recipe import Recipe
from rehearsal.training.tasks import Variant, unlocked_tools, variants_of
from rehearsal.training.world import APART, WorldMode

_MANY_EPISODES = 4000
"""A process takes seconds to begin, which fewer episodes than these do not pay for."""
_MOST_PROCESSES = 16
_SECONDS_TO_BEGIN = 60.0
"""What the first environment may take at least: its module is imported with it."""
DEFAULT_TOOL_TURNS = 8
"""Turns for tool calls where neither turns nor calls are limited."""


def policy_of(recipe: Recipe) -> Policy:
    """The policy that a recipe names, loaded, with its adapters."""
    policy = _without_adapters(recipe)
    return replace(policy, model=with_adapters(policy.model, recipe))


def _without_adapters(recipe: Recipe) -> Policy:
    model = recipe.model
    return load_policy(
        model.path, device=model.device, dtype=model.dtype, history=model.history,
        template_options=model.template_options, gradient_checkpointing=model.gradient_checkpointing,
    )  # fmt: skip


def with_adapters(model: Any, recipe: Recipe, mode: WorldMode | None = None) -> Any:
    """A model with adapters, its own or, where it has none, those of a recipe; and those of them active that are played
    with and learnt, whoever had it before.

    Args:
        model: the base, or a model with adapters.
        recipe: for the adapters and the mode.
        mode: another one than the recipe's.

    Raises:
        ModelError: if they do not fit the model, or one is missing that the mode needs.
    """
    mode = mode or recipe.world.mode
    if names := adapter_names(model):
        if missing := [name for name in (POLICY, WORLD) if mode in APART and name not in names]:
            raise ModelError(
                f"world.mode {mode} needs the adapters policy and world, and the given model lacks {missing[0]} "
                f"(it has: {', '.join(names)}); put it in, or give a model without adapters, which gets the recipe's."
            )
    else:
        model = _fresh_adapters(model, recipe)
    activate(model, active_in(model, mode, recipe.algorithm.options.get("parameters")))
    return model


def active_in(model: Any, mode: WorldMode, named: str | None = None) -> tuple[str, ...]:
    """Which adapters of a model are at work in a mode: what is trained, but for a world adapter that is kept apart.

    What the mode does not speak of stays as it is: a population of other adapters, or a world adapter where only
    rewards are learnt from.

    Args:
        model: with or without adapters.
        mode: who learns from answers.
        named: the adapter that the algorithm names, if it does.
    """
    now, wanted = active_names(model), {POLICY, named}
    if mode in ("dual", "placebo", "world_only"):
        wanted.add(WORLD)
    apart = {WORLD} if mode == "inactive" else set()
    return tuple(name for name in adapter_names(model) if (name in now or name in wanted) and name not in apart)


def _fresh_adapters(model: Any, recipe: Recipe) -> Any:
    options, needed = recipe.adapters, recipe.world.mode in APART
    usual = AdapterSettings() if needed else AdapterSettings(0, 0)
    targets = options.targets if isinstance(options.targets, str) else tuple(options.targets)
    settings = AdapterSettings(
        usual.policy_rank if options.policy_rank is None else options.policy_rank,
        usual.world_rank if options.world_rank is None else options.world_rank,
        options.alpha, options.rank_stabilised, targets,
    )  # fmt: skip
    folders = {POLICY: options.policy_folder, WORLD: options.world_folder}
    fresh = {name: rank for name, rank in settings.ranks.items() if folders[name] is None}
    model = add_adapters(
        model, replace(settings, policy_rank=fresh.get(POLICY, 0), world_rank=fresh.get(WORLD, 0)), recipe.seed
    )
    for name, folder in folders.items():
        if folder is not None:
            model = load_adapter(model, folder, name)
    return model


def answer_protocol(recipe: Recipe) -> AnswerProtocol:
    """The answer format of a recipe."""
    agent = recipe.agent
    return AnswerProtocol(thinking=agent.thinking, format_penalty=agent.format_penalty, rehearse=agent.rehearse)


def episode_limits(recipe: Recipe) -> list[Limits]:
    """What an episode may use, in each environment of a recipe: what the recipe says, else what the environment
    says.

    Raises:
        RehearsalError: for an environment that cannot be made.
    """
    seconds = max(recipe.environment.step_timeout, _SECONDS_TO_BEGIN)
    found = []
    for variant in variants_of(recipe):
        try:
            found.append(in_time(partial(_limits_of, recipe, variant), seconds, "rehearsal-environment"))
        except LateError as error:
            raise EnvironmentFault(
                f"The environment {variant.name} was not made within {seconds:g} s; see what its constructor waits "
                "for, or raise environment.step_timeout."
            ) from error
    return found


def _limits_of(recipe: Recipe, variant: Variant) -> Limits:
    agent = variant.agent
    with contextlib.closing(variant.make()) as env:
        return Limits.for_env(
            env, max_turns=agent.max_turns, max_actions_per_turn=agent.max_actions_per_turn,
            max_actions=agent.max_actions, max_tokens_per_turn=agent.max_tokens_per_turn,
            max_context=agent.max_context, tool_turns=tool_turns(recipe),
        )  # fmt: skip


def tool_turns(recipe: Recipe) -> int:
    """Turns that an episode has for tool calls beside those of its environment: one for each call. An environment that
    brings tools of its own has counted them in."""
    return (recipe.tools.max_calls or DEFAULT_TOOL_TURNS) if recipe.tools.names else 0


def make_toolkit(recipe: Recipe) -> Toolkit:
    """The tools of a recipe. Close it after use; a rollout closes its own.

    Raises:
        ToolError: for tools that cannot be made.
        RecipeError: for a limit on a tool that there is not, or a stage that unlocks one.
    """
    options = recipe.tools
    limits = ToolLimits(
        options.max_calls, options.max_calls_per_turn, dict(options.per_tool), options.cost, options.timeout,
        options.max_characters,
    )  # fmt: skip
    toolkit = Toolkit([], limits)
    try:
        for name in options.names:
            toolkit.add(make_source(name, options.options.get(name)), source_name(name))
        _check_limited(recipe, toolkit)
        _check_unlocked(recipe)
    except BaseException:
        toolkit.close()
        raise
    return toolkit


def _check_limited(recipe: Recipe, toolkit: Toolkit) -> None:
    """Refuse a limit on a tool that there is not; those of an environment may come with its tasks and are not known."""
    if not recipe.tools.per_tool:
        return
    there: set[str] = set()
    for variant in variants_of(recipe):
        with contextlib.closing(variant.make()) as env:
            if type(env).tools is not TextEnv.tools:
                return
            toolbox = toolkit.open(env)
            if toolbox is not None:
                there |= set(toolbox.tools)
                toolbox.close()
    check_names("tool", recipe.tools.per_tool, there)


def _check_unlocked(recipe: Recipe) -> None:
    """Refuse a stage that unlocks a tool that there is not. Those of an environment are looked for in its first task:
    one whose tools come with its tasks unlocks them itself."""
    wanted = set[str]().union(*unlocked_tools(recipe)) - set(recipe.tools.names)
    if not wanted:
        return
    there = set(recipe.tools.names)
    for variant in variants_of(recipe):
        with contextlib.closing(variant.make()) as env:
            env.reset(seed=0)
            toolbox = Toolkit().open(env)
            there |= set(toolbox.tools) if toolbox is not None else set()
    check_names("tool (in tools.names or of the environment, for a stage to unlock) called", sorted(wanted), there)


def with_memory(recipe: Recipe, policy: Policy) -> Recipe:
    """The recipe with the memory for keys and values that its engine has, where it leaves that to what is free now."""
    if recipe.engine.memory_gib is not None:
        return recipe
    memory = max(0.001, round(free_memory(policy.device) / 4 / 2**30, 3))
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"memory_gib": memory})})


def make_engine(recipe: Recipe, model: Any) -> LocalEngine:
    """The local engine of a recipe."""
    memory = recipe.engine.memory_gib
    return LocalEngine(
        model, max_context=recipe.agent.max_context, max_sessions=recipe.engine.max_sessions,
        memory_bytes=None if memory is None else int(memory * 2**30), prefill_tokens=recipe.engine.prefill_tokens,
    )  # fmt: skip


def make_rollout(
    recipe: Recipe, policy: Policy, *, engine: LocalEngine | None = None,
    makers: Sequence[Callable[[], TextEnv]] | None = None, limits: Sequence[Limits] | None = None,
    feedback: Feedback | None = None,
) -> Rollout:  # fmt: skip
    """What plays the agent of a recipe in its environment, on a local engine.

    Args:
        recipe: of the run.
        policy: who plays.
        engine: one that is there already; a new one if None.
        makers, limits: of other environments than the recipe's.
        feedback: the user who comments on answers, if there is one.
    """
    limits = episode_limits(recipe) if limits is None else limits
    makers = [variant.maker for variant in variants_of(recipe)] if makers is None else makers
    rollout = Rollout(
        makers, make_engine(recipe, policy.model) if engine is None else engine, policy.renderer,
        answer_protocol(recipe), limits,
        sampling=SamplingParams(recipe.sampling.temperature, recipe.sampling.top_k, recipe.sampling.top_p),
        seed=recipe.seed, workers=recipe.environment.workers, step_timeout=recipe.environment.step_timeout,
        keep_ending=recipe.world.mode != "policy_only" or recipe.diagnostics.prediction_loss,
        toolkit=make_toolkit(recipe), feedback=feedback,
    )  # fmt: skip
    try:
        rollout.check_opening()
    except BaseException:
        rollout.close()
        raise
    return rollout


def processes_for(recipe: Recipe, policy: Policy) -> int:
    """How many processes play the episodes of a run.

    Raises:
        RecipeError: if several are asked for and the model or the environment cannot be taken to other processes.
    """
    wanted, training = recipe.engine.processes, recipe.training
    known = all(import_path(variant.name) is not None for variant in variants_of(recipe))
    known = known and all(tool_path(name) is not None for name in recipe.tools.names)
    possible = may_share(policy.model) and known
    if wanted is None:
        long_enough = training.steps * training.groups * training.group_size >= _MANY_EPISODES
        return min(torch.get_num_threads(), _MOST_PROCESSES) if possible and long_enough else 1
    if wanted > 1 and not possible:
        raise RecipeError(
            "Several processes can play for a small float32 model on a processor, in an environment and with tools "
            "that can be imported as package.module:Class; set engine.processes to 1."
        )
    return wanted


def make_processes(recipe: Recipe, policy: Policy, processes: int) -> ProcessRollout:
    """The same rollout in several processes, which share the memory and the places of one."""
    memory = recipe.engine.memory_gib or free_memory(policy.device) / 4 / 2**30
    engine = recipe.engine.model_copy(
        update={"memory_gib": memory / processes, "max_sessions": -(-recipe.engine.max_sessions // processes)}
    )
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        save_policy(policy.model, policy.tokenizer, folder)
        model = recipe.model.model_copy(update={"path": folder, "device": "cpu", "dtype": "float32"})
        environment = recipe.environment.model_copy(update={"name": _path(recipe.environment.name)})
        mixture = [part.model_copy(update={"name": _path(part.name)}) for part in recipe.mixture]
        paths = {name: tool_path(name) or name for name in recipe.tools.names}
        tools = recipe.tools.model_copy(
            update={
                "names": list(paths.values()),
                "options": {paths[name]: options for name, options in recipe.tools.options.items()},
            }
        )
        stages = [
            {**stage, "tools": [paths.get(name, name) for name in stage.get("tools", [])]}
            for stage in recipe.curriculum.stages
        ]
        curriculum = recipe.curriculum.model_copy(update={"stages": stages})
        shared = recipe.model_copy(
            update={
                "engine": engine, "model": model, "environment": environment, "mixture": mixture, "tools": tools,
                "curriculum": curriculum,
            }
        )  # fmt: skip
        return ProcessRollout(partial(_rollout_of, shared), policy.model, processes)


def _path(name: str) -> str:
    """Where another process finds an environment; the name itself where nobody asks for it."""
    return import_path(name) or name


def _rollout_of(recipe: Recipe) -> tuple[Rollout, Any]:
    # Its weights come with every batch of tasks, adapters multiplied into them.
    policy = _without_adapters(recipe)
    return make_rollout(recipe, policy), policy.model
