"""One update from one batch of episodes.

The learner knows no algorithm: it lays the sampled tokens of all episodes flat, asks the algorithm for advantages, asks
each objective for per-token losses, and reduces them with counts over the whole optimiser step. How the step is cut
into packs therefore changes nothing. Each objective is differentiated by the parameters that it names and by no others.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.aggregation import StepTotals
from rehearsal.algorithms.batch import Objective, PolicyOutput, TokenBatch
from rehearsal.algorithms.objectives import PolicyObjective
from rehearsal.algorithms.observation import ObservationLoss
from rehearsal.algorithms.presets import Algorithm
from rehearsal.algorithms.variance import group_variance
from rehearsal.errors import TrainingDiverged
from rehearsal.models.adapters import WORLD, active_adapters, adapter_names
from rehearsal.models.packed import causal_lm
from rehearsal.models.packing import Pack, PackItem, make_packs
from rehearsal.models.parallel import accumulate_gradients, map_packs, pack_workers
from rehearsal.training.batching import AFTER_DIVERGENCE, policy_batch
from rehearsal.training.critic import Critic
from rehearsal.training.gradient_probe import draw_by_quantile, gradient_figures
from rehearsal.training.optimiser import (
    MasterAdamW,
    Update,
    clipped_updates,
    forget_gradients,
    make_optimiser,
    not_finite,
    scheduled_share,
)
from rehearsal.training.options import DiagnosticsOptions, TrainingOptions
from rehearsal.training.passes import Passes
from rehearsal.training.sequences import collect
from rehearsal.training.terms import WEIGHT, WEIGHT_SQUARED, PackFigures, term_of
from rehearsal.training.works import Work, check_at_work, hold_work, parameter_sets, world_works
from rehearsal.training.world import WorldModel, all_objectives, policy_objectives, policy_parameters
from rehearsal.trajectory import SAMPLED_KINDS, Group, rewards_matrix


class Learner:
    """Updates ``model`` in place.

    Args:
        model: a Hugging Face causal LM. What is trained of it may have a lower precision than float32: its optimiser
            keeps float32 copies, see :class:`rehearsal.training.optimiser.MasterAdamW`.
        algorithm: from ``rehearsal.algorithms.presets.preset``.
        options: batches and optimiser.
        temperature: the temperature that episodes are sampled at; log-probs are taken at the same one.
        truncated: whether episodes are sampled from a part of the vocabulary (top-p, top-k). Log-probs of sampling are
            then over that part, and figures do not compare the learner's with them.
        reference: the frozen policy for objectives that need one; a copy of ``model`` is made if None.
        start: whether ``model`` as it is now is kept for :meth:`drift`; where there is a reference, that one serves.
        world: how the environment's answers are learnt from; None if they are not.

    Raises:
        RecipeError: if one objective updates everything and another an adapter that is part of it.
        ModelError: if an objective names an adapter that the model does not have.
    """

    def __init__(
        self, model: Any, algorithm: Algorithm, options: TrainingOptions, *, temperature: float = 1.0,
        truncated: bool = False, reference: Any | None = None, seed: int = 0, world: WorldModel | None = None,
        start: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.algorithm = algorithm
        self.options = options
        self.temperature = temperature
        self.truncated = truncated
        self.device = next(causal_lm(model).parameters()).device
        self.world = world
        adapters = adapter_names(model)
        self.policy_objectives = policy_objectives(algorithm, adapters, world)
        self._trained = parameter_sets(model, all_objectives(algorithm, adapters, world))
        self.optimisers = {name: make_optimiser(trained, options) for name, trained in self._trained.items()}
        self.updates = 0
        self._seed = seed
        self._workers = pack_workers(model)
        self.reference = reference
        if reference is None and any(objective.needs_reference for objective in self.policy_objectives):
            self.reference = _frozen_copy(model)
        self._start: Any | None = None
        if start:
            self._start = _frozen_copy(model) if self.reference is None else self.reference
        self.critic: Critic | None = None
        self.critic_optimiser: MasterAdamW | None = None
        if any(objective.needs_values for objective in self.policy_objectives):
            self.critic = Critic(model).train()
            critic_options = options.model_copy(update={"learning_rate": options.critic_learning_rate})
            self.critic_optimiser = make_optimiser(self.critic.parameters(), critic_options)
        entropy = any(objective.needs_entropy for objective in self.policy_objectives)
        self.passes = Passes(model, self.critic, options, temperature, entropy)

    # One step

    def step(
        self, groups: Sequence[Group], step: int, keep: np.ndarray | None = None, scale: float = 1.0,
        probe: int = 0, families: Sequence[int] | None = None,
        situations: Mapping[str, Sequence[Hindsight]] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Learn from one batch.

        Args:
            groups: the episodes; of failed ones the answers alone are learnt.
            step: number of the step, from 0; the schedule and messages use it.
            keep: bool of shape (P,) or (P, G), the groups or episodes that the policy may learn from; all if None.
            scale: what the advantages are multiplied by, see :func:`rehearsal.algorithms.filters.loss_scale`.
            probe: groups of each quartile of reward variance whose gradients are taken apart before the update, see
                :mod:`rehearsal.training.gradient_probe`; 0 for none.
            families: for each group the environment that it was played in: advantages are whitened and brought to one
                scale in each of them before they meet. One for all if None.
            situations: what the world model learns beside the answers in these episodes, by the name that its figures
                get: true answers to what was rehearsed, now or in the past.

        Returns:
            figures of the step by name.

        Raises:
            TrainingDiverged: if a loss or a gradient is not finite.
        """
        started = time.perf_counter()
        metrics: dict[str, float] = {"policy/learning_rate": self._learning_rate(step), "policy/updates": 0.0}
        works, figures = self._works(groups, keep, step, families)
        metrics |= figures
        if works and probe and self.policy_objectives:
            rng = np.random.default_rng([self._seed, step, 1])
            metrics |= self._probe(groups, works[0], probe, rng)
            metrics["time/probe"] = time.perf_counter() - started
        if self.world is not None:
            told, figures = world_works(self.world, groups, situations or {}, self._seed, step)
            works += told
            metrics |= figures
            metrics["world/target_tokens"] = float(sum(_answer_tokens(work) for work in works))
        if not works:
            return metrics
        for work in works:
            work.batch.check()
            work.batch.advantages_N *= scale
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        norms: dict[str, list[float]] = defaultdict(list)
        n_tokens = saved = 0
        for parts, share in self._parts(works, groups, situations or {}, step):
            taken, used, shared = self._update(parts, step, share, sums, counts)
            if not norms and counts["policy/mismatch"]:
                # Later ones differ because the policy has moved; this one only if engine and learner disagree.
                metrics["policy/mismatch_first"] = sums["policy/mismatch"] / counts["policy/mismatch"]
            for name, norm in taken.items():
                norms[name].append(norm)
            n_tokens += used
            saved += shared
            metrics["policy/updates"] += _shown(self._trained_by_policy()) in taken
        metrics |= {name: sums[name] / counts[name] for name in sums if counts[name]}
        if (mean_square := metrics.pop(WEIGHT_SQUARED, 0.0)) > 0:
            # Kish's effective sample size over the number of tokens: 1 where what is learned from was sampled by the
            # very policy that learns.
            metrics["policy/effective_sample_share"] = metrics.pop(WEIGHT) ** 2 / mean_square
        if metrics["policy/updates"] > 1 and "policy/kl_sampling" in metrics:
            # In its first update of a step the policy is still the one that played.
            metrics["policy/moved"] = metrics["policy/kl_sampling"]
        for name in map(_shown, self.optimisers):
            metrics[f"{name}/grad_norm"] = float(np.mean(norms[name] or [0.0]))
            metrics[f"{name}/grad_clipped"] = float(
                np.mean([norm > self.options.max_grad_norm for norm in norms[name] or [0.0]])
            )
        metrics["speed/learner_tokens"] = float(n_tokens)
        metrics["speed/shared_tokens"] = float(saved)
        metrics["time/learning"] = time.perf_counter() - started - metrics.get("time/probe", 0.0)
        return metrics

    def _works(
        self, groups: Sequence[Group], keep: np.ndarray | None, step: int, families: Sequence[int] | None
    ) -> tuple[list[Work], dict[str, float]]:
        """What the policy learns, and the world model in the same passes; nothing if there are no targets. With figures
        about it."""
        objectives = list(self.policy_objectives)
        if not objectives:
            return [], {}
        together = self.world is not None and not self.world.apart
        if self.world is not None and together:
            objectives.append(self.world.objective)
        sequences = collect(
            groups, answers=together, foreseeable=self.world is None or self.world.foreseeable
        )  # fmt: skip
        if not any(len(targets) for targets in sequences.targets):
            return [], {}
        batch, figures = policy_batch(
            groups, sequences, self.algorithm, self.passes, keep=keep, families=families, reference=self.reference,
            recompute=self.options.old_logprobs == "recompute", answers=self.world is not None,
            truncated=self.truncated, step=step,
        )  # fmt: skip
        return [Work(sequences, batch, objectives, None, np.random.default_rng([self._seed, step]))], figures

    def _learning_rate(self, step: int) -> float:
        return self.options.learning_rate * scheduled_share(step, self.options)

    def _parts(
        self, works: Sequence[Work], groups: Sequence[Group], situations: Mapping[str, Sequence[Hindsight]], step: int
    ) -> Iterator[tuple[list[tuple[Work, np.ndarray]], float]]:
        """What each update of a step learns: a part of everything, and then what was rehearsed by itself. With the
        share of the learning rate that it has.

        In those further updates half of what is new goes with what is replayed, since what comes with every one of them
        is soon learnt by heart, down to its wording. They hold a part of what the agent said as it is by then: what the
        policy has unlearnt in this step is not brought back. Their learning rate falls to nothing, because what is
        played next is played with whatever the last of them left, and an optimiser that goes by the sign of small
        gradients never comes to rest by itself.
        """
        for _ in range(self.options.epochs):
            for parts in zip(*(self._minibatches(work) for work in works), strict=True):
                yield list(zip(works, parts, strict=True)), 1.0
        rehearsed = [work for work in works if any(objective.name in situations for objective in work.objectives)]
        if self.world is None or self.world.updates == 1 or not rehearsed:
            return
        held = hold_work(self.world, groups, self.passes) if self.world.hold else None
        rng = np.random.default_rng([self._seed, step, 6])
        share = FRESH_SHARE if any(work.draws > 1 for work in rehearsed) else 1.0
        for number in range(1, self.world.updates):
            parts = [(work, work.drawn(number) if work.draws > 1 else _some(work, share, rng)) for work in rehearsed]
            if held is not None:
                parts.append((held, _some(held, HELD_SHARE, rng)))
            yield parts, 1.0 - number / self.world.updates

    def _minibatches(self, work: Work) -> Iterator[np.ndarray]:
        count, numbers = self.options.minibatches, work.drawn(0)
        if count == 1:
            yield numbers
            return
        # Failed episodes are dealt out by themselves: which of the others meet in an update must not depend on whether
        # anybody learns answers. Sorted inside each part, so that members of a group stand together and share their
        # prefix. A part is empty where there are fewer sequences than parts.
        failed_S = np.asarray(work.sequences.failed, dtype=bool)[numbers]
        others, failed = np.flatnonzero(~failed_S), np.flatnonzero(failed_S)
        for number, part in enumerate(np.array_split(others[work.rng.permutation(len(others))], count)):
            yield np.sort(np.concatenate([part, failed[number::count]]))

    def _update(
        self, parts: Sequence[tuple[Work, np.ndarray]], step: int, share: float, sums: dict[str, float],
        counts: dict[str, float],
    ) -> tuple[dict[str, float], int, int]:  # fmt: skip
        """One update of what these works train, from a part of each work's sequences, at a share of the rate."""
        trained = {objective.parameters for work, _ in parts for objective in work.objectives}
        updates = self._updates(step, trained, share)
        self.model.train()
        n_tokens, saved = self._gradients(parts, step, updates, sums, counts)
        # Without a gradient an optimiser has no part in the update: it would have nothing to clip and no norm to tell,
        # and would still move, by momentum.
        updates = [update for update in updates if _has_gradients(update)]
        if not updates:
            return {}, n_tokens, saved
        try:
            norms = clipped_updates(updates, self.options.max_grad_norm, f"step {step + 1}")
        except TrainingDiverged:
            # To look at the gradients pack by pack would slow every step down, so they are computed again.
            self._gradients(parts, step, updates, defaultdict(float), defaultdict(float), look=True)
            forget_gradients(updates)
            raise
        self.updates += 1
        return {update.name: norm for update, norm in zip(updates, norms, strict=True)}, n_tokens, saved

    def _gradients(
        self, parts: Sequence[tuple[Work, np.ndarray]], step: int, updates: Sequence[Update], sums: dict[str, float],
        counts: dict[str, float], look: bool = False,
    ) -> tuple[int, int]:  # fmt: skip
        """Add the gradients of a part of each work; returns the tokens that were read, and those that sharing saved."""
        n_tokens = saved = 0
        for work, part in parts:
            if not len(part):
                continue
            with active_adapters(self.model, work.adapters):
                check_at_work(self.model, work.objectives)
                used, shared = self._accumulate(work, part, step, updates, sums, counts, look)
            n_tokens += used
            saved += shared
        return n_tokens, saved

    def _accumulate(
        self, work: Work, part: np.ndarray, step: int, updates: Sequence[Update], sums: dict[str, float],
        counts: dict[str, float], look: bool,
    ) -> tuple[int, int]:  # fmt: skip
        """The same for one work. Losses are looked at in each pack, gradients too if ``look``."""
        sequences, batch = work.sequences, work.batch
        mini = batch if len(part) == batch.n_sequences else batch.select_sequences(torch.from_numpy(part))
        totals: dict[str, StepTotals] = {}
        for objective in work.objectives:
            totals[objective.name] = StepTotals.count(objective.mask(mini), mini.sequence_N, mini.n_sequences)
        items = sequences.items()
        mini_items = [items[i] for i in part]
        wanted = self._wanted(work.objectives, mini)
        packs = make_packs(
            [mini_items[i] for i in wanted], self.options.pack_tokens, share_prefixes=self.options.share_prefixes,
            device=self.device, workers=self._workers,
        )  # fmt: skip
        # A term without a gradient is a sum of zeros, and with zeros for a gradient an optimiser would still move, by
        # momentum and weight decay. Whether it does must not depend on who shares the passes.
        teaching = {objective.name for objective in work.objectives if _teaches(objective, mini)}
        names = list(dict.fromkeys(objective.parameters for objective in work.objectives))
        trained = [list(self._trained[name]) for name in names]
        values = any(objective.needs_values for objective in work.objectives)
        if self.critic is not None and values:
            own = names.index(self._trained_by_policy())
            trained[own] += [parameter for parameter in self.critic.parameters() if parameter.requires_grad]

        def losses_of(pack: Pack) -> tuple[list[Tensor | None], PackFigures]:
            numbers = torch.as_tensor([int(wanted[i]) for i in pack.items])
            micro = mini.select_sequences(numbers).to(self.device)
            output = self.passes.forward(pack, micro, values)
            figures = PackFigures(numbers)
            losses: dict[str, Tensor] = {}
            for objective in work.objectives:
                term = term_of(objective, micro, output, totals[objective.name].select(numbers), figures)
                figures.finite &= bool(torch.isfinite(term.detach()))
                if objective.name in teaching:
                    losses[objective.parameters] = losses.get(objective.parameters, 0.0) + term
            return [losses.get(name) for name in names], figures

        models = [self.model, self.critic] if values else [self.model]
        results = accumulate_gradients(models, trained, losses_of, packs, self._workers, self._master)
        for number, figures in enumerate(results):
            packs[number].plan.forget()
            bad = not_finite(updates) if look else None
            if bad is not None or not figures.finite:
                results.close()
                forget_gradients(updates)
                numbers = part[figures.numbers.numpy()]
                where = sorted({(sequences.group[n], sequences.sample[n]) for n in numbers})
                what = f"loss of step {step + 1}" if bad is None else f"gradient of the {bad} at step {step + 1}"
                raise TrainingDiverged(
                    f"The {what} is not finite in pack {number + 1} of {len(packs)}, which holds the episodes (group, "
                    f"sample) {_shortened(where)}; the update was not taken. {AFTER_DIVERGENCE}"
                )
            for name, value in figures.sums.items():
                sums[name] += value
                counts[name] = 1.0 if name in figures.totals else counts[name] + figures.counts[name]
        return sum(pack.n_tokens for pack in packs), sum(pack.saved_tokens for pack in packs)

    def _master(self, weight: Tensor) -> Tensor:
        """Where the gradient of a weight is summed; every weight has one optimiser."""
        for optimiser in (*self.optimisers.values(), self.critic_optimiser):
            if optimiser is not None and (master := optimiser.master(weight)) is not weight:
                return master
        return weight

    def _trained_by_policy(self) -> str:
        """Whose parameters the policy's loss is differentiated by, or would be in a mode in which it does not learn."""
        if not self.policy_objectives:
            return policy_parameters(adapter_names(self.model))
        return self.policy_objectives[0].parameters

    def _probe(self, groups: Sequence[Group], work: Work, each: int, rng: np.random.Generator) -> dict[str, float]:
        """Gradients of single groups, as they are at the beginning of the step, for each objective of the policy."""
        sequences, batch = work.sequences, work.batch
        parameters = self._trained[self._trained_by_policy()]
        objectives = [objective for objective in self.policy_objectives if not objective.needs_values]
        items, group_S = sequences.items(), np.where(sequences.failed, -1, sequences.group)
        self.model.train()

        def gradients_of(group: int) -> dict[str, list[Tensor | None]]:
            mini_S = np.flatnonzero(group_S == group)
            mini = batch.select_sequences(torch.from_numpy(mini_S))
            # What a filter turned down is what one wants to compare with.
            mini.policy_mask_N = torch.isin(mini.kinds_N.long(), torch.tensor(SAMPLED_KINDS))
            totals = {o.name: StepTotals.count(o.mask(mini), mini.sequence_N, mini.n_sequences) for o in objectives}
            found: dict[str, list[Tensor | None]] = {o.name: [None] * len(parameters) for o in objectives}
            packs = make_packs(
                [items[s] for s in mini_S], self.options.pack_tokens, share_prefixes=self.options.share_prefixes,
                device=self.device,
            )  # fmt: skip
            for pack in packs:
                numbers = torch.as_tensor(pack.items)
                micro = mini.select_sequences(numbers).to(self.device)
                output = PolicyOutput(*self.passes.policy(pack, micro), None)
                for objective in objectives:
                    figures = PackFigures(numbers)
                    loss = term_of(objective, micro, output, totals[objective.name].select(numbers), figures)
                    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    found[objective.name] = [
                        held if new is None else new if held is None else held + new
                        for held, new in zip(found[objective.name], gradients, strict=True)
                    ]
            return found

        variance_P = group_variance(rewards_matrix(groups))
        drawn = draw_by_quantile(variance_P, sorted(set(group_S.tolist()) - {-1}), 4, each, rng)
        with torch.enable_grad():
            one_by_one = map_packs([self.model], gradients_of, [p for part in drawn for p in part], self._workers)
            return gradient_figures(drawn, variance_P, one_by_one)

    def _updates(self, step: int, trained: set[str], share: float) -> list[Update]:
        """The optimisers that take a step, the policy's first. The critic's comes with the policy's."""
        rate = self._learning_rate(step) * share
        updates = []
        for name, optimiser in self.optimisers.items():
            if name not in trained:
                continue
            ratio = self.world.learning_rate_ratio if self.world is not None and name == WORLD else 1.0
            updates.append(Update(_shown(name), optimiser, rate * ratio))
        if self.critic_optimiser is not None and self._trained_by_policy() in trained:
            rate = self.options.critic_learning_rate * scheduled_share(step, self.options)
            updates.append(Update("critic", self.critic_optimiser, rate))
        return updates

    def _wanted(self, objectives: Sequence[Objective], mini: TokenBatch) -> np.ndarray:
        """Sequences that can have a gradient at all.

        An episode whose advantages are all zero adds nothing to a clipped or CISPO loss, and one that a filter has
        taken out adds nothing to any loss over the policy's mask. Both are counted in every denominator where their
        tokens are in the mask, but their forward and backward passes are left out.
        """
        alive_N = torch.zeros(len(mini), dtype=torch.bool)
        for objective in objectives:
            alive_N |= _alive(objective, mini)
        alive_S = torch.bincount(mini.sequence_N[alive_N], minlength=mini.n_sequences) > 0
        return np.flatnonzero(alive_S.numpy())

    # What the models say

    def logprobs(self, groups: Sequence[Group], model: Any | None = None) -> list[np.ndarray]:
        """Log-probs of the sampled tokens of every sequence, under the present policy or another model.

        Returns:
            float32 arrays, one for each segment of each episode that did not fail, in order.
        """
        return self.score(collect(groups).items(), model)

    def score(
        self, items: Sequence[PackItem], model: Any | None = None, temperature: float | None = None
    ) -> list[np.ndarray]:
        """Log-probs of the target tokens of any sequences, under the present policy or another model; at the
        temperature of sampling, or another one."""
        return self.passes.score(items, model, temperature)

    def drift(self, groups: Sequence[Group], most: int, rng: np.random.Generator) -> dict[str, float]:
        """How far the policy that played is from the one that this learner was made with.

        Args:
            groups: what it played, before it learns from it.
            most: tokens that may be read for it; one sequence is read however long it is.
            rng: draws the episodes.

        Returns:
            ``policy/kl_reference``, KL(policy || start) by the estimator k3, nats a token; nothing if no copy was kept
            or nothing was sampled.
        """
        if self._start is None:
            return {}
        sequences = collect(groups)
        items = sequences.items()
        if not items:
            return {}
        order = rng.permutation(len(items))
        # What was sampled from a part of the vocabulary is read by both policies, over all of it.
        reads = 2 if self.truncated else 1
        ends = reads * np.cumsum([len(items[i].token_ids) for i in order])
        chosen = sorted(order[: max(1, int(np.searchsorted(ends, most, side="right")))].tolist())
        start_N = np.concatenate(self.score([items[i] for i in chosen], self._start))
        own = [sequences.segments[i].logprobs[sequences.targets[i]] for i in chosen]
        if self.truncated or any(np.isnan(one).any() for one in own):
            own = self.score([items[i] for i in chosen])
        difference_N = start_N.astype(np.float64) - np.concatenate(own)
        if not len(difference_N):
            return {}
        return {"policy/kl_reference": float(np.mean(np.expm1(difference_N) - difference_N))}

    def prediction_losses(self, groups: Sequence[Group]) -> dict[str, float]:
        """How well the environment's answers are foretold, in nats a token, with the world adapter at work if there is
        a mode that trains it. One pass over the episodes, without gradients.

        Returns:
            ``prediction_loss``, and ``prediction_loss/NAME`` for each environment if there are several; nothing if
            there are no answers.
        """
        answers = collect(groups, sampled=False, answers=True)
        names = np.asarray([groups[p].trajectories[g].environment for p, g in answers.episodes()])
        with active_adapters(self.model, self.world.adapters if self.world is not None else None):
            each = self.score(answers.items(), temperature=1.0)

        def mean(losses: Sequence[np.ndarray]) -> float:
            return -float(np.concatenate(losses).mean(dtype=np.float64))

        told = {name: [e for e, own in zip(each, names, strict=True) if own == name] for name in np.unique(names)}
        told = {name: losses for name, losses in told.items() if sum(map(len, losses))}
        figures = {"prediction_loss": mean(each)} if told else {}
        if len(told) > 1:
            figures |= {f"prediction_loss/{name}": mean(losses) for name, losses in told.items()}
        return figures

    # State

    def is_finite(self) -> bool:
        """Whether all that it has learnt is finite: weights and moments."""
        optimisers = [*self.optimisers.values(), *([self.critic_optimiser] if self.critic_optimiser else [])]
        held = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
        held += [value for optimiser in optimisers for state in optimiser.state.values() for value in state.values()]
        return all(bool(torch.isfinite(one).all()) for one in held if isinstance(one, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights."""
        optimisers = {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        state: dict[str, Any] = {"optimisers": optimisers, "updates": self.updates}
        if self.critic is not None and self.critic_optimiser is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimiser"] = self.critic_optimiser.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.updates = state["updates"]
        if self.critic is not None and self.critic_optimiser is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimiser.load_state_dict(state["critic_optimiser"])


FRESH_SHARE = 0.5
"""Share of a step's own situations that each of the world model's further updates learns, where others are replayed."""
HELD_SHARE = 0.25
"""Share of a step's episodes that each of those updates holds: all of them would cost more than what is learnt."""
_START_BYTES = 256 << 20
"""What a diagnostic alone may cost: all of a model of 60 million parameters, or the adapters of nearly any."""


def keeps_start(options: DiagnosticsOptions, model: Any) -> bool:
    """Whether a run keeps a copy of what it trains as it was at the start, to tell how far it has come: where it looks
    at its signal and the copy is small."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return options.every > 0 and trained <= _START_BYTES


def _frozen_copy(model: Any) -> Any:
    # What is not trained is not copied: below adapters that is nearly everything.
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    frozen = copy.deepcopy(model, memo=dict(shared))
    frozen.requires_grad_(False)
    return frozen.eval()


def _some(work: Work, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of a work's sequences, at random and in order; one at least."""
    count = len(work.sequences)
    return np.sort(rng.permutation(count)[: max(1, round(share * count))])


def _alive(objective: Objective, batch: TokenBatch) -> Tensor:
    """bool of shape (N,): the tokens of an objective that can have a gradient, whatever the model says."""
    mask_N = objective.mask(batch)
    if isinstance(objective, PolicyObjective):
        mask_N = mask_N & (batch.advantages_N != 0)
    return mask_N


def _teaches(objective: Objective, batch: TokenBatch) -> bool:
    """Whether an objective can have a gradient at all. One with a weight of 0 has none, and is told of all the same."""
    return objective.coefficient != 0 and bool(_alive(objective, batch).any())


def _has_gradients(update: Update) -> bool:
    return any(weight.grad is not None for group in update.optimiser.param_groups for weight in group["params"])


def _answer_tokens(work: Work) -> int:
    """Tokens of the environment's answers that somebody learns."""
    world = [objective for objective in work.objectives if isinstance(objective, ObservationLoss)]
    return sum(int(objective.mask(work.batch).sum()) for objective in world)


def _shown(name: str) -> str:
    """A set of parameters as metrics and messages call it: without adapters all of them are the policy."""
    return "policy" if name == "all" else name


def _shortened(pairs: list[tuple[int, int]]) -> str:
    text = ", ".join(f"({group}, {sample})" for group, sample in pairs[:8])
    return text + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
