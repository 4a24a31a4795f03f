"""The learner: one gradient however a step is cut, and none for what must not teach."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rehearsal.models.scoring as scoring_module
import rehearsal.training.learner as learner_module
from rehearsal.algorithms.aggregation import AGGREGATIONS
from rehearsal.algorithms.presets import PRESETS, preset
from rehearsal.errors import TrainingDiverged
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.models.load import _compute_activations_again
from rehearsal.rollout import run_coroutine
from rehearsal.training.learner import Learner
from rehearsal.training.optimiser import forget_gradients
from rehearsal.training.options import TrainingOptions
from rehearsal.trajectory import Group, Kind, SampleStop, Segment, StopReason, Trajectory, Turn

Gradients = dict[str, Tensor]
MakeGroups = Callable[..., list[Group]]


@pytest.fixture
def model(tiny_qwen3: Callable[..., Any]) -> Any:
    return tiny_qwen3(initializer_range=0.2)


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**{"learning_rate": 1e-2, "steps": 10, "groups": 4, "group_size": 3, **changes})


def learner_of(model: Any, algorithm: str = "grpo", temperature: float = 1.0, **changes: Any) -> Learner:
    """A learner with some training options changed; ``algo_x`` is the option x of the algorithm."""
    of_algorithm = {name.removeprefix("algo_"): v for name, v in changes.items() if name.startswith("algo_")}
    of_training = {name: v for name, v in changes.items() if not name.startswith("algo_")}
    return Learner(model, preset(algorithm, **of_algorithm), options(**of_training), temperature=temperature)


def gradients(learner: Learner, groups: list[Group], keep: np.ndarray | None = None, scale: float = 1.0) -> Gradients:
    """The gradient that a step would apply to the policy, without applying it."""
    found: Gradients = {}

    def record(updates: Any, *_: Any) -> list[float]:
        for name, parameter in learner.model.named_parameters():
            grad = parameter.grad
            found[name] = torch.zeros_like(parameter) if grad is None else grad.clone()
        forget_gradients(updates)
        return [0.0 for _ in updates]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "clipped_updates", record)
        learner.step(groups, 0, keep, scale)
    # Where nothing has a gradient the optimiser is not asked at all.
    return found or {name: torch.zeros_like(parameter) for name, parameter in learner.model.named_parameters()}


def weights(model: Any) -> Gradients:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(actual: Gradients, expected: Gradients, tolerance: float = 2e-5) -> None:
    assert set(actual) == set(expected)
    # The tolerance is relative to the largest entry of all: some parameters have a gradient near zero.
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 0
    for name, tensor in expected.items():
        assert float((actual[name] - tensor).abs().max()) <= tolerance * scale, name


def differ(first: Gradients, second: Gradients) -> bool:
    scale = max(float(tensor.abs().max()) for tensor in second.values()) + 1e-12
    return any(float((first[name] - second[name]).abs().max()) > 1e-3 * scale for name in second)


# However a step is cut


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_one_pack_or_a_pack_for_each_episode(algorithm: str, model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model, algorithm, pack_tokens=4096), groups)
    for n in (16, 70):
        assert_same(gradients(learner_of(model, algorithm, pack_tokens=n), groups), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe"])
def test_the_gradient_is_that_of_a_padded_batch(
    family: str, aggregation: str, build_family: Callable[[str], Any], make_groups: MakeGroups
) -> None:
    """Against the textbook: a padded batch with an attention mask, the clipped loss written out, one mean."""
    model = build_family(family)
    groups = make_groups(model, temperature=0.8, spread=0.3)
    actual = gradients(
        learner_of(model, "grpo", 0.8, pack_tokens=90, algo_aggregation=aggregation, algo_constant=40), groups
    )
    rows = [(trajectory.segments[0], group) for group in groups for trajectory in group]
    width = max(len(segment) for segment, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    attention_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT, old_BT = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width)
    advantages_B = torch.zeros(len(rows))
    for i, (segment, group) in enumerate(rows):
        n = len(segment)
        ids_BT[i, :n] = torch.from_numpy(segment.token_ids.astype(np.int64))
        attention_BT[i, :n] = 1
        mask_BT[i, :n] = torch.from_numpy(segment.sampled_mask)
        old_BT[i, :n] = torch.from_numpy(np.nan_to_num(segment.logprobs))
        rewards = group.rewards
        advantages_B[i] = (group.rewards[i % 3] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    logits = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits / 0.8
    logprobs_BT = torch.zeros(len(rows), width)
    logprobs_BT[:, 1:] = logits[:, :-1].log_softmax(-1).gather(2, ids_BT[:, 1:, None])[..., 0]
    ratio_BT = (logprobs_BT - old_BT).exp()
    advantages_BT = advantages_B[:, None].expand_as(ratio_BT)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(0.8, 1.2) * advantages_BT) * mask_BT
    if aggregation == "token_mean":
        loss = loss_BT.sum() / mask_BT.sum()
    elif aggregation == "sequence_mean":
        loss = (loss_BT.sum(1) / mask_BT.sum(1)).mean()
    else:
        loss = loss_BT.sum() / (40 * len(rows))
    loss.backward()
    assert bool(((ratio_BT[mask_BT] > 1.2) | (ratio_BT[mask_BT] < 0.8)).any()), "the clip should be at work"
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_same(actual, expected, 3e-5)


def test_weights_after_a_step_do_not_depend_on_the_packs(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    after = []
    for n in (4096, 16):
        copied = copy.deepcopy(model)
        learner = learner_of(copied, pack_tokens=n)
        for step in range(3):
            learner.step(groups, step)
        after.append(weights(copied))
    assert differ(after[0], weights(model))
    # Adam divides by the gradient's own size, so entries near zero feel every rounding.
    assert_same(after[1], after[0], 2e-3)


@pytest.mark.parametrize(("algorithm", "checkpointing"), [("grpo", True), ("ppo", False)])
def test_threads_change_nothing(
    algorithm: str, checkpointing: bool, model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs side by side: the same weights and figures to the last bit, whichever thread was faster."""
    groups = make_groups(model)
    if checkpointing:
        _compute_activations_again(model)
    results = []
    for workers in (1, 2, 5):
        monkeypatch.setattr(learner_module, "pack_workers", lambda _, n=workers: n)
        copied = copy.deepcopy(model)
        learner = learner_of(copied, algorithm, pack_tokens=16, algo_entropy_coefficient=0.01)
        figures = [learner.step(groups, step) for step in range(2)]
        told = [{name: v for name, v in row.items() if not name.startswith("time/")} for row in figures]
        results.append((told, weights(copied), learner.logprobs(groups)))
    for told, after, logprobs in results[1:]:
        assert told == results[0][0]
        assert all(torch.equal(after[name], tensor) for name, tensor in results[0][1].items())
        assert all(np.array_equal(one, other) for one, other in zip(logprobs, results[0][2], strict=True))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "ppo"])
