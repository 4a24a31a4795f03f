"""What a run does, as a typed recipe: a short TOML file, with any option overridden by its dotted name."""

from __future__ import annotations

import contextlib
import copy
import datetime
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from rehearsal.errors import RecipeError


class _Options(BaseModel):
    # Strict: a number in quotes or "true" for a number is a mistake, not something to be interpreted.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, protected_namespaces=()
    )


def _with_nothing(value: Any) -> Any:
    """A free-form option with None for "none", as TOML has no word for it; see :func:`_without_none`."""
    if isinstance(value, Mapping):
        return {key: _with_nothing(entry) for key, entry in value.items()}
    return None if value == "none" else value


FreeOptions = Annotated[dict[str, Any], BeforeValidator(_with_nothing)]
"""Options that somebody else knows the names and types of."""


class ModelOptions(_Options):
    """The policy."""

    path: str = Field(
        default="base", description='"base" for the model that ships, or a Hugging Face folder or hub name'
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1", "mps"')
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; auto is float32 on a processor, bfloat16 on a GPU"
    )
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice to keep fewer of them")
    history: Literal["preserve", "refuse"] = Field(
        default="preserve", description="what to do with a chat template that rewrites earlier answers"
    )
    template_options: FreeOptions = Field(default_factory=dict, description="variables for the chat template")


class EnvironmentOptions(_Options):
    """What the agent lives in."""

    name: str = Field(default="frozenlake", description="a built-in name, or package.module:Class of your own")
    params: FreeOptions = Field(default_factory=dict, description="arguments of the environment")
    workers: int = Field(default=16, ge=1, description="threads that step environments which are not fast")
    step_timeout: float = Field(default=60.0, gt=0, description="seconds that a reset or a step may take")


class MixtureOptions(_Options):
    """One of several environments that are trained in side by side."""

    name: str = Field(description="a built-in name, or package.module:Class of your own")
    params: FreeOptions = Field(default_factory=dict, description="arguments of the environment")
    weight: float = Field(default=1.0, gt=0, description="share of the tasks, relative to the others")


class CurriculumOptions(_Options):
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


class AgentOptions(_Options):
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


class ToolOptions(_Options):
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


class SamplingOptions(_Options):
    """The distribution that episodes are sampled from."""

    temperature: float = Field(default=1.0, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="smallest set of tokens with this probability")
    top_k: int = Field(default=0, ge=0, description="the k likeliest tokens; 0 for all")


class AlgorithmOptions(_Options):
    """How rewards become an update."""

    name: str = Field(default="grpo", description="ppo, grpo, dr_grpo, rloo, reinforce_pp, dapo, gspo or cispo")
    options: FreeOptions = Field(default_factory=dict, description="changes to the preset, such as clip_high")


class FilterOptions(_Options):
    """Which groups the policy learns from."""

    name: str = Field(default="none", description="none, constant, top_k, top_p, min_p, random or extremes")
    options: FreeOptions = Field(
        default_factory=dict, description="of the filter: k, p, mass, include_constant, top, bottom, like"
    )
    loss_scaling: Literal["none", "share", "sqrt"] = Field(
        default="none", description="multiply advantages by the kept share of the groups, or by its root"
    )


class TrainingOptions(_Options):
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


class AdapterOptions(_Options):
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


class WorldOptions(_Options):
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
        description="updates of the world adapter in a step; those after the first learn from what was rehearsed alone",
    )  # fmt: skip
    replay: int = Field(
        default=0, ge=0, description="past situations that are learnt again in every step, with agent.rehearse"
    )
    replay_size: int = Field(default=2048, ge=1, description="situations that are kept for that")


class EvaluationOptions(_Options):
    """Held-out play."""

    episodes: int = Field(default=256, ge=0, description="held-out tasks before and after training; 0 for none")
    every: int = Field(default=10, ge=0, description="steps between evaluations on the validation split; 0 for none")
    validation_episodes: int = Field(default=128, ge=1, description="tasks of those")
    temperature: float = Field(default=1.0, ge=0, description="of evaluation episodes")
    seed: int = Field(default=123, ge=0, description="of the held-out tasks")


class DiagnosticsOptions(_Options):
    """Is the signal real? What is measured on the way, and what happens when something is wrong."""

    every: int = Field(default=4, ge=0, description="steps between measurements of prompt-thought information; 0: none")
    prompts: int = Field(default=32, ge=2, description="prompts that thoughts are scored under, at most")
    max_share: float = Field(
        default=0.1, gt=0, le=1, description="the most of a step's learning that such a measurement may cost"
    )
    gradients_every: int = Field(
        default=20, ge=0, description="steps between looks at gradients of single groups; 0 for none"
    )
    gradient_groups: int = Field(
        default=2, ge=1, description="groups of each quartile of reward variance in such a look"
    )
    probes: int = Field(
        default=0, ge=0,
        description="episodes in which gaps are made at each evaluation, to see what the policy knows of the world",
    )  # fmt: skip
    stop_on: list[str] = Field(default_factory=list, description="verdicts that end the run")
    go_back_on: list[str] = Field(
        default_factory=list, description="verdicts that end the run with the last checkpoint from before they began"
    )


