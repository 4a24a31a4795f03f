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
from rehearsal.algorithms.observation import HoldLoss
from rehearsal.errors import ModelError, RecipeError
from rehearsal.models.adapters import active_adapters, active_names, check_adapters, trained_parameters
from rehearsal.training.passes import Passes
from rehearsal.training.placebo import with_other_answers, with_shuffled_answers
from rehearsal.training.sequences import Sequences, collect, collect_situations
from rehearsal.training.world import REPLAYED, WorldModel
from rehearsal.trajectory import Group


@dataclass
class Work:
    """Sequences that some objectives learn from, in passes through some adapters.

    Attributes:
        sequences: with the tokens that are targets.
        batch: what is known about these tokens.
        objectives: the terms of the loss.
        adapters: those that the passes run through; None for those that are active anyway.
        rng: for the cut into minibatches.
        draws: how many draws of situations lie in the sequences, one after the other and all of one length. Each update
            learns one of them.
    """

    sequences: Sequences
    batch: TokenBatch
    objectives: Sequence[Objective]
    adapters: tuple[str, ...] | None
    rng: np.random.Generator
    draws: int = 1

    def drawn(self, number: int) -> np.ndarray:
        """The sequences of a draw, from 0 on."""
        return np.array_split(np.arange(len(self.sequences)), self.draws)[number]


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
        work = _world_work(collect_situations(some), world, objective, rng)
        if work is not None and name == REPLAYED:
            work.draws = world.updates
        works.append(work)
    figures = {f"{name}/stayed_true": share for name, share in stayed.items() if not math.isnan(share)}
    return [work for work in works if work is not None], figures


def hold_work(world: WorldModel, groups: Sequence[Group], passes: Passes) -> Work | None:
    """What the agent said in a step, outside of predictions, to be kept as likely as it is; None if it said nothing.

    Args:
        world: the mode.
        groups: the episodes of the step.
        passes: the models as they are now.
    """
    sequences = collect(groups)
    for number, (p, g) in enumerate(sequences.episodes()):
        trajectory = groups[p].trajectories[g]
        if len(trajectory.segments) == 1:
            # What is foretold is what has to change.
            for prediction in (one for turn in trajectory.turns for one in turn.predictions):
                wanted = sequences.targets[number]
                foretold = (wanted >= prediction.position) & (wanted < prediction.end)
                sequences.targets[number] = wanted[~foretold]
    if not any(len(wanted) for wanted in sequences.targets):
        return None
    batch = _batch(sequences, answers=False)
    with active_adapters(passes.model, world.adapters):
        batch.old_logprobs_N = torch.from_numpy(np.concatenate(passes.score(sequences.items())))
    objective = HoldLoss(world.hold, parameters=world.objective.parameters)
    return Work(sequences, batch, [objective], world.adapters, np.random.default_rng(0))


def _world_work(sequences: Sequences, world: WorldModel, objective: Objective, rng: np.random.Generator) -> Work | None:
    """Sequences of which all targets are answers: the policy learns from none of them."""
    if not any(len(wanted) for wanted in sequences.targets):
        return None
    return Work(sequences, _batch(sequences, answers=True), [objective], world.adapters, rng)


def _batch(sequences: Sequences, answers: bool) -> TokenBatch:
    """The targets of sequences of which no policy learns: all of them answers, or none."""
    pairs = list(zip(sequences.segments, sequences.targets, strict=True))

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(segment, name)[wanted] for segment, wanted in pairs])

    token_ids_N, logprobs_N = flat("token_ids"), torch.from_numpy(flat("logprobs"))
    count = len(token_ids_N)
    return TokenBatch(
        token_ids_N=torch.from_numpy(token_ids_N.astype(np.int64)),
        kinds_N=torch.from_numpy(flat("kinds")),
        turns_N=torch.from_numpy(flat("turns").astype(np.int64)),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(pairs)), [len(wanted) for _, wanted in pairs])),
        n_sequences=len(pairs),
        advantages_N=torch.zeros(count),
        policy_mask_N=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs_N=logprobs_N,
        old_logprobs_N=logprobs_N,
        observation_mask_N=torch.full((count,), answers),
    )
