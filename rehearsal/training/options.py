"""The options of a recipe, table by table, each with its type, its default and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Options(BaseModel):
    # Strict: a number in quotes or "true" for a number is a mistake, not something to be interpreted.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, protected_namespaces=()
    )


def _with_nothing(value: Any) -> Any:
    """A free-form option with None for "none", as TOML has no word for it; recipes are written the same way."""
    if isinstance(value, Mapping):
        return {key: _with_nothing(entry) for key, entry in value.items()}
    return None if value == "none" else value


FreeOptions = Annotated[dict[str, Any], BeforeValidator(_with_nothing)]
"""Options that somebody else knows the names and types of."""


class ModelOptions(Options):
    """The policy."""

    path: str = Field(
        default="base", description='"base" for the model that ships, or a Hugging Face folder or hub name'
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1", "mps"')
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the weights; auto is float32 on a processor, bfloat16 on a GPU (updates are in float32 always)",
    )
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice to keep fewer of them")
    history: Literal["preserve", "refuse"] = Field(
        default="preserve", description="what to do with a chat template that rewrites earlier answers"
    )
    template_options: FreeOptions = Field(default_factory=dict, description="variables for the chat template")


class EnvironmentOptions(Options):
    """What the agent lives in."""

    name: str = Field(default="frozenlake", description="a built-in name, or package.module:Class of your own")
    params: FreeOptions = Field(default_factory=dict, description="arguments of the environment")
    workers: int = Field(default=16, ge=1, description="threads that step environments which are not fast")
    step_timeout: float = Field(default=60.0, gt=0, description="seconds that a reset or a step may take")


class MixtureOptions(Options):
    """One of several environments that are trained in side by side."""

    name: str = Field(description="a built-in name, or package.module:Class of your own")
    params: FreeOptions = Field(default_factory=dict, description="arguments of the environment")
    weight: float = Field(default=1.0, gt=0, description="share of the tasks, relative to the others")


class CurriculumOptions(Options):
    """Which tasks are played."""

    name: Literal["fresh", "uniform", "difficulty", "variance", "progress", "staged"] = Field(
        default="fresh", description="fresh draws tasks that nobody has met; the others are explained in the docs"
    )
    tasks: int = Field(default=512, ge=1, description="size of the pool that tasks are drawn from, again and again")
    low: float = Field(default=0.2, ge=0, le=1, description="difficulty: lower end of the band of success")
    high: float = Field(default=0.8, ge=0, le=1, description="difficulty: upper end of the band of success")
    retry: float = Field(default=0.1, ge=0, le=1, description="difficulty: share of tasks from outside the band")
    explore: float = Field(default=0.1, ge=0, le=1, description="variance, progress: share that is spread evenly")
    stages: list[dict[str, Any]] = Field(
        default_factory=list,
        description="staged: parameters of the environment, limits below agent, and tools that are unlocked",
    )  # fmt: skip
    threshold: float = Field(default=0.8, ge=0, le=1, description="staged: success that ends a stage")
    window: int = Field(default=64, ge=1, description="staged: groups that this success is measured over")
    review: float = Field(default=0.1, ge=0, le=1, description="staged: share of tasks from earlier stages")
    patience: int | None = Field(
        default=None, ge=1,
        description="staged: groups without a rise of success after which a stage begins that unlocks tools",
    )  # fmt: skip


class AgentOptions(Options):
    """What the agent may do in an episode."""

    thinking: bool = Field(default=True, description="whether a thought comes before the answer")
    rehearse: bool = Field(
        default=False, description="whether the thought foretells what the environment will answer to actions"
    )
    max_turns: int | None = Field(
        default=None, ge=1, description="turns of an episode; the environment's own and tools.max_calls if left out"
    )
    max_actions_per_turn: int | None = Field(
        default=None, ge=1, description="actions in one answer; the environment's own"
    )
    max_actions: int | None = Field(
        default=None, ge=1, description="actions of an episode; turns x actions if left out"
    )
    max_tokens_per_turn: int = Field(default=64, ge=1, description="sampled tokens of one answer")
    max_context: int = Field(default=1024, ge=16, description="tokens of an episode, prompt included")
    format_penalty: float = Field(
        default=-0.1, le=0, description="added to a turn whose answer is unreadable or illegal"
    )


class ToolOptions(Options):
    """What the agent may call beside its actions, and what that costs."""

    names: list[str] = Field(
        default_factory=list, description="of tools that come along, or package.module:function of your own"
    )
    options: FreeOptions = Field(
        default_factory=dict, description="of the tools, by name, such as tools.options.search.corpus"
    )
    max_calls: int | None = Field(default=None, ge=1, description="calls of an episode; any number if left out")
    max_calls_per_turn: int = Field(default=4, ge=1, description="calls in one answer that count")
    per_tool: dict[str, int] = Field(default_factory=dict, description="calls of an episode, by the name of a tool")
    cost: float = Field(default=0.0, ge=0, description="what a call takes off the reward")
    timeout: float = Field(default=10.0, gt=0, description="seconds that a call may take")
    max_characters: int = Field(default=2000, ge=1, description="of a result that the agent is shown")


class SamplingOptions(Options):
    """The distribution that episodes are sampled from."""

    temperature: float = Field(default=1.0, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="smallest set of tokens with this probability")
    top_k: int = Field(default=0, ge=0, description="the k likeliest tokens; 0 for all")

    @property
    def truncated(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0


class RewardOptions(Options):
    """What training adds to the rewards of the environment."""

    length: Literal["none", "kimi", "cosine"] = Field(
        default="none", description="reward for length, by success: shorter right answers, or a cosine of the length"
    )
    length_weight: float = Field(default=1.0, description="of the reward for length")
    length_tokens: int | None = Field(
        default=None, ge=1, description="sampled tokens of an episode at which the cosine ends"
    )
    repetition: float = Field(default=0.0, ge=0, description="what an answer costs that is nothing but repetition")
    repetition_ngram: int = Field(default=3, ge=1, description="tokens that are looked for again")
    violation: float = Field(default=0.0, ge=0, description='what a turn costs that has info["violations"]')
    obligation: float = Field(default=0.0, ge=0, description='what each of info["obligations"] earns, once an episode')
    gated: bool = Field(default=True, description="whether obligations count only in episodes that succeed")
    call: float = Field(default=0.0, ge=0, description="what the first tool call of an episode with a result earns")


class AlgorithmOptions(Options):
    """How rewards become an update."""

    name: str = Field(
        default="grpo", description="ppo, grpo, dr_grpo, rloo, reinforce_pp, dapo, gspo, cispo, sapo or vespo"
    )
    options: FreeOptions = Field(default_factory=dict, description="changes to the preset, such as clip_high")


class FilterOptions(Options):
    """Which groups the policy learns from."""

    name: str = Field(default="none", description="none, constant, top_k, top_p, min_p, random or extremes")
    options: FreeOptions = Field(
        default_factory=dict, description="of the filter: k, p, mass, include_constant, top, bottom, like"
    )
    loss_scaling: Literal["none", "share", "sqrt"] = Field(
        default="none", description="multiply advantages by the share of the episodes that is kept, or by its root"
    )


class TrainingOptions(Options):
    """Steps, batches and the optimiser."""

    steps: int = Field(default=60, ge=1, description="optimiser steps, each after fresh episodes")
    groups: int = Field(default=32, ge=1, description="tasks of a step")
    group_size: int = Field(default=8, ge=1, description="episodes of each task")
    learning_rate: float = Field(default=1e-6, gt=0, description="at its peak")
    critic_learning_rate: float = Field(default=1e-5, gt=0, description="of the critic, for algorithms that have one")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="after the warm-up")
    final_learning_rate: float = Field(
        default=0.0, ge=0, le=1, description="share of the peak that the schedule ends at"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    epochs: int = Field(default=1, ge=1, description="passes over the episodes of a step")
    minibatches: int = Field(default=1, ge=1, description="optimiser updates of each pass")
    pack_tokens: int = Field(default=4096, ge=16, description="tokens of one forward and backward pass")
    share_prefixes: bool = Field(default=True, description="read a prompt that a group shares once")
    old_logprobs: Literal["sampling", "recompute"] = Field(
        default="sampling",
        description="what ratios are taken to: the log-probs of sampling, or computed again by the learner",
    )
    autocast: bool = Field(default=False, description="bfloat16 matrix products with float32 weights")
    abort_failed_share: float = Field(
        default=0.5, gt=0, le=1, description="a step in which more than this share of episodes failed ends the run"
    )


class AdapterOptions(Options):
    """Low-rank adapters; without them the whole model is trained."""

    policy_rank: int | None = Field(
        default=None, ge=0,
        description="rank of the policy's adapter, 0 for none; if left out, 32 where world.mode needs one, else 0",
    )  # fmt: skip
    world_rank: int | None = Field(
        default=None, ge=0,
        description="rank of the world model's adapter, 0 for none; if left out, 32 where world.mode needs one, else 0",
    )  # fmt: skip
    alpha: int = Field(default=32, ge=1, description="an adapter's output is scaled by alpha / rank")
    rank_stabilised: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    targets: str | list[str] = Field(
        default="all-linear", description='"all-linear", or the last parts of module names such as ["q_proj"]'
    )
    policy_folder: str | None = Field(default=None, description="PEFT folder that the policy's adapter starts from")
    world_folder: str | None = Field(default=None, description="PEFT folder that the world adapter starts from")


class WorldOptions(Options):
    """Learning from what the environment answers."""

    mode: Literal["policy_only", "shared", "dual", "inactive", "placebo", "world_only"] = Field(
        default="policy_only", description="who learns from the answers; explained in the docs"
    )
    coefficient: float | None = Field(
        default=None, ge=0, description="weight of the observation loss; if left out, 0.05 where shared, else 1"
    )
    foreseeable: bool = Field(
        default=True, description="whether answers are learnt too that follow from what the agent had been shown"
    )
    learning_rate_ratio: float = Field(
        default=1.0, gt=0, description="learning rate of the world adapter over that of the policy"
    )
    hindsight: float = Field(
        default=1.0, ge=0, description="weight of the true answers to what was rehearsed, with agent.rehearse"
    )
    horizon: int = Field(
        default=0, ge=0,
        description="turns after a rehearsal in which its action may be taken for the answer to count",
    )  # fmt: skip
    updates: int = Field(
        default=1, ge=1,
        description="updates of the world adapter in a step; those after the first learn from what was rehearsed, at a "
        "learning rate that falls to nothing",
    )  # fmt: skip
    hold: float = Field(
        default=10.0,
        ge=0,
        description="in those updates, weight that keeps the agent's own words as likely as they were",
    )
    replay: int = Field(
        default=0, ge=0, description="past situations that are learnt again in every update, with agent.rehearse"
    )
    replay_size: int = Field(default=2048, ge=1, description="situations that are kept for that")


class EvaluationOptions(Options):
    """Held-out play."""

    episodes: int = Field(default=256, ge=0, description="held-out tasks before and after training; 0 for none")
    every: int = Field(default=10, ge=0, description="steps between evaluations on the validation split; 0 for none")
    validation_episodes: int = Field(default=128, ge=1, description="tasks of those")
    temperature: float = Field(default=1.0, ge=0, description="of evaluation episodes")
    seed: int = Field(default=123, ge=0, description="of the held-out tasks")


class DiagnosticsOptions(Options):
    """Is the signal real? What is measured on the way, and what happens when something is wrong."""

    every: int = Field(default=4, ge=0, description="steps between measurements of prompt-thought information; 0: none")
    prompts: int = Field(default=32, ge=2, description="prompts that thoughts are scored under, at most")
    max_share: float = Field(
        default=0.1, gt=0, le=1, description="the most of a step's passes that such a measurement may cost"
    )
    gradients_every: int = Field(
        default=10, ge=0, description="steps between looks at gradients of single groups; 0 for none"
    )
    gradient_groups: int = Field(
        default=2, ge=1, description="groups of each quartile of reward variance in such a look"
    )
    probes: int = Field(
        default=0, ge=0,
        description="episodes in which gaps are made at each evaluation, to see what the policy knows of the world",
    )  # fmt: skip
    prediction_loss: bool = Field(
        default=False,
        description="whether evaluations tell how well answers are foretold where nobody learns them (policy_only) too",
    )
    stop_on: list[str] = Field(default_factory=list, description="verdicts that end the run")
    go_back_on: list[str] = Field(
        default_factory=list, description="verdicts that end the run with the last checkpoint from before they began"
    )


class EngineOptions(Options):
    """Generation."""

    max_sessions: int = Field(default=256, ge=1, description="episodes that are played at the same time")
    memory_gib: float | None = Field(
        default=None, gt=0, description="for keys and values; a quarter of free memory if left out"
    )
    prefill_tokens: int = Field(default=4096, ge=16, description="tokens of new text in one forward pass")
    processes: int | None = Field(
        default=None, ge=1,
        description="processes that play; if left out, one for each core in a longer run of a small model, else one",
    )  # fmt: skip


class CheckpointOptions(Options):
    """What survives a power cut."""

    every: int = Field(default=10, ge=0, description="steps between checkpoints; 0 for the last step alone")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")
