"""Episodes made up for the learner: two turns, a prompt that a group shares, log-probs near those of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.trajectory import Group, Kind, SampleStop, Segment, StopReason, Trajectory, Turn

MakeGroups = Callable[..., list[Group]]


def _episode(rng: np.random.Generator, prompt: np.ndarray, lengths: tuple[int, ...], vocabulary: int) -> Segment:
    ids, kinds, turns = list(prompt), [int(Kind.SYSTEM)] * len(prompt), [0] * len(prompt)
    for turn, length in enumerate(lengths):
        if turn:
            ids += rng.integers(0, vocabulary, 5).tolist()
            kinds += [int(Kind.OBSERVATION)] * 5
            turns += [turn] * 5
        thought = length // 2
        ids += rng.integers(0, vocabulary, length).tolist()
        kinds += [int(Kind.THOUGHT)] * thought + [int(Kind.ACTION)] * (length - thought)
        turns += [turn] * length
    return Segment(np.array(ids), np.full(len(ids), np.nan), np.array(kinds), np.array(turns))


def fill_logprobs(model: Any, groups: list[Group], temperature: float, spread: float, seed: int) -> None:
    """Write the model's log-probs of the sampled tokens into the episodes, with normal noise of width ``spread``."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for group in groups:
            for trajectory in group:
                for segment in trajectory.segments:
                    ids = torch.from_numpy(segment.token_ids.astype(np.int64))
                    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0].float() / temperature
                    logprobs = np.full(len(ids), np.nan)
                    logprobs[1:] = logits_TV[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
                    noise = spread * rng.standard_normal(len(ids))
                    segment.logprobs = np.where(segment.sampled_mask, logprobs + noise, np.nan).astype(np.float32)


@pytest.fixture(scope="session")
def make_groups() -> MakeGroups:
    """``make_groups(model, groups=4, size=3)``: episodes with rewards that differ and log-probs of ``model``."""

    def build(
        model: Any, groups: int = 4, size: int = 3, *, seed: int = 0, temperature: float = 1.0, spread: float = 0.15,
    ) -> list[Group]:  # fmt: skip
        rng = np.random.default_rng(seed)
        vocabulary = model.config.get_text_config().vocab_size
        made = []
        for p in range(groups):
            prompt = rng.integers(0, vocabulary, 18 + 3 * p)
            members = []
            for g in range(size):
                lengths = tuple(int(n) for n in rng.integers(2, 9, 1 + (p + g) % 2))
                turns = [Turn("o", executed=["a"], rewards=[float(rng.normal())], stop=SampleStop.END) for _ in lengths]
                members.append(
                    Trajectory(
                        "made-up",
                        seed=p,
                        sample=g,
                        segments=[_episode(rng, prompt, lengths, vocabulary)],
                        turns=turns,
                        stop_reason=StopReason.TERMINATED,
                    )
                )
            made.append(Group(members))
        fill_logprobs(model, made, temperature, spread, seed)
        return made

    return build


SMALL: dict[str, Any] = {
    "environment": {"name": "frozenlake", "params": {"size": 3}},
    "agent": {"thinking": False, "max_turns": 3, "max_tokens_per_turn": 12, "max_context": 260},
    "training": {"steps": 4, "groups": 4, "group_size": 3, "learning_rate": 3e-3, "schedule": "linear"},
    "evaluation": {"episodes": 4, "every": 2, "validation_episodes": 3},
    "engine": {"max_sessions": 12, "memory_gib": 0.05},
    "checkpoint": {"every": 1, "keep": 2},
    "save_trajectories_every": 2,
}


@pytest.fixture(scope="session")
def small(taught_folder: Path) -> Callable[..., Recipe]:
    """A recipe of a few seconds, with options changed by dotted name (two underscores for the dot)."""

    def build(**changes: Any) -> Recipe:
        overrides = {name.replace("__", "."): value for name, value in changes.items()}
        return resolve_recipe(SMALL, {"model.path": str(taught_folder), "model.device": "cpu", **overrides})

    return build
