"""The model card of a base model, filled in from its configuration and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from rehearsal.training.base_config import BaseConfig

_CARD = """\
# Rehearsal base model

A language model of {parameters:,.0f} parameters for trying out reinforcement learning of agents on a laptop. It plays
small text games, badly on purpose: it keeps the answer format, sees in its thoughts where things stand, foretells what
the game will answer, and acts like the mixture of mostly unskilled players that it learnt from. What it lacks is what
training with rewards is to add.

## What it is

- Architecture: Qwen3 (transformers), {layers} layers of width {hidden}, {heads} query heads of width {head_dim},
  {kv_heads} key/value heads, feed-forward width {mlp}, tied embeddings, {positions:,} positions, float32.
- Tokenizer: byte-level BPE with {vocabulary:,.0f} tokens; digits and the symbols of grids are tokens of their own, and
  any text can be spelled. Chat format: ChatML. System prompt and first observation of FrozenLake take
  {opening_tokens:.0f} tokens.
- Size on disk: {megabytes:.1f} MB.

## How it was made

    {command}

Trained from random weights on {tokens:,.0f} tokens of {episodes:,.0f} episodes, in {steps:,.0f} steps of Muon and AdamW
(peak learning rate {learning_rate:g}, {seconds:,.0f} seconds, seed {seed}). The data are episodes of scripted players
in the built-in environments, made during training; no text by people or by other models was used. All tasks are of the
training splits. The loss is taken on thoughts, actions and, with smaller weights, the environment's observations.

Scenes (share of episodes):

{scenes}

Players (weights and ranges):

{players}

## Scores

Held-out loss, in nats a token, on {heldout} episodes of the same players with tasks of the validation splits:

{losses}

{success}

## Limits

It knows the environments that are named above and nothing else: no general language, no facts, no other tasks. Of the
built-in environments `repair` is not among them, so on it this model starts from nothing.
It is meant for learning, tests and demonstrations. Names of bandit arms that it has not met mean nothing to it,
arithmetic beyond small numbers is unreliable, and positions beyond a few hundred tokens were hardly seen in training.
"""


def model_card(config: BaseConfig, figures: Mapping[str, float]) -> str:
    """The card as Markdown.

    Args:
        config: what the model was made with.
        figures: what :func:`rehearsal.training.base_model.make_base` measured.
    """
    total = sum(scene.weight for scene in config.scenes)
    scenes = [
        f"- {scene.title}: {scene.weight / total:.1%}"
        + (f", rehearsed in {scene.rehearse:.0%} of the episodes" if scene.rehearse else "")
        + "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in scene.skill.items())
        for scene in config.scenes
    ]
    players = [f"- {f.name.replace('_', ' ')}: {getattr(config.mix, f.name):g}" for f in fields(config.mix)]
    names = {
        "thought": "thoughts",
        "action": "actions",
        "observation": "observations after an action",
        "opening": "first observations (nothing foretells them)",
    }
    losses = [
        f"- {text}: {figures[f'heldout_{name}']:.3f}" for name, text in names.items() if f"heldout_{name}" in figures
    ]
    success = "Success rates were not measured when this model was made."
    rates = {name.removeprefix("success_"): rate for name, rate in figures.items() if name.startswith("success_")}
    if rates:
        lines = [f"- {name.replace('_', ', ')}: {rate:.1%}" for name, rate in rates.items()]
        played = f", {figures['play_episodes']:.0f} validation tasks each" if "play_episodes" in figures else ""
        success = "\n".join(
            [f"Success rates of sampled play (temperature 1, the environments' limits{played}):", "", *lines]
        )
        if "valid_answers" in figures:
            success += f"\n\nAnswers that kept the format and named legal actions: {figures['valid_answers']:.1%}."
    known = ("parameters", "vocabulary", "opening_tokens", "megabytes", "tokens", "episodes", "steps", "seconds")
    return _CARD.format(
        **{name: figures[name] for name in known},
        command=" ".join(["rehearsal base", *(f"--{name} {value}" for name, value in config.to_options().items())]),
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp=config.mlp,
        positions=config.max_positions,
        learning_rate=config.learning_rate,
        seed=config.seed,
        scenes="\n".join(scenes),
        players="\n".join(players),
        heldout=config.heldout_episodes,
        losses="\n".join(losses),
        success=success,
    )
