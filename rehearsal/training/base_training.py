"""How the small base model is trained: supervised, on what was thought, done and seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rehearsal.errors import TrainingDiverged
from rehearsal.models.head import token_logprobs
from rehearsal.models.packed import packed_hidden
from rehearsal.models.packing import Pack, PackItem, make_packs
from rehearsal.models.parallel import accumulate_gradients, map_packs, pack_workers
from rehearsal.training.base_config import BaseConfig
from rehearsal.training.base_optimiser import BaseOptimiser
from rehearsal.training.base_transcripts import Transcript
from rehearsal.trajectory import Kind

_OPENING = len(Kind)
"""Stands beside the kinds for the first observation of an episode."""
_LOSS_NAMES = {int(Kind.THOUGHT): "thought", int(Kind.ACTION): "action", int(Kind.OBSERVATION): "observation",
               _OPENING: "opening"}  # fmt: skip
_SMOOTHING = 0.95
# Larger packs are slower on a processor: their activations leave its cache.
_PACK_TOKENS = 2048
"""Tokens of one forward pass: more bring no speed on a processor, and fewer would share fewer system prompts."""

SAVE_EVERY = 100
"""Steps between two checkpoints, one or two minutes on two cores."""

OnStep = Callable[[int, float, float], None]
"""Called after each optimiser step with its number from 1, the smoothed loss and the tokens per second so far."""


def new_model(config: BaseConfig, tokenizer: Any) -> Qwen3ForCausalLM:
    """A Qwen3 model (query and key norms, tied embeddings) with random weights, in float32."""
    # Small models learn faster from weights of about 1/sqrt(width) than from the usual 0.02.
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        initializer_range=0.5 * config.hidden**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen3ForCausalLM(architecture).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def heldout_losses(model: Any, transcripts: Sequence[Transcript]) -> dict[str, float]:
    """Mean negative log-likelihood in nats a token, by what the tokens are: thought, action, observation, opening.

    The opening is the first observation of an episode: nothing foretells it, so its loss is the entropy of the tasks.
    """
    totals = dict.fromkeys(_LOSS_NAMES, 0.0)
    counts = dict.fromkeys(_LOSS_NAMES, 0)
    model.eval()
    with torch.no_grad():
        work = _packs(transcripts)
        for losses_N, classes_N in map_packs([model], lambda one: _losses(model, one), work, pack_workers(model)):
            for number in _LOSS_NAMES:
                chosen = torch.from_numpy(classes_N == number)
                totals[number] += float(losses_N[chosen].double().sum())
                counts[number] += int(chosen.sum())
    return {name: totals[number] / counts[number] for number, name in _LOSS_NAMES.items() if counts[number]}


@dataclass
class BaseState:
    """How far the training of a base has come, apart from its weights.

    Attributes:
        optimizer: the state of the optimiser; None before the first step.
        step: optimiser steps done.
        episodes: transcripts taken from the stream.
        tokens: tokens in them.
        seconds: of training.
        loss_first: the loss of the first step.
        loss_smooth: the smoothed loss, not yet divided by the weight that it has.
    """

    optimizer: dict[str, Any] | None = None
    step: int = 0
    episodes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_first: float = 0.0
    loss_smooth: float = 0.0


def train_base(
    model: Qwen3ForCausalLM, config: BaseConfig, transcripts: Iterator[Transcript], on_step: OnStep | None = None,
    state: BaseState | None = None, save: Callable[[BaseState], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train with Muon and AdamW on a stream of transcripts, each seen once, in place.

    Args:
        model: with random weights, or those that belong to ``state``.
        config: sizes of steps and their number, learning rate, weights of the losses.
        transcripts: from number ``state.episodes`` on.
        on_step: called after each step.
        state: where to go on; from the beginning if None.
        save: called every ``SAVE_EVERY`` steps with the state at that moment.

    Returns:
        ``tokens``, ``episodes``, ``steps``, ``tokens_per_second``, ``loss_first`` and ``loss_last`` (weighted, in nats
        a token; the last one smoothed).

    Raises:
        TrainingDiverged: if the loss or a gradient was not finite.
    """
    weights = np.zeros(_OPENING + 1, dtype=np.float32)
    weights[[Kind.THOUGHT, Kind.ACTION]] = 1.0
    weights[Kind.OBSERVATION], weights[_OPENING] = config.observation_weight, config.opening_weight
    optimiser = BaseOptimiser(model, config.weight_decay)
    state = state or BaseState()
    if state.optimizer is not None:
        optimiser.load_state_dict(state.optimizer)
    model.train()
    parameters = list(model.parameters())
    workers = pack_workers(model)
    began = time.monotonic() - state.seconds
    for step in range(state.step, config.steps):
        batch = _take(transcripts, config.tokens_per_step)
        weight = float(sum(weights[_classes(t)[1:]].sum() for t in batch))

        def losses_of(work: _Work, weight: float = weight) -> tuple[list[Tensor | None], float]:
            losses_N, classes_N = _losses(model, work)
            loss = (losses_N * torch.from_numpy(weights[classes_N])).sum() / weight
            return [loss], float(loss.detach())

        total = sum(accumulate_gradients([model], [parameters], losses_of, _packs(batch), workers))
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise TrainingDiverged(
                f"The loss of step {step} is {total} and its gradient has norm {norm}: lower the learning rate."
            )
        optimiser.step(config.learning_rate * schedule(step, config.steps, config.warmup))
        state.step = step + 1
        state.tokens += sum(len(t.token_ids) for t in batch)
        state.episodes += len(batch)
        state.loss_first = state.loss_first if step else total
        state.loss_smooth = _SMOOTHING * state.loss_smooth + (1 - _SMOOTHING) * total
        state.seconds = time.monotonic() - began
        if on_step is not None:
            on_step(state.step, _smoothed(state), state.tokens / state.seconds)
        if save is not None and state.step % SAVE_EVERY == 0 and state.step < config.steps:
            save(replace(state, optimizer=optimiser.state_dict()))
    return {
        "tokens": float(state.tokens),
        "episodes": float(state.episodes),
        "steps": float(config.steps),
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
        "loss_first": state.loss_first,
        "loss_last": _smoothed(state),
    }


