"""What a run does, as a typed recipe: a short TOML file, with any option overridden by its dotted name."""

from __future__ import annotations

import contextlib
import copy
import datetime
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from rehearsal.algorithms.reward_parts import RewardShaping
from rehearsal.errors import RecipeError
from rehearsal.training.options import (
    AdapterOptions,
    AgentOptions,
    AlgorithmOptions,
    CheckpointOptions,
    CurriculumOptions,
    DiagnosticsOptions,
    EngineOptions,
    EnvironmentOptions,
    EvaluationOptions,
    FilterOptions,
    MixtureOptions,
    ModelOptions,
    Options,
    RewardOptions,
    SamplingOptions,
    ToolOptions,
    TrainingOptions,
    WorldOptions,
)

_CURRICULA: dict[str, tuple[str, ...]] = {
    "tasks": ("uniform", "difficulty", "variance", "progress"), "low": ("difficulty",), "high": ("difficulty",),
    "retry": ("difficulty",), "explore": ("variance", "progress"),
}  # fmt: skip
"""The options of a curriculum that only some of them read, with those that do. Those of stages are not here, so that a
recipe that comes with stages is played without them by emptying ``curriculum.stages``, and no more."""


class Recipe(Options):
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
    rewards: RewardOptions = RewardOptions()
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
        if self.sampling.truncated and self.training.old_logprobs == "sampling":
            # The learner's log-probs are over the whole vocabulary; those of sampling would be over a part of it.
            raise ValueError(
                "with top_p or top_k the log-probs of sampling are over a part of the vocabulary, and ratios to them "
                "are biased; set training.old_logprobs to recompute, or sample without truncation"
            )
        if self.diagnostics.go_back_on and self.checkpoint.every == 0:
            raise ValueError(
                "diagnostics.go_back_on goes back to a checkpoint, and with checkpoint.every = 0 there is none before "
                "the end: set it above 0, or name the verdicts in diagnostics.stop_on"
            )
        if self.agent.rehearse and not self.agent.thinking:
            raise ValueError("agent.rehearse needs a thought to do it in: set agent.thinking to true")
        self._world_is_used()
        self._curriculum_is_used()
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
        try:
            RewardShaping(**self.rewards.model_dump())
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if self.training.minibatches > self.training.groups * self.training.group_size:
            raise ValueError("training.minibatches must not exceed the episodes of a step")
        return self

    def _world_is_used(self) -> None:
        """Refuse options of the world model that would do nothing."""
        world, usual, rehearses = self.world, WorldOptions(), self.agent.rehearse
        changed = {name for name in WorldOptions.model_fields if getattr(world, name) != getattr(usual, name)}
        learns = world.mode != "policy_only"
        if "replay" in changed and not (rehearses and learns):
            raise ValueError(
                "world.replay replays what was rehearsed: set agent.rehearse, and a world.mode that learns"
            )
        if "updates" in changed and (world.mode in ("policy_only", "shared") or not rehearses):
            raise ValueError(
                "world.updates above 1 learns from what was rehearsed, in its own adapter: set agent.rehearse, and "
                "world.mode to dual"
            )
        if "hold" in changed and world.updates == 1:
            raise ValueError(
                "world.hold is about the updates after the first: set world.updates above 1, or leave it out"
            )
        for name in ("horizon", "hindsight"):
            if name in changed and not (rehearses and learns):
                raise ValueError(
                    f"world.{name} is about learning what was rehearsed: set agent.rehearse, and a world.mode that "
                    "learns, or leave it out"
                )
        if "replay_size" in changed and not world.replay:
            raise ValueError(
                "world.replay_size is the size of a memory that nothing is replayed from: set world.replay above 0, or "
                "leave it out"
            )
        for name in ("coefficient", "foreseeable"):
            if name in changed and not learns:
                raise ValueError(
                    f"world.{name} is about learning from answers: set a world.mode that learns, or leave it out"
                )
        own = world.mode in ("dual", "inactive", "placebo") or (
            world.mode == "world_only" and bool(self.adapters.world_rank or self.adapters.world_folder)
        )
        if "learning_rate_ratio" in changed and not own:
            raise ValueError(
                f"world.learning_rate_ratio is the rate of a world adapter, and world.mode {world.mode} trains none "
                "here: set world.mode to dual, or leave it out"
            )

    def _curriculum_is_used(self) -> None:
        """Refuse options of the curriculum that would do nothing."""
        own, usual = self.curriculum, CurriculumOptions()
        for name, readers in _CURRICULA.items():
            if own.name not in readers and getattr(own, name) != getattr(usual, name):
                *others, last = readers
                known = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(
                    f"curriculum.{name} does nothing where curriculum.name is {own.name}: set curriculum.name to "
                    f"{known}, or leave it out"
                )

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
    """The value of an option from the command line: TOML where it is valid TOML, a JSON object, or else text.

    ``none`` is None, and what TOML would take for a date stays text.
    """
    with contextlib.suppress(tomllib.TOMLDecodeError):
        values = tomllib.loads(f"value = {text}")
        if len(values) == 1 and not isinstance(values["value"], datetime.date | datetime.time):
            return values["value"]
    if text.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
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
