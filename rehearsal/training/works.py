"""What the learner works on in a step: sequences, the objectives that learn from them, and the adapters at work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.batch import Objective, TokenBatch
from rehearsal.errors import ModelError, RecipeError
from rehearsal.models.adapters import active_names, check_adapters, trained_parameters
from rehearsal.training.placebo import with_other_answers, with_shuffled_answers
from rehearsal.training.sequences import Sequences, collect, collect_situations
from rehearsal.training.world import WorldModel
from rehearsal.trajectory import Group, Kind


@dataclass
class Work:
    """Sequences that some objectives learn from, in passes through some adapters.

    Attributes:
        sequences: with the tokens that are targets.
        batch: what is known about these tokens.
        objectives: the terms of the loss.
        adapters: those that the passes run through; None for those that are active anyway.
        rng: for the cut into minibatches.
    """

    sequences: Sequences
    batch: TokenBatch
    objectives: Sequence[Objective]
    adapters: tuple[str, ...] | None
    rng: np.random.Generator


def parameter_sets(model: Any, objectives: Sequence[Objective]) -> dict[str, list[torch.nn.Parameter]]:
    """What each name that objectives use for their parameters stands for.

    Raises:
        RecipeError: if one of them updates everything and another an adapter, which is part of everything.
        ModelError: if there is no such adapter, or the model has one that is more than low-rank factors.
    """
    check_adapters(model)
    names = list(dict.fromkeys(objective.parameters for objective in objectives)) or ["all"]
    if "all" in names and len(names) > 1:
        raise RecipeError(
            f'One objective updates "all" parameters and another the adapter "{next(n for n in names if n != "all")}", '
            'which is a part of them; set algorithm.options.parameters to "policy".'
        )
    found = {name: trained_parameters(model, name) for name in names}
    for name, parameters in found.items():
        for parameter in parameters if name != "all" else ():
            # PEFT's own switch freezes all adapters but the one that is chosen.
            parameter.requires_grad_(True)
    return found


def check_at_work(model: Any, objectives: Sequence[Objective]) -> None:
    """Look whether a pass goes through every adapter that is learnt: it would have no gradient, and nobody would know.

    Raises:
        ModelError: naming one that it does not go through.
    """
    active = active_names(model)
    for name in {objective.parameters for objective in objectives} - {"all", *active}:
        raise ModelError(
            f'The adapter "{name}" is to be learnt and passes do not go through it (but through: '
            f"{', '.join(active) or 'none'}); put it to work with rehearsal.models.adapters.activate."
        )


def world_works(
    world: WorldModel, groups: Sequence[Group], situations: Mapping[str, Sequence[Hindsight]], seed: int, step: int
) -> tuple[list[Work], dict[str, float]]:
    """What a world model learns in passes of its own.

    Args:
        world: the mode.
        groups: the episodes of the step; their answers are learnt here only if the mode keeps them from the policy's
            passes.
        situations: true answers to what was rehearsed, by the name that their figures get.
        seed: with ``step``, of the cut into minibatches and of the placebo. The policy draws from another stream, so
            what it learns does not depend on whether there is a world model.
        step: number of the step.

    Returns:
        what it learns; and with a placebo ``NAME/stayed_true``, the share of the answers that say what they said before
        they were dealt out.
    """
    works: list[Work | None] = []
    stayed: dict[str, float] = {}
    if world.apart:
        rng = np.random.default_rng([seed, step, 2])
        told = groups
        if world.shuffled:
            told, stayed[world.objective.name] = with_shuffled_answers(groups, rng, world.foreseeable)
        works.append(_world_work(collect(told, False, True, world.foreseeable), world, world.objective, rng))
    for number, (name, some) in enumerate(situations.items()):
        rng = np.random.default_rng([seed, step, 3 + number])
        if world.shuffled:
            some, stayed[name] = with_other_answers(some, rng)
        objective = replace(world.objective, name=name, coefficient=world.hindsight)
        works.append(_world_work(collect_situations(some), world, objective, rng))
    figures = {f"{name}/stayed_true": share for name, share in stayed.items() if not math.isnan(share)}
    return [work for work in works if work is not None], figures


def _world_work(sequences: Sequences, world: WorldModel, objective: Objective, rng: np.random.Generator) -> Work | None:
    """Sequences of which all targets are answers: the policy learns from none of them."""
    pairs = list(zip(sequences.segments, sequences.targets, strict=True))
    if not any(len(wanted) for _, wanted in pairs):
        return None
    token_ids_N = np.concatenate([segment.token_ids[wanted] for segment, wanted in pairs])
    turns_N = np.concatenate([segment.turns[wanted] for segment, wanted in pairs])
    count = len(token_ids_N)
    batch = TokenBatch(
        token_ids_N=torch.from_numpy(token_ids_N.astype(np.int64)),
        kinds_N=torch.full((count,), int(Kind.OBSERVATION), dtype=torch.int8),
        turns_N=torch.from_numpy(turns_N.astype(np.int64)),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(pairs)), [len(wanted) for _, wanted in pairs])),
        n_sequences=len(pairs),
        advantages_N=torch.zeros(count),
        policy_mask_N=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs_N=torch.full((count,), torch.nan),
        old_logprobs_N=torch.full((count,), torch.nan),
        observation_mask_N=torch.ones(count, dtype=torch.bool),
    )
    return Work(sequences, batch, [objective], world.adapters, rng)