def _smoothed(state: BaseState) -> float:
    return state.loss_smooth / (1 - _SMOOTHING**state.step)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step relative to its peak: linear warm-up over a share of the steps, cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def _take(transcripts: Iterator[Transcript], tokens: int) -> list[Transcript]:
    """The next transcripts, until they have ``tokens`` tokens together; those with the same system prompt side by side,
    so that a pack reads it once."""
    batch: list[Transcript] = []
    size = 0
    while size < tokens:
        batch.append(next(transcripts))
        size += len(batch[-1].token_ids)
    return sorted(batch, key=lambda transcript: transcript.opening)


class _Work(NamedTuple):
    """A pack, and the class of each of its target tokens."""

    pack: Pack
    classes_N: np.ndarray


def _packs(transcripts: Sequence[Transcript]) -> list[_Work]:
    """All tokens that are learnt, in packs."""
    wanted = [np.flatnonzero(np.isin(_classes(t), list(_LOSS_NAMES))) for t in transcripts]
    items = [
        PackItem(transcript.token_ids, targets[targets > 0], transcript.opening)
        for transcript, targets in zip(transcripts, wanted, strict=True)
    ]
    return [
        _Work(pack, np.concatenate([_classes(transcripts[i])[items[i].targets] for i in pack.items]))
        for pack in make_packs(items, _PACK_TOKENS)
    ]


def _losses(model: Any, work: _Work) -> tuple[Tensor, np.ndarray]:
    """Negative log-likelihoods, (N,), and classes, (N,), of the target tokens of a pack."""
    pack = work.pack
    hidden_ND = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
    logprobs_N, _ = token_logprobs(model, hidden_ND, pack.targets_N)
    pack.plan.forget()
    return -logprobs_N, work.classes_N


def _classes(transcript: Transcript) -> np.ndarray:
    """The kind of each token, with the first observation as a class of its own; int64 of shape (T,)."""
    opening_T = (transcript.kinds == Kind.OBSERVATION) & (transcript.turns == 0)
    return np.where(opening_T, _OPENING, transcript.kinds).astype(np.int64)
