"""Before any reward: what an agent learns from an expert's episodes and from its own branches of them.

Early Experience (arXiv:2510.08558; github.com/OSU-NLP-Group/EarlyExperience) in three stages, none of which reads a
reward:

1. **implicit world modelling**: the environment's words after each branch are learnt, ``-log p(s_i^j | s_i, a_i^j)``,
   once each, by the parameters that the world mode names;
2. **self-reflection**: the policy is shown what its own actions and the expert's led to, and writes what one might
   think before the expert's; what gives away that it was told, or what could not be known yet, is turned down;
3. **imitation**: ``-log p(c_i, a_i | s_i)`` of the expert's answers, with the reflection as the thought ``c_i``.

Deviations: the expert's own branches are learnt in the first stage too; the notices of our harness to answers that were
refused are not (the paper keeps an environment's error messages, and so do we where the environment itself answers);
there is one reflection a state, over all its branches; and where the protocol thinks, an expert without a reflection
has an empty thought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.observation import ObservationLoss
from rehearsal.algorithms.presets import preset
from rehearsal.errors import RecipeError
from rehearsal.evaluation.held_out import evaluate
from rehearsal.generation.sampling import stream_key
from rehearsal.models.adapters import POLICY, WORLD, active_adapters, adapter_names
from rehearsal.models.chat import ChatRenderer
from rehearsal.models.load import Policy
from rehearsal.rollout import Rollout, Task, check_failures
from rehearsal.training.branches import Experience, Proposer, State, collect_branches, spelled
from rehearsal.training.learner import Learner
from rehearsal.training.playing import make_rollout, with_adapters
from rehearsal.training.recipe import Recipe
from rehearsal.training.reflection import reflect
from rehearsal.training.sequences import collect_situations
from rehearsal.training.tasks import TaskSource
from rehearsal.training.world import WorldMode, WorldModel, policy_parameters, world_model
from rehearsal.trajectory import Kind


@dataclass(frozen=True)
class EarlySettings:
    """What is done before any reward.

    Attributes:
        episodes: that the expert plays.
        alternatives: other answers tried out in each state; two to four suffice for reflections, and world modelling
            gains from more.
        draws: answers sampled in a state to find them; twice as many if None.
        proposer: names other actions instead of the policy.
        error_share: the most of the alternatives that may have been refused.
        world_epochs: passes over the branches; 0 leaves world modelling out.
        reflect: whether reflections are written.
        shortest, longest: characters of a reflection.
        imitation_epochs: passes over the expert's answers; 0 leaves imitation out.
        empty_thoughts: whether an expert without a reflection is imitated in thinking nothing. A policy that plays by
            its thoughts then loses them where few reflections are kept; if False, its action alone is learnt.
        batch: sequences of an optimiser step.
        learning_rate: at its peak; that of the recipe if None, which is often one for rewards and low for imitation.
        held_out: validation tasks in whose states the expert's answers and the environment's words are scored.
        on_reflection: called with each state, the reflection and why it was turned down ("" if it was not): counts
            are no substitute for reading some.

    Raises:
        RecipeError: for numbers that cannot be used.
    """

    episodes: int = 64
    alternatives: int = 3
    draws: int | None = None
    proposer: Proposer | None = None
    error_share: float = 0.1
    world_epochs: int = 1
    reflect: bool = True
    shortest: int = 20
    longest: int = 1000
    imitation_epochs: int = 2
    empty_thoughts: bool = True
    batch: int = 16
    learning_rate: float | None = None
    held_out: int = 32
    on_reflection: Callable[[State, str, str], None] | None = None

    def __post_init__(self) -> None:
        least = {"episodes": 1, "alternatives": 0, "world_epochs": 0, "imitation_epochs": 0, "batch": 1, "held_out": 0,
                 "shortest": 1, "longest": self.shortest}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(f"{name} of early experience must be {low} or more, not {getattr(self, name)}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise RecipeError(f"learning_rate of early experience must be above 0, not {self.learning_rate}.")


# Imitation


def imitation_situations(
    experience: Experience, renderer: ChatRenderer, protocol: Protocol, thoughts: Mapping[State, str] | None = None,
    *, max_context: int = 1 << 30, empty_thoughts: bool = True,
) -> list[Hindsight]:  # fmt: skip
    """The expert's answers as what is to be learnt, each behind the episode up to it.

    Args:
        experience: with the expert's episodes.
        renderer, protocol: how answers are spelled.
        thoughts: what the expert thinks in a state, where the protocol thinks; nothing in states that are not there.
            It stands in the context of later answers too, as it does in play.
        max_context: tokens of an episode; answers beyond are left out.
        empty_thoughts: whether a thought of nothing is learnt with the action behind it, or the action alone.
    """
    found: list[Hindsight] = []
    for states in experience.episodes:
        before = np.empty(0, np.int32)
        for state in states:
            thought = (thoughts or {}).get(state, "")
            answer = spelled(renderer, protocol, state.actions, thought)
            kinds = protocol.kinds_of(answer, renderer.decode, renderer.opens_thought)
            learnt = len(answer) if thought or empty_thoughts else int((kinds == Kind.ACTION).sum())
            before = np.concatenate([before, state.shown, answer])
            if len(before) > max_context:
                break
            found.append(Hindsight(before, len(before) - learnt, state.topic, state.environment, False))
    return found


# All of it


def early_experience(policy: Policy, recipe: Recipe, settings: EarlySettings | None = None) -> dict[str, float]:
    """Teach a policy what can be learnt before any reward: the world, then to imitate an expert with thoughts of its
    own.

    Args:
        policy: is changed; it gets the adapters of the recipe if it has none, and those are put to work that world.mode
            plays and learns with.
        recipe: environments, agent, adapters, optimiser, and who learns from answers. A ``world.mode`` of policy_only
            means here that the policy's own parameters do, as nobody else could.
        settings: the usual ones if None.

    Returns:
        figures of :class:`Experience` and :func:`reflect`; ``world/`` and ``imitation/`` with ``examples``, ``steps``,
        ``loss_first`` and ``loss_last`` (nats a token in the first and last step); and, ``before/`` and ``after/`` it
        all, ``action_nats`` (nats of the expert's answer, an empty thought given, in held-out states), ``world_nats``
        (nats a token of the environment's words to held-out branches) and the figures of held-out play.

    Raises:
        RecipeError: where the settings do not fit the recipe, or the environment has no expert or cannot be copied.
        TrainingDiverged: if a loss or a gradient is not finite.
    """
    settings = settings or EarlySettings()
    if settings.reflect and not recipe.agent.thinking and not policy.renderer.opens_thought:
        raise RecipeError("Reflections need a thought to stand in: set agent.thinking to true, or reflect to False.")
    policy.model = with_adapters(policy.model, recipe, _mode(recipe))
    rollout = make_rollout(recipe, policy)
    try:
        return _Course(policy, recipe, settings, rollout).run()
    finally:
        rollout.close()


def _mode(recipe: Recipe) -> WorldMode:
    """Who learns from answers: somebody has to."""
    return "world_only" if recipe.world.mode == "policy_only" else recipe.world.mode


class _Course:
    """The stages, one after the other."""

    def __init__(self, policy: Policy, recipe: Recipe, settings: EarlySettings, rollout: Rollout) -> None:
        self.policy, self.recipe, self.settings, self.rollout = policy, recipe, settings, rollout
        adapters = adapter_names(policy.model)
        if WORLD in adapters and POLICY not in adapters:
            raise RecipeError("adapters.policy_rank is 0, which leaves imitation nothing to learn with; raise it.")
        world = world_model(_mode(recipe), adapters, learning_rate_ratio=recipe.world.learning_rate_ratio)
        assert world is not None
        # Nothing else is in the loss, so no weight has a meaning.
        self.world = replace(world, policy=False, hindsight=1.0)
        # The same loss as that on the environment's words: to the learner both are what another said.
        self.imitation = WorldModel(
            ObservationLoss(name="imitation", parameters=policy_parameters(adapters)), policy=False
        )
        self.tasks = TaskSource(recipe)
        self.figures: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        recipe, settings, rollout = self.recipe, self.settings, self.rollout
        n = len(self.tasks.variants)
        seeds = [stream_key(recipe.seed, "early experience", i) % 2**31 for i in range(settings.episodes)]
        experience = self._collect([Task(seed, "train", i % n) for i, seed in enumerate(seeds)])
        held_out = Experience()
        if settings.held_out:
            held_out = self._collect(self.tasks.held_out(recipe.evaluation.seed, "validation", settings.held_out))
        self.figures |= experience.figures
        self._look("before", held_out)
        self._learn("world", self.world, experience.situations(), settings.world_epochs)
        thoughts: dict[State, str] = {}
        if settings.reflect:
            thoughts, told = reflect(
                rollout, experience, shortest=settings.shortest, longest=settings.longest, seed=recipe.seed,
                on_reflection=settings.on_reflection,
            )  # fmt: skip
            self.figures |= told
        answers = imitation_situations(
            experience, self.policy.renderer, rollout.protocol, thoughts, max_context=recipe.agent.max_context,
            empty_thoughts=settings.empty_thoughts,
        )  # fmt: skip
        self._learn("imitation", self.imitation, answers, settings.imitation_epochs)
        self._look("after", held_out)
        return self.figures

    def _collect(self, tasks: Sequence[Task]) -> Experience:
        settings = self.settings
        return collect_branches(
            self.rollout, tasks, alternatives=settings.alternatives, draws=settings.draws, proposer=settings.proposer,
            error_share=settings.error_share, seed=self.recipe.seed,
        )  # fmt: skip

    def _learner(self, world: WorldModel, steps: int) -> Learner:
        changes: dict[str, Any] = {"steps": max(1, steps), "epochs": 1, "minibatches": 1}
        if self.settings.learning_rate is not None:
            changes["learning_rate"] = self.settings.learning_rate
        options = self.recipe.training.model_copy(update=changes)
        # An algorithm without a policy to teach: neither its objectives nor a reference nor a critic are made.
        return Learner(self.policy.model, preset("grpo"), options, seed=self.recipe.seed, world=world)

    def _learn(self, name: str, world: WorldModel, situations: Sequence[Hindsight], epochs: int) -> None:
        """Learn situations in random order, each once an epoch."""
        each = -(-len(situations) // self.settings.batch)
        learner = self._learner(world, each * epochs)
        rng = np.random.default_rng(stream_key(self.recipe.seed, "order", name))
        losses: list[float] = []
        for _ in range(epochs if situations else 0):
            for part in np.array_split(rng.permutation(len(situations)), each):
                # In order, so that answers of one episode share what they begin with.
                batch = [situations[number] for number in np.sort(part)]
                losses.append(learner.step([], len(losses), situations={name: batch})[f"{name}/prediction_loss"])
        self.figures |= {f"{name}/examples": float(len(situations)), f"{name}/steps": float(learner.updates)}
        if losses:
            self.figures |= {f"{name}/loss_first": losses[0], f"{name}/loss_last": losses[-1]}

    def _look(self, when: str, held_out: Experience) -> None:
        """See how good the policy is, in states of an expert and in play."""
        actions = imitation_situations(held_out, self.policy.renderer, self.rollout.protocol, empty_thoughts=False)
        looks = (("action_nats", self.imitation, actions), ("world_nats", self.world, held_out.situations()))
        for name, world, situations in looks:
            if situations:
                with active_adapters(self.policy.model, world.adapters):
                    scored = self._learner(world, 1).score(collect_situations(situations).items(), temperature=1.0)
                count = len(scored) if world is self.imitation else sum(map(len, scored))
                self.figures[f"{when}/{name}"] = -sum(float(own.sum(dtype=np.float64)) for own in scored) / count
        options = self.recipe.evaluation
        if options.episodes:
            tasks = self.tasks.held_out(options.seed, "test", options.episodes)
            played = evaluate(self.rollout, tasks, temperature=options.temperature)
            check_failures(played.groups, self.recipe.training.abort_failed_share)
            self.figures |= {f"{when}/{name}": value for name, value in played.figures.items()}