def test_prefixes_shared_or_not(algorithm: str, model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model, algorithm, share_prefixes=False), groups)
    learner = learner_of(model, algorithm, share_prefixes=True)
    assert_same(gradients(learner, groups), expected)
    assert learner.step(groups, 0)["speed/shared_tokens"] >= 2 * sum(18 + 3 * p for p in range(4))


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_pp", "ppo"])
def test_the_order_of_groups_and_of_their_members_does_not_matter(
    algorithm: str, model: Any, make_groups: MakeGroups
) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model, algorithm), groups)
    turned = [Group(group.trajectories[::-1]) for group in groups[::-1]]
    assert_same(gradients(learner_of(model, algorithm), turned), expected)


def test_episodes_in_several_segments_keep_their_credit(model: Any, make_groups: MakeGroups) -> None:
    """An episode whose context was rewritten is several sequences, all with the advantage of the episode."""
    groups = make_groups(model, 2, 2)
    whole = groups[1].trajectories[0]
    assert len(whole.turns) == 2
    (segment,) = whole.segments
    cut = int(np.argmax(segment.turns == 1))

    def part(where: slice) -> Segment:
        return Segment(segment.token_ids[where], segment.logprobs[where], segment.kinds[where], segment.turns[where])

    whole.segments = [part(slice(0, cut)), part(slice(cut, None))]
    expected = gradients(learner_of(model, "dr_grpo", algo_aggregation="token_mean", pack_tokens=16), groups)
    rows = [(s, t.reward, [m.reward for m in group]) for group in groups for t in group for s in t.segments]
    total = sum(int(s.sampled_mask.sum()) for s, _, _ in rows)
    loss = torch.zeros(())
    for s, reward, rewards in rows:
        ids = torch.from_numpy(s.token_ids.astype(np.int64))
        log = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        log = log.gather(1, ids[1:, None])[:, 0]
        mask = torch.from_numpy(s.sampled_mask[1:])
        ratio = (log - torch.from_numpy(np.nan_to_num(s.logprobs[1:]))).exp()
        advantage = reward - float(np.mean(rewards))
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss - (surrogate * mask).sum() / total
    loss.backward()
    assert_same(expected, {name: p.grad for name, p in model.named_parameters()}, 3e-5)