class EngineOptions(_Options):
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


class CheckpointOptions(_Options):
    """What survives a power cut."""

    every: int = Field(default=10, ge=0, description="steps between checkpoints; 0 for the last step alone")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")


class Recipe(_Options):
    """Everything about a run."""

    name: str = Field(default="run", description="of the run; its folder is runs/NAME unless --output says otherwise")
    seed: int = Field(default=0, ge=0, description="fixes tasks, sampling and updates")
    model: ModelOptions = ModelOptions()
    environment: EnvironmentOptions = EnvironmentOptions()
    mixture: list[MixtureOptions] = Field(
        default_factory=list, description="environments to train in side by side, in place of the one above"
    )
    curriculum: CurriculumOptions = CurriculumOptions()
    agent: AgentOptions = AgentOptions()
    tools: ToolOptions = ToolOptions()
    sampling: SamplingOptions = SamplingOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    filter: FilterOptions = FilterOptions()
    training: TrainingOptions = TrainingOptions()
    adapters: AdapterOptions = AdapterOptions()
    world: WorldOptions = WorldOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    diagnostics: DiagnosticsOptions = DiagnosticsOptions()
    engine: EngineOptions = EngineOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    trackers: list[str] = Field(default_factory=list, description="tensorboard, wandb, trackio")
    save_trajectories_every: int = Field(
        default=1, ge=0, description="steps between saved training episodes; 0 for none"
    )

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        known = ("tensorboard", "wandb", "trackio")
        for tracker in value:
            if tracker not in known:
                raise ValueError(f"no tracker {tracker!r}; there are {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        truncated = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if truncated and self.training.old_logprobs == "sampling":
            # The learner's log-probs are over the whole vocabulary; those of sampling would be over a part of it.
            raise ValueError(
                "with top_p or top_k the log-probs of sampling are over a part of the vocabulary, and ratios to them "
                "are biased; set training.old_logprobs to recompute, or sample without truncation"
            )
        if self.agent.rehearse and not self.agent.thinking:
            raise ValueError("agent.rehearse needs a thought to do it in: set agent.thinking to true")
        if self.world.replay and not (self.agent.rehearse and self.world.mode != "policy_only"):
            raise ValueError(
                "world.replay replays what was rehearsed: set agent.rehearse, and a world.mode that learns"
            )
        if self.world.updates > 1 and (self.world.mode in ("policy_only", "shared") or not self.agent.rehearse):
            raise ValueError(
                "world.updates above 1 learns from what was rehearsed, in its own adapter: set agent.rehearse, and "
                "world.mode to dual"
            )
        apart = self.world.mode in ("dual", "inactive", "placebo")
        if apart and self.adapters.world_rank == 0 and self.adapters.world_folder is None:
            raise ValueError(
                f"world.mode {self.world.mode} needs an adapter for the world model: set adapters.world_rank above 0, "
                "or world.mode to shared"
            )
        if apart and self.adapters.policy_rank == 0 and self.adapters.policy_folder is None:
            raise ValueError(
                f"world.mode {self.world.mode} needs an adapter for the policy: set adapters.policy_rank above 0, or "
                "world.mode to world_only"
            )
        if (self.curriculum.name == "staged") != bool(self.curriculum.stages):
            raise ValueError(
                "a staged curriculum needs curriculum.stages, a list of tables with the parameters of each stage, and "
                "no other curriculum has them"
            )
        for number, stage in enumerate(self.curriculum.stages, start=1):
            unlocked = stage.get("tools", [])
            if not isinstance(unlocked, list) or not all(isinstance(name, str) for name in unlocked):
                raise ValueError(f"tools in stage {number} must be a list of names, not {unlocked!r}")
        if self.curriculum.patience is not None and not any(stage.get("tools") for stage in self.curriculum.stages[1:]):
            raise ValueError(
                "curriculum.patience ends a stage whose tasks are too hard without a tool: name tools in a later stage"
            )
        for name, options in self.tools.options.items():
            if name not in self.tools.names:
                raise ValueError(f"tools.options.{name} is for a tool that tools.names does not name")
            if not isinstance(options, dict):
                raise ValueError(f"tools.options.{name} must be a table of options, not {options!r}")
        for name, count in self.tools.per_tool.items():
            if count < 1:
                raise ValueError(f"tools.per_tool.{name} must be 1 or more, not {count}")
        if len(set(self.tools.names)) < len(self.tools.names):
            raise ValueError("tools.names has a name twice")
        if self.mixture and self.curriculum.name == "staged":
            raise ValueError("a mixture has no stages: leave out either mixture or curriculum.stages")
        if self.sampling.temperature == 0:
            raise ValueError("training needs sampling.temperature above 0: episodes of a group must differ")
        if self.agent.max_tokens_per_turn >= self.agent.max_context:
            raise ValueError("agent.max_context must be larger than agent.max_tokens_per_turn")
        if self.training.minibatches > self.training.groups * self.training.group_size:
            raise ValueError("training.minibatches must not exceed the episodes of a step")
        return self

    def to_toml(self) -> str:
        """The resolved recipe as TOML, which :func:`resolve_recipe` reads back as the same recipe."""
        return tomli_w.dumps(_without_none(self.model_dump(), option_names()))


def _without_none(values: dict[str, Any], known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without the options that are None. Left out, an option of ours is None again; one of somebody else (a preset's
    clip, an environment's parameter) would be what it is by default, so there None is written as "none"."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            kept[name] = _without_none(value, known, f"{prefix}{name}.")
        elif value is not None:
            kept[name] = value
        elif prefix + name not in known:
            kept[name] = "none"
    return kept


def built_in_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("rehearsal") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(source: Recipe | str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The contents of a recipe: the name of a built-in one, a TOML file, a dictionary, or nothing for the defaults."""
    if source is None:
        return {}
    if isinstance(source, Recipe):
        return source.model_dump()
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = Path(source)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RecipeError(f"There is no recipe {path}; `rehearsal recipes` lists those that come along.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    elif str(source) in built_in_recipes():
        text = (resources.files("rehearsal") / "recipes" / f"{source}.toml").read_text(encoding="utf-8")
    else:
        close = difflib.get_close_matches(str(source), built_in_recipes(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RecipeError(f"There is no recipe {source}; there are {', '.join(built_in_recipes())}.{hint}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {source} is not valid TOML: {error}.") from error


def option_names(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name, with its pydantic field."""
    names: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names |= option_names(info.annotation, f"{prefix}{name}.")
        else:
            names[prefix + name] = info
    return names


def parse_value(text: str) -> Any:
    """The value of an option from the command line: TOML where it is valid TOML, else text.

    ``none`` is None, and what TOML would take for a date stays text.
    """
    with contextlib.suppress(tomllib.TOMLDecodeError):
        values = tomllib.loads(f"value = {text}")
        if len(values) == 1 and not isinstance(values["value"], datetime.date | datetime.time):
            return values["value"]
    return {"none": None, "True": True, "False": False}.get(text, text)


def resolve_recipe(
    source: Recipe | str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Recipe:
    """A recipe with some options changed.

    Args:
        source: see :func:`read_recipe`.
        overrides: values by dotted name (``{"training.steps": 10}``), or a list of ``name=value`` texts.

    Raises:
        RecipeError: with one sentence that names the option.
    """
    values = read_recipe(source)
    if not isinstance(overrides, Mapping):
        pairs = [override.partition("=") for override in overrides]
        overrides = {name: parse_value(text) for name, _, text in pairs}
    known = option_names()
    for name, value in overrides.items():
        # A dictionary option takes keys of the user's own: environment.params.size
        parent = name.rpartition(".")[0]
        while parent and parent not in known:
            parent = parent.rpartition(".")[0]
        if name not in known and not parent:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            leaves = [option for option in known if option.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = f" Did you mean {(leaves or close)[0]}?" if leaves or close else ""
            raise RecipeError(f"There is no option {name}.{hint}")
        target = values
        *path, last = name.split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise RecipeError(f"{name} cannot be set: {part} is {target!r} in the recipe, which holds no options.")
        target[last] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_sentence(error, known)) from error


def _sentence(error: ValidationError, known: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        groups = {option.partition(".")[0] for option in known if "." in option}
        close = difflib.get_close_matches(name, [*known, *groups], n=1, cutoff=0.5)
        return f"There is no option {name}." + (f" Did you mean {close[0]}?" if close else "")
    if first["type"] == "model_type":
        return f"{name} is a table of options and cannot be {first['input']!r}; write them below [{name}]."
    if not name:
        # The name of an option stays as it is written.
        named = "." in message.partition(" ")[0]
        return f"{message}." if named else f"{message[0].upper()}{message[1:]}."
    return f"Option {name} cannot be {first['input']!r}: {message[0].lower()}{message[1:]}."
