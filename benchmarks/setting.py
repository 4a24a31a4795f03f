"""The model and the recipe that the benchmarks have in common."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rehearsal.models.load import base_folder, save_policy
from rehearsal.training.base_config import BaseConfig
from rehearsal.training.base_training import new_model
from rehearsal.training.base_transcripts import make_tokenizer
from rehearsal.training.recipe import Recipe, resolve_recipe

LEARNING_RATE = 1e-6
"""So small that the policies stay where they are: all steps of a benchmark, on either side, play alike."""


@contextlib.contextmanager
def model_folder(path: str) -> Iterator[Path]:
    """A Hugging Face folder for a benchmark, there while the block runs.

    Args:
        path: a folder; "base" for the model that ships; "random" for a model of the same size with random weights and a
            tokenizer trained on the spot. Where the shipped model is missing, "base" means "random".
    """
    folder = base_folder() if path == "base" else Path(path)
    if path != "random" and (folder / "config.json").is_file():
        yield folder
        return
    if path not in ("base", "random"):
        raise SystemExit(f"{path} is not a Hugging Face model folder: it has no config.json.")
    with tempfile.TemporaryDirectory() as name:
        config = BaseConfig(tokenizer_episodes=300)
        tokenizer = make_tokenizer(config)
        save_policy(new_model(config, tokenizer), tokenizer, name)
        yield Path(name)


def is_random(path: str) -> bool:
    """Whether :func:`model_folder` would make a model with random weights."""
    return path == "random" or (path == "base" and not (base_folder() / "config.json").is_file())


def frozen_lake_recipe(
    *, groups: int, group_size: int, turns: int, actions: int, tokens_per_turn: int, max_context: int, seed: int,
    **overrides: Any,
) -> Recipe:  # fmt: skip
    """FrozenLake 4x4 as it is by default, without entropy or KL terms, and a loss that is the mean over tokens.

    Args:
        groups, group_size: tasks of a step and episodes of each.
        turns, actions: of an episode, and of a turn.
        tokens_per_turn, max_context: limits in tokens.
        overrides: other options, with ``__`` for the dot.
    """
    return resolve_recipe(
        None,
        {
            "seed": seed,
            "model.device": "cpu",
            "environment.name": "frozenlake",
            "agent.max_turns": turns,
            "agent.max_actions_per_turn": actions,
            "agent.max_tokens_per_turn": tokens_per_turn,
            "agent.max_context": max_context,
            "algorithm.name": "dr_grpo",
            "algorithm.options": {"aggregation": "token_mean"},
            "training.groups": groups,
            "training.group_size": group_size,
            "training.learning_rate": LEARNING_RATE,
            "evaluation.episodes": 0,
            "evaluation.every": 0,
        }
        | {name.replace("__", "."): value for name, value in overrides.items()},
    )