# What must not teach


def test_failed_episodes_are_left_out_and_change_nothing_else(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model), groups)
    failed = copy.deepcopy(groups[0].trajectories[0])
    failed.stop_reason, failed.error = StopReason.ERROR, "It broke."
    hung = Trajectory("made-up", seed=9, stop_reason=StopReason.TIMEOUT)
    with_failures = [Group([failed, *groups[0].trajectories, hung]), *groups[1:], Group([copy.deepcopy(failed)])]
    assert_same(gradients(learner_of(model), with_failures), expected)
    assert differ(gradients(learner_of(model), groups[1:]), expected)


@pytest.mark.parametrize("algorithm", ["grpo", "cispo", "dr_grpo", "sapo", "vespo"])
def test_sequences_without_an_advantage_are_not_computed_and_still_count(
    algorithm: str, model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(model)
    for trajectory in groups[1]:
        for turn in trajectory.turns:
            turn.rewards = [0.5 / len(trajectory.turns)]
    seen: list[int] = []
    make_packs = learner_module.make_packs

    def counting(items: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(items))
        return make_packs(items, *args, **kwargs)

    monkeypatch.setattr(learner_module, "make_packs", counting)
    skipped = gradients(learner_of(model, algorithm), groups)
    assert seen == [9]
    monkeypatch.setattr(Learner, "_wanted", lambda self, objectives, mini: np.arange(mini.n_sequences))
    assert_same(skipped, gradients(learner_of(model, algorithm), groups))
    assert seen == [9, 12]


def test_the_masks_of_a_step_are_not_kept(model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are larger than all else of a pack, and a step has many packs."""
    made: list[Any] = []
    for module in (learner_module, scoring_module):

        def keeping(*args: Any, make: Any = module.make_packs, **kwargs: Any) -> Any:
            packs = make(*args, **kwargs)
            made.append(packs)
            return packs

        monkeypatch.setattr(module, "make_packs", keeping)
    groups = make_groups(model)
    learner = learner_of(model, "ppo", pack_tokens=32)
    learner.step(groups, 0)
    learner.logprobs(groups)
    packs = [pack for some in made for pack in some]
    assert len(packs) > 4
    assert not any(bucket.biases for pack in packs for bucket in pack.plan._buckets)


def test_nothing_is_skipped_where_an_objective_looks_at_more_than_advantages(
    model: Any, make_groups: MakeGroups
) -> None:
    groups = make_groups(model, 1, 3)
    for trajectory in groups[0]:
        for turn in trajectory.turns:
            turn.rewards = [0.5 / len(trajectory.turns)]
    assert all(float(g.abs().max()) == 0 for g in gradients(learner_of(model), groups).values())
    with_bonus = gradients(learner_of(model, algo_entropy_coefficient=0.1), groups)
    assert any(float(g.abs().max()) > 0 for g in with_bonus.values())


def test_a_step_with_nothing_to_learn_leaves_the_weights(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model, 2, 2)
    for trajectory in (*groups[0], *groups[1]):
        for turn in trajectory.turns:
            turn.rewards = [1.0 / len(trajectory.turns)]
    learner = learner_of(model)
    learner.step(make_groups(model), 0)  # gives the optimiser momentum to move by
    before = weights(model)
    figures = learner.step(groups, 1)
    assert figures["policy/grad_norm"] == 0.0
    assert figures["policy/updates"] == 0.0
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
    assert all(math.isfinite(value) for value in figures.values())


def test_episodes_that_a_filter_turns_down_stay_in_the_baseline(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    keep_PG = np.ones((len(groups), len(groups[0])), dtype=bool)
    whole = gradients(learner_of(model, "dr_grpo", algo_constant=100.0), groups, keep_PG)
    assert_same(gradients(learner_of(model, "dr_grpo", algo_constant=100.0), groups), whole)
    keep_PG[:, 0] = False
    rest = gradients(learner_of(model, "dr_grpo", algo_constant=100.0), groups, keep_PG)
    only = gradients(learner_of(model, "dr_grpo", algo_constant=100.0), groups, ~keep_PG)
    # Advantages look at the whole group, so the two parts add up; each is a mean over its own episodes.
    assert_same({name: rest[name] * 2 / 3 + only[name] / 3 for name in rest}, whole)


def test_a_scaled_loss_has_a_scaled_gradient(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    whole = gradients(learner_of(model), groups)
    found = gradients(learner_of(model), groups, scale=0.5)
    assert_same(found, {name: gradient / 2 for name, gradient in whole.items()})


def test_groups_that_a_filter_turns_down(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    keep = np.array([True, False, True, False])
    expected = gradients(learner_of(model), [groups[0], groups[2]])
    assert_same(gradients(learner_of(model), groups, keep), expected)


def test_a_filter_leaves_the_critic_alone(model: Any, make_groups: MakeGroups) -> None:
    """Filters act on an objective, not on a rollout: the critic learns from every episode."""
    groups = make_groups(model)
    results = []
    for keep in (None, np.array([True, False, False, False])):
        learner = learner_of(copy.deepcopy(model), "ppo")
        learner.step(groups, 0, keep)
        assert learner.critic is not None
        results.append((weights(learner.critic), weights(learner.model)))
    assert_same(results[1][0], results[0][0])
    assert differ(results[1][1], results[0][1])


def test_episodes_that_were_cut_off_can_be_masked(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    groups[0].trajectories[1].stop_reason = StopReason.CONTEXT_LIMIT
    groups[2].trajectories[0].turns[-1].stop = SampleStop.LENGTH
    masked = gradients(learner_of(model, algo_mask_truncated=True), groups)
    assert differ(masked, gradients(learner_of(model), groups))
    # Their rewards stay in the baselines: taking the episodes out altogether is something else.
    without = [Group([t for t in group if t.stop_reason != StopReason.CONTEXT_LIMIT]) for group in groups]
    assert differ(masked, gradients(learner_of(model, algo_mask_truncated=True), without))


def test_sequences_without_sampled_tokens(model: Any, make_groups: MakeGroups) -> None:
    """An episode that ended before its first answer has a prompt and nothing to learn from."""
    groups = make_groups(model)
    empty = copy.deepcopy(groups[0].trajectories[0])
    (segment,) = empty.segments
    n = 18
    empty.segments = [Segment(segment.token_ids[:n], segment.logprobs[:n], segment.kinds[:n], segment.turns[:n])]
    empty.turns, empty.stop_reason = [], StopReason.CONTEXT_LIMIT
    nothing = Trajectory("made-up", seed=0, stop_reason=StopReason.CONTEXT_LIMIT)
    for algorithm in ("grpo", "ppo"):
        expected = gradients(learner_of(model, algorithm), groups)
        groups_with = [Group([*groups[0], empty, nothing]), *groups[1:]]
        assert_same(gradients(learner_of(model, algorithm), groups_with), expected)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_steps_without_any_token(algorithm: str, model: Any) -> None:
    before = weights(model)
    learner = learner_of(model, algorithm)
    for groups in ([], [Group([])], [Group([Trajectory("made-up", 0, stop_reason=StopReason.ERROR)])]):
        figures = learner.step(groups, 0)
        assert figures["policy/updates"] == 0.0
        assert learner.logprobs(groups) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


# Ratios


def sampled_groups(model: Any, temperature: float, groups: int = 3, size: int = 4) -> list[Group]:
    """Single answers of up to 9 tokens, sampled by the local engine."""
    engine = LocalEngine(model, max_context=64, max_sessions=5, memory_bytes=1 << 24)
    params = SamplingParams(temperature=temperature, max_tokens=9, stop_token_ids=(3,))
    rng = np.random.default_rng(0)

    async def play() -> list[Group]:
        made = []
        for p in range(groups):
            prompt = rng.integers(4, 97, 17 + p).astype(np.int32)
            members = []
            for g in range(size):
                session = engine.session(stream_key(p, g))
                session.extend(prompt)
                sample = await session.sample(params)
                session.close()
                ids = np.concatenate([prompt, sample.token_ids])
                logprobs = np.concatenate([np.full(len(prompt), np.nan), sample.logprobs])
                kinds = np.where(np.isnan(logprobs), int(Kind.OBSERVATION), int(Kind.ACTION))
                turn = Turn("o", rewards=[float(len(sample.token_ids)) + 0.01 * g])
                segment = Segment(ids, logprobs, kinds, np.zeros(len(ids)))
                members.append(Trajectory("made-up", seed=p, sample=g, turns=[turn], segments=[segment]))
            made.append(Group(members))
        return made

    return run_coroutine(play())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(temperature: float, family: str, build_family: Callable[[str], Any]) -> None:
    """The policy that learns is the one that sampled: packs, caches and temperature make no difference."""
    model = build_family(family)
    groups = sampled_groups(model, temperature)
    figures = learner_of(model, temperature=temperature, pack_tokens=100).step(groups, 0)
    assert figures["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert figures["policy/kl_sampling"] < 1e-6
    assert figures["policy/mismatch"] < 1e-4
    assert figures["policy/clipped_low"] == figures["policy/clipped_high"] == 0.0
    assert "policy/moved" not in figures, "it is not known after one update"
    # A control: at another temperature the ratios are off.
    other = learner_of(build_family(family), temperature=1.3).step(groups, 0)
    assert other["policy/kl_sampling"] > 1e-4


def test_experts_are_the_same_in_sampling_and_in_learning(build_family: Callable[[str], Any]) -> None:
    """Elsewhere a tenth of the routers chose other experts when a token was learnt from than when it was sampled."""
    model = build_family("qwen3_moe")
    chosen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda _module, _inputs, found, name=name: chosen.setdefault(name, []).append(found[2].clone())
            )
    groups = sampled_groups(model, 1.0, groups=1, size=1)
    sampling = {name: torch.cat(parts).tolist() for name, parts in chosen.items()}
    chosen.clear()
    learner_of(model).logprobs(groups)
    learning = {name: torch.cat(parts).tolist() for name, parts in chosen.items()}
    assert len(sampling) == 2
    tokens = len(groups[0].trajectories[0].segments[0])
    for name, experts in sampling.items():
        # The last sampled token is read by nobody who samples. What comes before is the engine's look at the model.
        read = experts[-(tokens - 1) :]
        assert len({tuple(both) for both in read}) > 1, "routers that always choose the same tell nothing"
        assert learning[name][: tokens - 1] == read


def test_log_probs_of_the_learner_are_those_of_the_engine(model: Any) -> None:
    groups = sampled_groups(model, 0.7)
    groups[1].trajectories[2].stop_reason = StopReason.ERROR
    learner = learner_of(model, temperature=0.7, pack_tokens=50)
    told = learner.logprobs(groups)
    kept = [t.segments[0] for group in groups for t in group if not t.failed]
    assert len(told) == len(kept) == 11
    for logprobs, segment in zip(told, kept, strict=True):
        np.testing.assert_allclose(logprobs, segment.logprobs[segment.sampled_mask], atol=1e-5)


def test_old_log_probs_computed_again(model: Any, make_groups: MakeGroups) -> None:
    """Ratios are then taken to the learner's own policy, and the gap to the sampler is a weight."""
    groups = make_groups(model, spread=0.2)
    figures = learner_of(copy.deepcopy(model), old_logprobs="recompute").step(groups, 0)
    assert figures["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert figures["policy/kl_sampling"] > 1e-3
    assert figures["policy/correction"] != pytest.approx(1.0, abs=1e-3)
    sampling = learner_of(copy.deepcopy(model)).step(groups, 0)
    assert sampling["policy/ratio"] != pytest.approx(1.0, abs=1e-3)
    assert sampling["policy/correction"] == 1.0


def test_the_ratio_of_a_second_pass_is_no_longer_one(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model, spread=0.0)
    assert learner_of(copy.deepcopy(model)).step(groups, 0)["policy/kl_old"] < 1e-9
    twice = learner_of(copy.deepcopy(model), epochs=2).step(groups, 0)
    assert twice["policy/updates"] == 2.0
    assert twice["policy/kl_old"] > 1e-6


def test_minibatches_use_every_episode_once(
    model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(model)
    seen: list[list[int]] = []
    make_packs = learner_module.make_packs

    def counting(items: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([int(item.token_ids.sum()) for item in items])
        return make_packs(items, *args, **kwargs)

    monkeypatch.setattr(learner_module, "make_packs", counting)
    learner = learner_of(model, minibatches=5, epochs=2)
    figures = learner.step(groups, 0)
    assert figures["policy/updates"] == 10.0
    assert learner.updates == 10
    everything = sorted(int(t.segments[0].token_ids.sum()) for group in groups for t in group)
    for epoch in (seen[:5], seen[5:]):
        assert sorted(number for part in epoch for number in part) == everything
        assert {len(part) for part in epoch} == {2, 3}
    assert seen[:5] != seen[5:]


def test_how_far_a_step_goes_is_told_where_there_are_several_updates(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    one = learner_of(copy.deepcopy(model)).step(groups, 0)
    assert one["policy/updates"] == 1 and "policy/moved" not in one
    several = learner_of(copy.deepcopy(model), epochs=3).step(groups, 0)
    assert several["policy/updates"] == 3
    assert several["policy/moved"] == several["policy/kl_sampling"] > one["policy/kl_sampling"]


def test_minibatches_of_one_seed_and_step_are_the_same(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    after = []
    for step in (3, 3, 4):
        copied = copy.deepcopy(model)
        learner_of(copied, minibatches=3, epochs=2).step(groups, step)
        after.append(weights(copied))
    assert all(torch.equal(after[1][name], tensor) for name, tensor in after[0].items())
    assert not all(torch.equal(after[2][name], tensor) for name, tensor in after[0].items())


# Other objectives


def test_the_reference_holds_the_policy_back(model: Any, make_groups: MakeGroups) -> None:
    """With a KL term alone, a policy that is away from its reference goes back to it."""
    groups = make_groups(model, spread=0.0)
    for group in groups:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.rewards = [0.0]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    algorithm = preset("grpo", kl_coefficient=1.0)
    learner = Learner(model, algorithm, options(learning_rate=2e-3), reference=reference)
    frozen = weights(reference)
    distances = [learner.step(groups, step)["policy/kl"] for step in range(12)]
    assert distances[0] > 1e-4
    assert distances[-1] < 0.5 * distances[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in weights(reference).items())


def test_without_a_given_reference_the_first_policy_is_it(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model, spread=0.0)
    learner = learner_of(model, algo_kl_coefficient=0.1)
    assert learner.reference is not None
    assert learner.reference is not model
    assert learner.step(groups, 0)["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    assert learner.step(groups, 1)["policy/kl"] > 1e-6


def test_how_far_the_policy_is_from_its_start(model: Any, make_groups: MakeGroups) -> None:
    """Against both policies' log-probs from whole sequences, one at a time."""
    start = copy.deepcopy(model)
    learner = Learner(model, preset("grpo"), options(learning_rate=2e-3), start=True)

    def drift(groups: list[Group], most: int = 10**6, seed: int = 0) -> float:
        (found,) = learner.drift(groups, most, np.random.default_rng(seed)).items()
        assert found[0] == "policy/kl_reference"
        return found[1]

    def logprobs_of(policy: Any, segment: Segment) -> np.ndarray:
        ids_T = torch.from_numpy(segment.token_ids.astype(np.int64))
        with torch.no_grad():
            each_TV = torch.log_softmax(policy(ids_T[None]).logits[0].double(), -1)
        targets = np.nonzero(segment.sampled_mask)[0]
        return each_TV[targets - 1, ids_T[targets]].numpy()

    before = make_groups(model, spread=0.0)
    assert drift(before) == pytest.approx(0.0, abs=1e-9)
    for step in range(3):
        learner.step(before, step)
    assert all(torch.equal(tensor, weights(start)[name]) for name, tensor in weights(learner._start).items())

    groups = make_groups(model, spread=0.0, seed=1)
    terms = []
    for trajectory in (one for group in groups for one in group):
        difference_N = logprobs_of(start, trajectory.segments[0]) - logprobs_of(model, trajectory.segments[0])
        terms.append(np.exp(difference_N) - 1 - difference_N)
    expected = float(np.mean(np.concatenate(terms)))
    assert expected > 1e-5
    assert drift(groups) == pytest.approx(expected, rel=1e-3)
    # With few tokens to read it is over a part of the episodes, of which at least one is read.
    alone = {drift(groups, most=1, seed=seed) for seed in range(30)}
    assert len(alone) > 3
    for value in alone:
        assert min(abs(value - float(term.mean())) for term in terms) < 1e-3 * value + 1e-9
    # What was sampled from a part of the vocabulary has log-probs that compare with nothing.
    learner.truncated = True
    for trajectory in (one for group in groups for one in group):
        trajectory.segments[0].logprobs[trajectory.segments[0].sampled_mask] = -0.5
    assert drift(groups) == pytest.approx(expected, rel=1e-3)
    learner.truncated = False
    assert drift(groups) != pytest.approx(expected, rel=0.1), "a control"


def test_a_start_that_nobody_kept(model: Any, make_groups: MakeGroups) -> None:
    rng = np.random.default_rng(0)
    assert learner_of(model).drift(make_groups(model), 10**6, rng) == {}
    kept = Learner(model, preset("grpo", kl_coefficient=0.1), options(), start=True)
    assert kept._start is kept.reference, "one copy serves both"
    failed = make_groups(model)
    for trajectory in (one for group in failed for one in group):
        trajectory.stop_reason = StopReason.ERROR
    assert kept.drift(failed, 10**6, rng) == {}


def test_an_entropy_bonus_raises_entropy(tiny_qwen3: Callable[..., Any], make_groups: MakeGroups) -> None:
    entropies = {}
    for coefficient in (0.0, 0.05):
        model = tiny_qwen3(initializer_range=0.3)
        groups = make_groups(model, spread=0.0)
        learner = learner_of(model, algo_entropy_coefficient=max(coefficient, 1e-9), learning_rate=2e-3)
        for step in range(6):
            entropies[coefficient] = learner.step(groups, step)["policy/entropy"]
    assert entropies[0.05] > entropies[0.0] + 0.02


# Precision and memory


def test_gradient_checkpointing_gives_the_same_gradients(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model, pack_tokens=80), groups)
    with_critic = learner_of(copy.deepcopy(model), "ppo", pack_tokens=80)
    with_critic.step(groups, 0)
    _compute_activations_again(model)
    runs: list[str] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append("policy"))
    learner = learner_of(model, pack_tokens=80)
    assert_same(gradients(learner, groups), expected)
    packs = len(runs) // 2
    assert runs == ["policy"] * 2 * packs
    assert packs >= 3
    hook.remove()
    # A critic computes its activations again as well, as it is made from the policy.
    again = learner_of(copy.deepcopy(model), "ppo", pack_tokens=80)
    assert again.critic is not None
    again.critic.decoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.append("critic"))
    again.step(groups, 0)
    assert runs.count("critic") > 2 * packs
    assert_same(weights(again.critic), weights(with_critic.critic), 2e-3)
    assert_same(weights(again.model), weights(with_critic.model), 2e-3)


def test_autocast_keeps_weights_and_log_probs_in_float32(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    expected = gradients(learner_of(model), groups)
    learner = learner_of(model, autocast=True)
    rough = gradients(learner, groups)
    flat = torch.cat([tensor.flatten() for tensor in rough.values()])
    exact = torch.cat([tensor.flatten() for tensor in expected.values()])
    assert float(torch.cosine_similarity(flat, exact, dim=0)) > 0.98
    assert not torch.equal(flat, exact)
    assert all(logprobs.dtype == np.float32 for logprobs in learner.logprobs(groups))
    figures = learner.step(groups, 0)
    assert math.isfinite(figures["policy/grad_norm"])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_only_what_requires_a_gradient_is_trained(model: Any, make_groups: MakeGroups) -> None:
    peft = pytest.importorskip("peft")
    groups = make_groups(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = weights(adapted)
    learner = learner_of(adapted)
    for step in range(2):
        learner.step(groups, step)
    changed = {name for name, tensor in weights(adapted).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


# Divergence


def state_of(learner: Learner) -> list[Tensor]:
    return [
        entry.clone()
        for optimiser in (*learner.optimisers.values(), learner.critic_optimiser)
        if optimiser is not None
        for state in optimiser.state.values()
        for entry in state.values()
    ]


def assert_untouched(learner: Learner, before: Gradients, state: list[Tensor]) -> None:
    for name, tensor in weights(learner.model).items():
        assert torch.equal(tensor, before[name]), name
    after = state_of(learner)
    assert len(after) == len(state)
    assert all(torch.equal(first, second) for first, second in zip(after, state, strict=True))
    assert all(parameter.grad is None for parameter in learner.model.parameters())


@pytest.mark.parametrize("old_logprobs", ["sampling", "recompute"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("extra", [{}, {"algo_kl_coefficient": 0.1}], ids=["plain", "kl"])
def test_a_broken_weight_stops_the_step(
    extra: dict[str, Any], algorithm: str, old_logprobs: str, model: Any, make_groups: MakeGroups
) -> None:
    groups = make_groups(model)
    learner = learner_of(model, algorithm, old_logprobs=old_logprobs, **extra)
    learner.step(groups, 0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = math.inf
    before, state = weights(model), state_of(learner)
    with pytest.raises(TrainingDiverged, match=r"step 2 .*not finite"):
        learner.step(groups, 1)
    assert_untouched(learner, before, state)


def _nan_loss(loss_N: Tensor, logprobs_N: Tensor) -> Tensor:
    return loss_N * math.nan


def _nan_gradient(loss_N: Tensor, logprobs_N: Tensor) -> Tensor:
    return loss_N + (0.0 * logprobs_N).abs().sqrt()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("spoil", "what"), [(_nan_loss, "loss of step 6"), (_nan_gradient, "gradient of the policy at step 6")]
)
def test_the_message_names_the_episodes_of_the_pack(
    spoil: Callable[..., Tensor], what: str, workers: int, model: Any, make_groups: MakeGroups,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    groups = make_groups(model)
    monkeypatch.setattr(learner_module, "pack_workers", lambda _: workers)
    learner = learner_of(model, pack_tokens=16)  # a pack for each episode
    before, state = weights(model), state_of(learner)
    objective = learner.algorithm.objectives[0]
    poisoned = groups[2].trajectories[1].segments[0].token_ids[-1]

    def poison(self: Any, batch: Any, output: Any) -> Any:
        result = original(self, batch, output)
        if int(batch.token_ids_N[-1]) == poisoned and len(batch) == groups[2].trajectories[1].n_sampled:
            result.loss_N = spoil(result.loss_N, output.logprobs_N)
        return result

    original = type(objective).__call__
    monkeypatch.setattr(type(objective), "__call__", poison)
    with pytest.raises(TrainingDiverged, match=rf"{what} is not finite in pack .*\(group, sample\) \(2, 1\);"):
        learner.step(groups, 5)
    assert_untouched(learner, before, state)


def test_a_gradient_that_overflows_is_not_applied(
    model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss may have a gradient that is not."""
    groups = make_groups(model)
    learner = learner_of(model)
    learner.step(groups, 0)
    before, state = weights(model), state_of(learner)
    hook = model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingDiverged, match=r"gradient of the policy at step 2 is not finite .*learning_rate"):
        learner.step(groups, 1)
    hook.remove()
    assert_untouched(learner, before, state)
    assert math.isfinite(learner.step(groups, 1)["policy/grad_norm"])


def test_gradients_that_overflow_only_in_their_norm_name_no_pack(
    model: Any, make_groups: MakeGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is finite; the sum of their squares is not."""
    groups = make_groups(model)
    learner = learner_of(model)
    before, state = weights(model), state_of(learner)
    hook = model.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, 1e37))
    with pytest.raises(TrainingDiverged, match=r"gradient of the policy at step 2 is not finite \(inf\);"):
        learner.step(groups, 1)
    hook.remove()
    assert_untouched(learner, before, state)
    assert math.isfinite(learner.step(groups, 1)["policy/grad_norm"])


def test_a_critic_that_diverges_keeps_the_policy_too(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    learner = learner_of(model, "ppo")
    learner.step(groups, 0)
    assert learner.critic is not None
    before, state = weights(model), state_of(learner)
    values = weights(learner.critic)
    hook = learner.critic.value.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingDiverged, match=r"gradient of the critic at step 2 is not finite"):
        learner.step(groups, 1)
    hook.remove()
    assert_untouched(learner, before, state)
    assert all(torch.equal(tensor, values[name]) for name, tensor in weights(learner.critic).items())


# Learning for real


@pytest.mark.parametrize(
    "algorithm", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "gspo", "cispo", "sapo", "vespo", "ppo"]
)
def test_the_rewarded_answer_becomes_likely(algorithm: str, tiny_qwen3: Callable[..., Any]) -> None:
    """A bandit with one pull: after each of two prompts another token pays."""
    model = tiny_qwen3(12, initializer_range=0.02)
    engine = LocalEngine(model, max_context=8, max_sessions=32, memory_bytes=1 << 24)
    learner = learner_of(model, algorithm, learning_rate=5e-3, critic_learning_rate=1e-2)
    prompts, paid = ([0, 1, 0], [0, 2, 0]), (5, 7)

    def probability() -> float:
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in prompts]
        return min(float(row[token]) for row, token in zip(rows, paid, strict=True))

    def play(step: int) -> list[Group]:
        async def pull(p: int, g: int) -> Trajectory:
            session = engine.session(stream_key("bandit", step, p, g))
            session.extend(np.array(prompts[p]))
            sample = await session.sample(SamplingParams(max_tokens=1))
            session.close()
            reward = float(sample.token_ids[0] == paid[p])
            turn = Turn("o", executed=["pull"], rewards=[reward])
            ids, logprobs = np.append(prompts[p], sample.token_ids), np.append([np.nan] * 3, sample.logprobs)
            segment = Segment(ids, logprobs, [int(Kind.OBSERVATION)] * 3 + [int(Kind.ACTION)], [0] * 4)
            return Trajectory("bandit", seed=p, sample=g, turns=[turn], segments=[segment])

        async def everything() -> list[Group]:
            return [Group(list(await asyncio.gather(*(pull(p, g) for g in range(16))))) for p in range(2)]

        return run_coroutine(everything())

    before = probability()
    assert before < 0.15
    for step in range(40):
        learner.step(play(step), step)
    assert probability() > 0.8


def test_without_a_reward_the_policy_becomes_surer(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    for group in groups:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.rewards = [0.0]
    assert "signal/self_certainty" not in learner_of(copy.deepcopy(model)).step(groups, 0)
    learner = learner_of(model, algo_self_certainty=1.0, algo_reward_weight=0.0)
    before = weights(model)
    figures = learner.step(groups, 0)
    assert figures["signal/self_certainty"] > 0
    assert figures["policy/grad_norm"] > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
