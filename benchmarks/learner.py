"""How well the learner uses the processor, and how much memory a step takes, against padding.

The share of the processor: operations that a training step needs (``benchmarks/counting.py``; recomputation does not
count), over the time it takes, over what a large matrix product reaches in the same run, in turn. The step is all that
``Learner.step`` does: advantages, packing, forward, backward, update.

Memory: the highest resident memory of a process that takes one step, less that of the same process before the step;
each variant has a process of its own. The padded variant is the common way: batches of right-padded sequences, the
model's own attention with a mask, logits of all positions, the same loss. Its batches hold about as many tokens,
padding included, as a pack does.

Episodes: groups of FrozenLake games by scripted players in the tokens of the model, each with a reward of its own, so
that no episode is left out for having no advantage.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import forget_peak, in_own_process, interleaved, memory, parser, ratio, report, say
from benchmarks.counting import MATRIX, PRODUCT_FLOPS, items_of, packed_counts, training_flops
from benchmarks.setting import LEARNING_RATE, model_folder
from rehearsal.agents.agent import Limits
from rehearsal.agents.players import SkillMix, scripted_episode
from rehearsal.algorithms.presets import preset
from rehearsal.environments.registry import make
from rehearsal.models.load import Policy, load_policy
from rehearsal.models.packing import PackItem, make_packs
from rehearsal.rollout import tasks_of_step
from rehearsal.training.learner import Learner
from rehearsal.training.options import TrainingOptions
from rehearsal.trajectory import Group

VARIANTS = ("shared", "packed", "padded")
"""Packed with prefixes read once, packed without, padded."""


def scripted_groups(policy: Policy, groups: int, group_size: int, seed: int) -> list[Group]:
    """FrozenLake games by scripted players, each with a reward of its own."""
    env = make("frozenlake")
    limits = Limits.for_env(env, max_tokens_per_turn=64, max_context=1024)
    mix = SkillMix()
    played = []
    for task in tasks_of_step(seed, 0, groups):
        rng = np.random.default_rng([seed, task.seed])
        members = []
        for sample in range(group_size):
            trajectory = scripted_episode(env, mix.draw(rng), policy.renderer, rng, seed=task.seed, limits=limits)
            trajectory.sample = sample
            trajectory.turns[-1].penalty -= float(rng.random())
            members.append(trajectory)
        played.append(Group(members))
    env.close()
    return played


def make_learner(policy: Policy, pack_tokens: int, share: bool, seed: int) -> Learner:
    options = TrainingOptions.model_validate(
        {"learning_rate": LEARNING_RATE, "pack_tokens": pack_tokens, "share_prefixes": share}
    )
    return Learner(policy.model, preset("dr_grpo", aggregation="token_mean"), options, seed=seed)


def score(learner: Learner, groups: Sequence[Group]) -> None:
    """Give the sampled tokens the log-probs that the policy has for them, as if it had sampled them."""
    segments = [segment for group in groups for trajectory in group for segment in trajectory.segments]
    for segment, logprobs in zip(segments, learner.logprobs(groups), strict=True):
        segment.logprobs[segment.sampled_mask] = logprobs


def padded_step(
    policy: Policy, optimiser: torch.optim.Optimizer, items: Sequence[PackItem], advantages: np.ndarray,
    batch_tokens: int,
) -> int:  # fmt: skip
    """One step the common way; returns the tokens that were read, padding included."""
    model = policy.model
    longest = max(len(item.token_ids) for item in items)
    rows = max(1, batch_tokens // longest)
    total = sum(len(item.targets) for item in items)
    read = 0
    model.train()
    for begin in range(0, len(items), rows):
        part = items[begin : begin + rows]
        width = max(len(item.token_ids) for item in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        seen = torch.zeros(len(part), width, dtype=torch.long)
        weights = torch.zeros(len(part), width)
        for row, item in enumerate(part):
            ids[row, : len(item.token_ids)] = torch.from_numpy(item.token_ids.astype(np.int64))
            seen[row, : len(item.token_ids)] = 1
            weights[row, torch.from_numpy(item.targets)] = float(advantages[begin + row]) / total
        read += ids.numel()
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(part), -1)
        (losses * weights[:, 1:]).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return read


def variant_step(variant: str, policy: Policy, groups: list[Group], pack_tokens: int, seed: int) -> Callable[[], int]:
    """A function that takes one step in this way and returns the tokens that it read."""
    if variant == "padded":
        items = items_of(groups)
        advantages = np.concatenate([group.rewards - group.rewards.mean() for group in groups])
        optimiser = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        return lambda: padded_step(policy, optimiser, items, advantages, pack_tokens)
    learner = make_learner(policy, pack_tokens, variant == "shared", seed)
    return lambda: int(learner.step(groups, 0)["speed/learner_tokens"])


def measure_memory(given: argparse.Namespace, folder: Path) -> None:
    """What the process of one variant does: a single step, and a line on what it took."""
    policy = load_policy(folder, device="cpu")
    groups = scripted_groups(policy, given.groups, given.group_size, given.seed)
    learner = make_learner(policy, 512, True, given.seed)
    score(learner, groups)
    del learner
    step = variant_step(given.measure, policy, groups, given.pack_tokens, given.seed)
    gc.collect()
    before = memory("VmRSS")
    forget_peak()
    tokens = step()
    print(json.dumps({"bytes": memory("VmHWM") - before, "tokens": tokens}))


def memory_of(variant: str, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What :func:`measure_memory` says in a process of its own."""
    options = ["--measure", variant, "--model", str(folder), "--groups", str(given.groups)]
    options += ["--group-size", str(given.group_size), "--pack-tokens", str(given.pack_tokens)]
    options += ["--seed", str(given.seed), "--threads", str(torch.get_num_threads())]
    return in_own_process(options)


