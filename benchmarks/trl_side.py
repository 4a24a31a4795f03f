"""The same training step in TRL, at its best on one machine without an inference server.

TRL's ``GRPOTrainer`` plays several turns through ``rollout_func``. The one here plays all episodes of a step in
lockstep: for each turn, the episodes that still live are left-padded into one batch and answered by the trainer's own
generation (``model.generate`` with a key/value cache within the turn, or the continuous batching of transformers),
which is what the trainer's tool loop does too. Agents, messages, limits and environments are those of rehearsal, token
for token, so both sides play the same game.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.play import check_reset, play_actions
from rehearsal.agents.protocol import Protocol
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import make
from rehearsal.models.load import Policy, quiet_transformers
from rehearsal.rollout import tasks_of_step
from rehearsal.training.recipe import Recipe
from rehearsal.trajectory import SampleStop

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


@dataclass
class TrlSeconds:
    """What one training step of TRL took.

    Attributes:
        step: from its beginning to the end of the update.
        generation: the part in which episodes were played, environments included.
        episodes: episodes of the step.
        sampled: tokens that the policy sampled.
        tokens: tokens of all episodes, prompts included.
        turns: answers of all episodes.
    """

    step: float = 0.0
    generation: float = 0.0
    episodes: int = 0
    sampled: int = 0
    tokens: int = 0
    turns: int = 0


@dataclass
class _Seat:
    """An episode in play."""

    env: TextEnv
    agent: Agent
    token_ids: list[int]
    sampled: list[int]
    """1 for each token of ``token_ids`` that the policy sampled, else 0."""
    prompt_length: int
    reward: float = 0.0


@dataclass
class _Tables:
    """The environments and what agents are made with."""

    recipe: Recipe
    policy: Policy
    limits: Limits
    protocol: Protocol
    envs: list[TextEnv] = field(default_factory=list)

    def env(self, index: int) -> TextEnv:
        while len(self.envs) <= index:
            self.envs.append(make(self.recipe.environment.name, **self.recipe.environment.params))
        return self.envs[index]


def _play(tables: _Tables, seeds: list[int], generate: Callable[[list[list[int]]], list[list[int]]]) -> list[_Seat]:
    """One episode for each seed, in lockstep; seeds that are equal are a group."""
    seats: list[_Seat] = []
    members: Counter[int] = Counter()
    for index, seed in enumerate(seeds):
        env, agent = tables.env(index), Agent(tables.policy.renderer, tables.protocol, tables.limits)
        options = {"split": "train", "chance": members[seed]}
        members[seed] += 1
        observation, info = check_reset(env, env.reset(seed=seed, options=options))
        prompt = agent.opening(env.instructions, observation, str(info.get("state", "")), env)
        assert prompt is not None, "the limits leave no room for an answer"
        ids = prompt.token_ids.tolist()
        seats.append(_Seat(env, agent, ids, [0] * len(ids), len(ids)))
    stops = set(tables.policy.renderer.stop_token_ids)
    alive = seats
    while alive:
        answers = generate([seat.token_ids for seat in alive])
        still = []
        for seat, answer in zip(alive, answers, strict=True):
            room = seat.agent.tokens_left
            answer = answer[:room]
            stop = SampleStop.END if answer and answer[-1] in stops else SampleStop.LENGTH
            # TRL keeps no log-probs of its own sampling; the agent's books need some, and nothing reads them.
            turn = seat.agent.read(np.array(answer, dtype=np.int32), np.zeros(len(answer), np.float32), stop)
            seat.token_ids += answer
            seat.sampled += [1] * len(answer)
            prompt = seat.agent.next_turn(play_actions(seat.env, turn, seat.agent.protocol, seat.agent.actions_left))
            seat.reward += turn.reward
            if prompt is not None:
                ids = prompt.token_ids.tolist()
                seat.token_ids += ids
                seat.sampled += [0] * len(ids)
                still.append(seat)
        alive = still
    return seats


def train_with_trl(
    recipe: Recipe, policy: Policy, steps: int, *, batch: int, between: Callable[[int], None] | None = None,
    engine: str = "generate", bf16: bool = False, reward: Callable[[_Seat], float] | None = None,
) -> list[TrlSeconds]:  # fmt: skip
    """Train for some steps with TRL and take the time of each.

    Args:
        recipe: tasks, agent, optimiser. What TRL has no name for is not used.
        policy: updated in place; it must be one of its own, since TRL changes the model's forward pass.
        steps: training steps.
        batch: episodes of one forward and backward pass; a divisor of the episodes of a step.
        between: called with the number of each step just before it; what it does is not counted.
        engine: "generate" or "continuous".
        bf16: automatic mixed precision.
        reward: the reward of an episode; its sum of rewards and penalties if None.

    Returns:
        what each step took.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    training = recipe.training
    episodes = training.groups * training.group_size
    # Of two sequences of tasks, both sides walk through the same one.
    prompts = [str(task.seed) for step in range(steps) for task in tasks_of_step(recipe.seed, step, training.groups)]
    env = make(recipe.environment.name, **recipe.environment.params)
    limits = Limits.for_env(
        env, max_turns=recipe.agent.max_turns, max_actions_per_turn=recipe.agent.max_actions_per_turn,
        max_actions=recipe.agent.max_actions, max_tokens_per_turn=recipe.agent.max_tokens_per_turn,
        max_context=recipe.agent.max_context,
    )  # fmt: skip
    protocol = Protocol(thinking=recipe.agent.thinking, format_penalty=recipe.agent.format_penalty)
    tables = _Tables(recipe, policy, limits, protocol)
    log: list[TrlSeconds] = []

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        started = time.perf_counter()

        def generate(histories: list[list[int]]) -> list[list[int]]:
            return trainer._generate_single_turn(histories, None, {}, 1)[0]

        seats = _play(tables, [int(prompt) for prompt in prompts], generate)
        output = {
            "prompt_ids": [seat.token_ids[: seat.prompt_length] for seat in seats],
            "completion_ids": [seat.token_ids[seat.prompt_length :] for seat in seats],
            "env_mask": [seat.sampled[seat.prompt_length :] for seat in seats],
            "logprobs": None,
            "episode_reward": [seat.reward if reward is None else reward(seat) for seat in seats],
        }
        figures = log[-1]
        figures.generation += time.perf_counter() - started
        figures.episodes += len(seats)
        figures.sampled += sum(sum(seat.sampled) for seat in seats)
        figures.tokens += sum(len(seat.token_ids) for seat in seats)
        figures.turns += sum(len(seat.agent.turns) for seat in seats)
        return output

    def episode_reward(completions: list[str], episode_reward: list[float | None], **_: Any) -> list[float | None]:
        return episode_reward

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if between is not None:
                between(state.global_step)
            log.append(TrlSeconds())
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if policy.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            log[-1].step = time.perf_counter() - self.started

    # The trainer ends answers where the generation configuration says so: at the same tokens as rehearsal.
    policy.model.generation_config.eos_token_id = list(policy.renderer.stop_token_ids)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GRPOConfig(
            output_dir=folder, use_cpu=policy.device.type == "cpu", bf16=bf16, gradient_checkpointing=False,
            seed=recipe.seed, max_steps=steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=episodes // batch, num_generations=training.group_size,
            max_completion_length=recipe.agent.max_tokens_per_turn, temperature=recipe.sampling.temperature,
            learning_rate=training.learning_rate, lr_scheduler_type="constant", weight_decay=training.weight_decay,
            adam_beta1=training.beta1, adam_beta2=training.beta2, max_grad_norm=training.max_grad_norm,
            loss_type="dapo", scale_rewards="none", beta=0.0, shuffle_dataset=False, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, log_completions=False,
            dataloader_num_workers=0, dataloader_pin_memory=False,
            use_transformers_continuous_batching=engine == "continuous",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=policy.model, processing_class=policy.tokenizer, reward_funcs=episode_reward, args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}), rollout_func=rollout_func, callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for environment in (*tables.envs, env):
        environment.close()
    return log


def model_copy(folder: Path, device: str = "cpu", dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> Policy:
    """A policy of its own from a folder."""
    from rehearsal.models.load import load_policy

    return load_policy(folder, device=device, dtype=dtype)
