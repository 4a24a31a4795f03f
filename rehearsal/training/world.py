"""How a run learns from what its environment answers: the modes, and what each means for the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from rehearsal.algorithms.batch import Objective
from rehearsal.algorithms.observation import ObservationLoss
from rehearsal.algorithms.presets import Algorithm
from rehearsal.errors import RecipeError
from rehearsal.models.adapters import POLICY, WORLD
from rehearsal.training.options import WorldOptions

WorldMode = Literal["policy_only", "shared", "dual", "inactive", "placebo", "world_only"]
WORLD_MODES: tuple[str, ...] = get_args(WorldMode)
APART: tuple[str, ...] = ("dual", "inactive", "placebo")
"""The modes in which policy and world model have an adapter each."""

MODE_TEXTS: dict[str, str] = {
    "policy_only": "nothing is learnt from what the environment answers",
    "shared": "answers are learnt with the policy's own parameters",
    "dual": "answers are learnt by an adapter of their own, which is part of every pass",
    "inactive": "answers are learnt by an adapter of their own, which is used for nothing else",
    "placebo": "answers are dealt out among episodes and then learnt by an adapter of their own",
    "world_only": "answers are learnt, and the policy is not",
}
"""Each mode in a few words."""

REPLAYED = "replay"
"""What situations of earlier steps are called among those that the world model learns."""

SHARED_COEFFICIENT = 0.05
"""What ECHO (arXiv:2605.24517) found good where policy and world model share their parameters."""


@dataclass(frozen=True)
class WorldModel:
    """What the learner needs to know about the world model.

    Attributes:
        objective: the observation loss.
        apart: whether it is learnt in passes of its own; otherwise in those of the policy.
        shuffled: whether the answers are dealt out among the episodes first.
        adapters: what its own passes run through; None for the adapters that are active anyway.
        learning_rate_ratio: learning rate of the world adapter over that of the policy.
        policy: whether the policy learns.
        hindsight: weight of the true answers to what was rehearsed.
        updates: of the world model in a step; those after the first learn from what was rehearsed alone.
        hold: weight of what keeps the agent's own words as likely as they were in those updates.
        foreseeable: whether answers are learnt that follow from what the agent had been shown.
    """

    objective: ObservationLoss
    apart: bool = False
    shuffled: bool = False
    adapters: tuple[str, ...] | None = None
    learning_rate_ratio: float = 1.0
    policy: bool = True
    hindsight: float = 1.0
    updates: int = 1
    foreseeable: bool = True
    hold: float = 0.0


def policy_parameters(adapters: Sequence[str]) -> str:
    """What a policy's objectives update in a model with these adapters, unless they say otherwise."""
    return POLICY if POLICY in adapters else "all"


def policy_objectives(
    algorithm: Algorithm, adapters: Sequence[str], world: WorldModel | None = None
) -> tuple[Objective, ...]:
    """The algorithm's objectives with the parameters that they update in a model with these adapters; none in a mode
    in which the policy does not learn."""
    if world is not None and not world.policy:
        return ()
    own = policy_parameters(adapters)
    # Objectives are dataclasses, which their protocol cannot say.
    return tuple(
        replace(cast(Any, objective), parameters=own) if objective.parameters == "all" else objective
        for objective in algorithm.objectives
    )


def all_objectives(algorithm: Algorithm, adapters: Sequence[str], world: WorldModel | None) -> tuple[Objective, ...]:
    """What is learnt in a model with these adapters: the policy's objectives, and that of the world model."""
    own = policy_objectives(algorithm, adapters, world)
    return own if world is None else (*own, world.objective)


def world_of(options: WorldOptions, adapters: Sequence[str]) -> WorldModel | None:
    """What the options of a recipe mean for a model with these adapters; see :func:`world_model`."""
    return world_model(
        options.mode, adapters, coefficient=options.coefficient, learning_rate_ratio=options.learning_rate_ratio,
        hindsight=options.hindsight, updates=options.updates, foreseeable=options.foreseeable, hold=options.hold,
    )  # fmt: skip


def world_model(
    mode: WorldMode, adapters: Sequence[str], *, coefficient: float | None = None, learning_rate_ratio: float = 1.0,
    hindsight: float = 1.0, updates: int = 1, foreseeable: bool = True, hold: float = 0.0,
) -> WorldModel | None:  # fmt: skip
    """What a mode means for a model with these adapters; None if answers are not learnt from.

    - ``policy_only``: nothing is learnt from answers;
    - ``shared``: policy and world model are the same parameters, as in ECHO;
    - ``dual``: an adapter each, both active in every pass, each with its own loss, gradient and optimiser;
    - ``inactive``: the world adapter is trained but not used, neither in play nor by the policy's loss. The policy is
      that of ``policy_only``, bit for bit;
    - ``placebo``: as ``dual``, but answers are dealt out among the episodes before they are learnt;
    - ``world_only``: the answers are learnt and the policy is not: modelling the world by playing, before any reward.

    Raises:
        RecipeError: if an adapter is missing that the mode needs.
    """
    own = policy_parameters(adapters)
    world = WORLD if WORLD in adapters else own
    if mode == "policy_only":
        return None
    if mode in APART and WORLD not in adapters:
        raise RecipeError(
            f"world.mode {mode} needs an adapter for the world model; set adapters.world_rank above 0, or world.mode "
            "to shared."
        )
    if mode != "world_only" and WORLD in adapters and POLICY not in adapters:
        raise RecipeError(
            "adapters.policy_rank is 0, which leaves the policy nothing to learn with; raise it, or set world.mode to "
            "world_only."
        )
    objective = ObservationLoss(1.0 if coefficient is None else coefficient, parameters=world)
    common = WorldModel(
        objective, learning_rate_ratio=learning_rate_ratio, hindsight=hindsight, updates=updates,
        foreseeable=foreseeable, hold=hold,
    )  # fmt: skip
    if mode == "shared":
        weight = SHARED_COEFFICIENT if coefficient is None else coefficient
        # What was rehearsed counts relative to the policy's loss, as the answers do.
        return WorldModel(
            ObservationLoss(weight, parameters=own), hindsight=weight * hindsight, foreseeable=foreseeable
        )
    if mode == "dual":
        return common
    if mode == "world_only":
        # No policy's passes to share, and no advantages to work out.
        return replace(common, apart=True, policy=False)
    return replace(common, apart=True, shuffled=mode == "placebo", adapters=tuple(adapters))