def utilisation(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The speed of the learner, of a padded step and of a large matrix product, in turn."""
    policy = load_policy(folder, device="cpu")
    groups = scripted_groups(policy, given.groups, given.group_size, given.seed)
    score(make_learner(policy, given.pack_tokens, True, given.seed), groups)
    items = items_of(groups)
    left = torch.randn(MATRIX, MATRIX)
    right = torch.randn(MATRIX, MATRIX)
    works: dict[str, Callable[[], Any]] = {
        name: variant_step(name, policy, groups, given.pack_tokens, given.seed) for name in VARIANTS
    }
    works["product"] = lambda: torch.mm(left, right)
    seconds = interleaved(works, given.repeats, warmup=1)
    figures = {"product_gflops": PRODUCT_FLOPS / statistics.median(seconds["product"]) / 1e9}
    targets = sum(len(item.targets) for item in items)
    for name in ("shared", "packed"):
        share = name == "shared"
        packs = [pack.items for pack in make_packs(items, given.pack_tokens, share_prefixes=share)]
        tokens, pairs = packed_counts(items, packs, share)
        flops = training_flops(policy.model, tokens, targets, pairs)
        speeds = [flops / s for s in seconds[name]]
        figures[f"{name}_gflops"] = statistics.median(speeds) / 1e9
        figures |= ratio(speeds, [PRODUCT_FLOPS / s for s in seconds["product"]]).figures(
            "utilisation" if share else "utilisation_packed"
        )
    episodes = given.groups * given.group_size
    for name in VARIANTS:
        figures[f"{name}_episodes_per_second"] = episodes / statistics.median(seconds[name])
    figures |= ratio(seconds["padded"], seconds["shared"]).figures("faster_than_padded")
    figures["targets"] = float(targets)
    figures["episodes"] = float(episodes)
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="base", help='a model folder, "base", or "random"')
    options.add_argument("--groups", type=int, default=32)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--pack-tokens", type=int, default=4096)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.groups, given.repeats = min(given.groups, 6), min(given.repeats, 2)
    with model_folder(given.model) as folder:
        if given.measure:
            measure_memory(given, folder)
            return
        figures = utilisation(given, folder)
        say(f"utilisation {figures['utilisation']:.2f}")
        for variant in VARIANTS:
            measured = memory_of(variant, given, folder)
            figures[f"{variant}_step_mib"] = measured["bytes"] / 2**20
            figures[f"{variant}_tokens"] = measured["tokens"]
            say(f"{variant}: {figures[f'{variant}_step_mib']:.0f} MiB, {measured['tokens']} tokens")
    figures["memory_of_padded_over_ours"] = figures["padded_step_mib"] / max(figures["shared_step_mib"], 1e-9)
    figures["tokens_of_padded_over_ours"] = figures["padded_tokens"] / figures["shared_tokens"]
    report("learner", figures, {"utilisation": ">= 0.4"}, [given.seed], given.quick)


if __name__ == "__main__":
    main()
