"""One update from one batch of episodes.

The learner knows no algorithm: it lays the sampled tokens of all episodes flat, asks the algorithm for advantages, asks
each objective for per-token losses, and reduces them with counts over the whole optimiser step. How the step is cut
into packs therefore changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal.algorithms.aggregation import StepTotals, token_weights
from rehearsal.algorithms.batch import Objective, PolicyOutput, TokenBatch
from rehearsal.algorithms.credit import SequenceRewards, one_scale, token_advantages
from rehearsal.algorithms.objectives import CISPOLoss, PolicyLoss
from rehearsal.algorithms.presets import Algorithm
from rehearsal.algorithms.variance import group_variance
from rehearsal.errors import TrainingDiverged
from rehearsal.models.head import token_logprobs
from rehearsal.models.packed import causal_lm, packed_hidden
from rehearsal.models.packing import Pack, PackItem, make_packs
from rehearsal.models.parallel import accumulate_gradients, map_packs, pack_workers
from rehearsal.models.scoring import each_target, target_logprobs
from rehearsal.training.critic import Critic
from rehearsal.training.gradient_probe import draw_by_quantile, gradient_figures
from rehearsal.training.optimiser import Update, clipped_updates, forget_gradients, make_optimiser, scheduled_share
from rehearsal.training.recipe import TrainingOptions
from rehearsal.training.sequences import Sequences, collect
from rehearsal.trajectory import SAMPLED_KINDS, Group, rewards_matrix

_WEIGHT, _WEIGHT_SQUARED = "policy/weight", "policy/weight_squared"
_AFTER_DIVERGENCE = "Lower training.learning_rate, or resume from the last checkpoint."


@dataclass
class _PackFigures:
    """What one pack has to tell: sums over tokens with their counts, and totals that are sums already."""

    numbers: Tensor
    finite: bool = True
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    totals: set[str] = field(default_factory=set)

    def add(self, name: str, values_N: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values_N.sum())
        self.counts[name] = self.counts.get(name, 0.0) + len(values_N)

    def add_total(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.totals.add(name)


class Learner:
    """Updates ``model`` in place.

    Args:
        model: a Hugging Face causal LM, float32 (or with adapters in float32).
        algorithm: from ``rehearsal.algorithms.presets.preset``.
        options: batches and optimiser.
        temperature: the temperature that episodes are sampled at; log-probs are taken at the same one.
        reference: the frozen policy for objectives that need one; a copy of ``model`` is made if None.
    """

    def __init__(
        self, model: Any, algorithm: Algorithm, options: TrainingOptions, *, temperature: float = 1.0,
        reference: Any | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model = model
        self.algorithm = algorithm
        self.options = options
        self.temperature = temperature
        self.device = next(causal_lm(model).parameters()).device
        self.optimiser = make_optimiser(model.parameters(), options)
        self.updates = 0
        self._seed = seed
        self._workers = pack_workers(model)
        self._needs_entropy = any(objective.needs_entropy for objective in algorithm.objectives)
        self.reference = reference
        if reference is None and any(objective.needs_reference for objective in algorithm.objectives):
            self.reference = _frozen_copy(model)
        self.critic: Critic | None = None
        self.critic_optimiser: torch.optim.AdamW | None = None
        if algorithm.needs_critic:
            self.critic = Critic(model).train()
            critic_options = options.model_copy(update={"learning_rate": options.critic_learning_rate})
            self.critic_optimiser = make_optimiser(self.critic.parameters(), critic_options)

    # One step

    def step(
        self, groups: Sequence[Group], step: int, keep: np.ndarray | None = None, scale: float = 1.0,
        probe: int = 0, families: Sequence[int] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Learn from one batch.

        Args:
            groups: the episodes; failed ones are left out.
            step: number of the step, from 0; the schedule and messages use it.
            keep: bool of shape (P,) or (P, G), the groups or episodes that the policy may learn from; all if None.
            scale: what the advantages are multiplied by, see :func:`rehearsal.algorithms.filters.loss_scale`.
            probe: groups of each quartile of reward variance whose gradients are taken apart before the update, see
                :mod:`rehearsal.training.gradient_probe`; 0 for none.
            families: for each group the environment that it was played in: advantages are brought to one scale in each
                of them before they meet. One for all if None.

        Returns:
            figures of the step by name.

        Raises:
            TrainingDiverged: if a loss or a gradient is not finite.
        """
        started = time.perf_counter()
        sequences = collect(groups)
        metrics: dict[str, float] = {"policy/learning_rate": self._learning_rate(step), "policy/updates": 0.0}
        if len(sequences) == 0 or sum(len(targets) for targets in sequences.targets) == 0:
            return metrics
        batch = self._batch(groups, sequences, keep, step, families)
        batch.check()
        if probe:
            metrics |= self._probe(groups, sequences, batch, probe, np.random.default_rng([self._seed, step, 1]))
            metrics["time/probe"] = time.perf_counter() - started
        batch.advantages_N *= scale
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        grad_norms: list[float] = []
        n_tokens = saved = 0
        rng = np.random.default_rng([self._seed, step])
        for _ in range(self.options.epochs):
            for part in self._minibatches(len(sequences), rng):
                norm, used, shared = self._update(sequences, batch, part, step, sums, counts)
                if not grad_norms and counts["policy/mismatch"]:
                    # Later ones differ because the policy has moved; this one only if engine and learner disagree.
                    metrics["policy/mismatch_first"] = sums["policy/mismatch"] / counts["policy/mismatch"]
                grad_norms.append(norm)
                n_tokens += used
                saved += shared
                metrics["policy/updates"] += used > 0
        metrics |= {name: sums[name] / counts[name] for name in sums if counts[name]}
        if (mean_square := metrics.pop(_WEIGHT_SQUARED, 0.0)) > 0:
            # Kish's effective sample size over the number of tokens: 1 where what is learned from was sampled by the
            # very policy that learns.
            metrics["policy/effective_sample_share"] = metrics.pop(_WEIGHT) ** 2 / mean_square
        metrics["policy/grad_norm"] = float(np.mean(grad_norms)) if grad_norms else 0.0
        metrics["policy/grad_clipped"] = float(np.mean([n > self.options.max_grad_norm for n in grad_norms or [0.0]]))
        metrics["speed/learner_tokens"] = float(n_tokens)
        metrics["speed/shared_tokens"] = float(saved)
        metrics["time/learning"] = time.perf_counter() - started - metrics.get("time/probe", 0.0)
        return metrics

    def _learning_rate(self, step: int) -> float:
        return self.options.learning_rate * scheduled_share(step, self.options)

    def _minibatches(self, n_sequences: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        if self.options.minibatches == 1:
            yield np.arange(n_sequences)
            return
        # Sorted again inside each part, so that members of a group stand together and share their prefix.
        for part in np.array_split(rng.permutation(n_sequences), self.options.minibatches):
            if len(part):
                yield np.sort(part)

    def _update(
        self, sequences: Sequences, batch: TokenBatch, part: np.ndarray, step: int, sums: dict[str, float],
        counts: dict[str, float],
    ) -> tuple[float, int, int]:  # fmt: skip
        mini = batch if len(part) == batch.n_sequences else batch.select_sequences(torch.from_numpy(part))
        totals: dict[str, StepTotals] = {}
        for objective in self.algorithm.objectives:
            totals[objective.name] = StepTotals.count(objective.mask(mini), mini.sequence_N, mini.n_sequences)
        items = sequences.items()
        mini_items = [items[i] for i in part]
        wanted = self._wanted(mini)
        packs = make_packs(
            [mini_items[i] for i in wanted], self.options.pack_tokens, share_prefixes=self.options.share_prefixes,
            device=self.device,
        )  # fmt: skip
        if not packs:
            return 0.0, 0, 0  # nothing has a gradient; an optimiser would still move, by momentum
        updates = self._updates(step)
        self.model.train()

        def loss_of(pack: Pack) -> tuple[Tensor | None, _PackFigures]:
            numbers = torch.as_tensor([int(wanted[i]) for i in pack.items])
            micro = mini.select_sequences(numbers).to(self.device)
            output = self._forward(pack)
            figures = _PackFigures(numbers)
            loss: Tensor | None = None
            for objective in self.algorithm.objectives:
                term = self._term(objective, micro, output, totals[objective.name].select(numbers), figures)
                loss = term if loss is None else loss + term
            figures.finite = loss is None or bool(torch.isfinite(loss.detach()))
            return loss, figures

        models = [self.model] if self.critic is None else [self.model, self.critic]
        parameters = [p for update in updates for group in update.optimiser.param_groups for p in group["params"]]
        results = accumulate_gradients(models, parameters, loss_of, packs, self._workers)
        for number, figures in enumerate(results):
            if not figures.finite:
                results.close()
                forget_gradients(updates)
                numbers = part[figures.numbers.numpy()]
                where = sorted({(sequences.group[n], sequences.sample[n]) for n in numbers})
                raise TrainingDiverged(
                    f"The loss of step {step + 1} is not finite in pack {number + 1} of {len(packs)}, which holds the "
                    f"episodes (group, sample) {_shortened(where)}; the update was not taken. {_AFTER_DIVERGENCE}"
                )
            for name, value in figures.sums.items():
                sums[name] += value
                counts[name] = 1.0 if name in figures.totals else counts[name] + figures.counts[name]
        norm = clipped_updates(updates, self.options.max_grad_norm, f"step {step + 1}")[0]
        self.updates += 1
        return norm, sum(pack.n_tokens for pack in packs), sum(pack.saved_tokens for pack in packs)

    def _probe(
        self, groups: Sequence[Group], sequences: Sequences, batch: TokenBatch, each: int, rng: np.random.Generator
    ) -> dict[str, float]:
        """Gradients of single groups, as they are at the beginning of the step, for each objective of the policy."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        objectives = [objective for objective in self.algorithm.objectives if not objective.needs_values]
        items, group_S = sequences.items(), np.asarray(sequences.group)
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
                output = PolicyOutput(*self._policy(self.model, pack, self._needs_entropy), None)
                for objective in objectives:
                    figures = _PackFigures(numbers)
                    loss = self._term(objective, micro, output, totals[objective.name].select(numbers), figures)
                    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    found[objective.name] = [
                        held if new is None else new if held is None else held + new
                        for held, new in zip(found[objective.name], gradients, strict=True)
                    ]
            return found

        variance_P = group_variance(rewards_matrix(groups))
        drawn = draw_by_quantile(variance_P, sorted(set(sequences.group)), 4, each, rng)
        with torch.enable_grad():
            one_by_one = map_packs([self.model], gradients_of, [p for part in drawn for p in part], self._workers)
            return gradient_figures(drawn, variance_P, one_by_one)

    def _updates(self, step: int) -> list[Update]:
        """The optimisers that take a step, the policy's first."""
        updates = [Update("policy", self.optimiser, self._learning_rate(step))]
        if self.critic_optimiser is not None:
            rate = self.options.critic_learning_rate * scheduled_share(step, self.options)
            updates.append(Update("critic", self.critic_optimiser, rate))
        return updates

    def _wanted(self, mini: TokenBatch) -> np.ndarray:
        """Sequences that can have a gradient at all.

        An episode whose advantages are all zero adds nothing to a clipped or CISPO loss, and one that a filter has
        taken out adds nothing to any loss over the policy's mask. Both are counted in every denominator where their
        tokens are in the mask, but their forward and backward passes are left out.
        """
        alive_N = torch.zeros(len(mini), dtype=torch.bool)
        for objective in self.algorithm.objectives:
            mask_N = objective.mask(mini)
            if isinstance(objective, PolicyLoss | CISPOLoss):
                mask_N = mask_N & (mini.advantages_N != 0)
            alive_N |= mask_N
        alive_S = torch.bincount(mini.sequence_N[alive_N], minlength=mini.n_sequences) > 0
        return np.flatnonzero(alive_S.numpy())

    def _term(
        self, objective: Objective, micro: TokenBatch, output: PolicyOutput, totals: StepTotals, figures: _PackFigures
    ) -> Tensor:
        result = objective(micro, output)
        weights_N = token_weights(objective.aggregation, result.mask_N, micro.sequence_N, totals)
        loss = objective.coefficient * (result.loss_N * weights_N).sum()
        figures.add_total(f"policy/loss/{objective.name}", float(loss.detach()))
        for name, values_N in result.metrics_N.items():
            figures.add(f"policy/{name}", values_N[result.mask_N])
        if isinstance(objective, PolicyLoss | CISPOLoss):
            self._sampling_figures(micro, output, figures)
        return loss

    def _sampling_figures(self, micro: TokenBatch, output: PolicyOutput, figures: _PackFigures) -> None:
        """How far the learner's policy is from the one that sampled: k3 estimate of the KL, and the entropy."""
        mask_N = micro.policy_mask_N
        difference = (output.logprobs_N.detach() - micro.rollout_logprobs_N)[mask_N]
        figures.add("policy/kl_sampling", torch.expm1(difference) - difference)
        figures.add("policy/mismatch", difference.abs())
        # A log-ratio beyond this is a sign of its own; its square must not drown everything else.
        weights = difference.clamp(-20.0, 20.0).exp()
        figures.add(_WEIGHT, weights)
        figures.add(_WEIGHT_SQUARED, weights**2)
        # Without an entropy objective the entropy is estimated from what was sampled: E[-log p].
        entropy_N = -micro.rollout_logprobs_N if output.entropy_N is None else output.entropy_N.detach()
        figures.add("policy/entropy", entropy_N[mask_N])

    # What the models say

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self.options.autocast:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def _forward(self, pack: Pack) -> PolicyOutput:
        logprobs_N, entropy_N = self._policy(self.model, pack, self._needs_entropy)
        return PolicyOutput(logprobs_N, entropy_N, self._values(pack) if self.critic is not None else None)

    def _policy(self, model: Any, pack: Pack, entropy: bool) -> tuple[Tensor, Tensor | None]:
        with self._precision():
            hidden_ND = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
            return token_logprobs(
                causal_lm(model), hidden_ND, pack.targets_N, temperature=self.temperature, entropy=entropy
            )

    def _values(self, pack: Pack) -> Tensor:
        assert self.critic is not None
        with self._precision():
            hidden_ND = packed_hidden(self.critic, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
        return self.critic.values(hidden_ND)

    def logprobs(self, groups: Sequence[Group], model: Any | None = None) -> list[np.ndarray]:
        """Log-probs of the sampled tokens of every sequence, under the present policy or another model.

        Returns:
            float32 arrays, one for each segment of each episode that did not fail, in order.
        """
        return self.score(collect(groups).items(), model)

    def score(self, items: Sequence[PackItem], model: Any | None = None) -> list[np.ndarray]:
        """Log-probs of the target tokens of any sequences, under the present policy or another model."""
        options = self.options
        return target_logprobs(
            self.model if model is None else model, items, temperature=self.temperature,
            pack_tokens=options.pack_tokens, share_prefixes=options.share_prefixes, precision=self._precision,
        )  # fmt: skip

    def _values_of(self, items: Sequence[PackItem]) -> list[np.ndarray]:
        options = self.options
        return each_target(
            [self.critic], items, lambda pack: self._values(pack).float().cpu().numpy(), options.pack_tokens,
            options.share_prefixes, self.device, self._workers,
        )  # fmt: skip

    def _batch(
        self, groups: Sequence[Group], sequences: Sequences, keep: np.ndarray | None, step: int,
        families: Sequence[int] | None = None,
    ) -> TokenBatch:  # fmt: skip
        segments, targets = sequences.segments, sequences.targets
        lengths = [len(wanted) for wanted in targets]
        sequence_N = np.repeat(np.arange(len(sequences)), lengths)

        def flat(name: str) -> np.ndarray:
            return np.concatenate([getattr(s, name)[wanted] for s, wanted in zip(segments, targets, strict=True)])

        kinds_N, turns_N, rollout_N = flat("kinds"), flat("turns"), flat("logprobs")
        keep_S = np.ones(len(sequences), dtype=bool)
        if keep is not None:
            keep = np.asarray(keep, dtype=bool)
            keep_S &= keep[sequences.group] if keep.ndim == 1 else keep[sequences.group, sequences.sample]
        if self.algorithm.mask_truncated:
            keep_S &= ~np.asarray(sequences.cut_off, dtype=bool)
        values_N = np.concatenate(self._values_of(sequences.items())) if self.critic is not None else None
        _check_finite("values of the critic", values_N, step)
        sampled_N = np.ones(len(sequence_N), dtype=bool)
        advantages_N, returns_N = token_advantages(
            self.algorithm,
            SequenceRewards(
                rewards_PG=rewards_matrix(groups),
                sequence_group_S=np.asarray(sequences.group),
                sequence_sample_S=np.asarray(sequences.sample),
                sampled_N=sampled_N,
                turns_N=turns_N.astype(np.int64),
                sequence_N=sequence_N,
                turn_rewards=sequences.turn_rewards,
                values_N=values_N,
                policy_S=keep_S,
            ),
        )
        if families is not None:
            family_N = np.asarray(families)[sequences.group][sequence_N]
            advantages_N = one_scale(advantages_N, family_N, keep_S[sequence_N])
        old_N = rollout_N
        if self.options.old_logprobs == "recompute":
            old_N = np.concatenate(self.score(sequences.items()))
            _check_finite("log-probs of the policy", old_N, step)
        reference_N = None
        if self.reference is not None:
            reference_N = np.concatenate(self.score(sequences.items(), self.reference))
            _check_finite("log-probs of the reference", reference_N, step)

        def tensor(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

        return TokenBatch(
            token_ids_N=torch.from_numpy(flat("token_ids").astype(np.int64)),
            kinds_N=torch.from_numpy(kinds_N),
            turns_N=torch.from_numpy(turns_N.astype(np.int64)),
            sequence_N=torch.from_numpy(sequence_N),
            n_sequences=len(sequences),
            advantages_N=torch.from_numpy(advantages_N),
            policy_mask_N=torch.from_numpy(keep_S[sequence_N] & sampled_N),
            rollout_logprobs_N=torch.from_numpy(rollout_N),
            old_logprobs_N=torch.from_numpy(old_N),
            reference_logprobs_N=tensor(reference_N),
            old_values_N=tensor(values_N),
            returns_N=tensor(returns_N),
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights."""
        state: dict[str, Any] = {"optimiser": self.optimiser.state_dict(), "updates": self.updates}
        if self.critic is not None and self.critic_optimiser is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimiser"] = self.critic_optimiser.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.updates = state["updates"]
        if self.critic is not None and self.critic_optimiser is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimiser.load_state_dict(state["critic_optimiser"])


def _check_finite(what: str, array_N: np.ndarray | None, step: int) -> None:
    if array_N is not None and not np.isfinite(array_N).all():
        raise TrainingDiverged(
            f"The {what} at step {step + 1} are not finite; no update was taken. {_AFTER_DIVERGENCE}"
        )


def _frozen_copy(model: Any) -> Any:
    frozen = copy.deepcopy(model)
    frozen.requires_grad_(False)
    return frozen.eval()


def _shortened(pairs: list[tuple[int, int]]) -> str:
    text = ", ".join(f"({group}, {sample})" for group, sample in pairs[:8])
    return text + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
