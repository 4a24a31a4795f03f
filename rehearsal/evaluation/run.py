"""Evaluate a policy by name: a run, a model folder, or the base that ships."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.agents.agent import Limits
from rehearsal.agents.feedback import Feedback
from rehearsal.algorithms.curriculum import Staged
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import names
from rehearsal.errors import ModelError, RecipeError
from rehearsal.evaluation.best_of import best_of_figures, verify_episodes
from rehearsal.evaluation.held_out import Evaluation, evaluate
from rehearsal.evaluation.mint import mint_environments, mint_figures, play_mint, user_of
from rehearsal.evaluation.remote import ChatRollout
from rehearsal.evaluation.samples import compare, success_by_task
from rehearsal.generation.remote import RemoteEngine
from rehearsal.models.load import Policy, load_policy
from rehearsal.rollout import Rollout, check_failures
from rehearsal.training.checkpoint import load_checkpoint, restore_weights, standing_checkpoints
from rehearsal.training.playing import answer_protocol, episode_limits, make_rollout, make_toolkit, policy_of
from rehearsal.training.recipe import Recipe, built_in_recipes, resolve_recipe
from rehearsal.training.runs import RunFolder
from rehearsal.training.tasks import TaskSource, variants_of
from rehearsal.usage import Account


def evaluate_policy(
    policy: str | Path, *, recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (), split: str = "test", episodes: int = 256,
    temperature: float = 1.0, samples: int = 1, against: str | Path | None = None, url: str | None = None,
    api_key_env: str | None = None, verifier: str | None = None, verifier_options: Mapping[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Play held-out tasks.

    Args:
        policy: a run folder, a Hugging Face folder, a hub name, or "base".
        recipe: where environment and limits come from; a run folder brings its own.
        overrides: options by dotted name.
        split: of the tasks.
        episodes: how many tasks; all of them where the split has fewer and counts them, see
            :meth:`rehearsal.environments.base.TextEnv.task_count`.
        temperature: of the answers; 0 takes the likeliest token.
        samples: episodes of each task; with several there are pass@k and pass^k too.
        against: another policy that plays the same tasks with the same luck. The figures of the comparison, by
            :func:`rehearsal.evaluation.samples.compare`, begin with ``against/``.
        url: of a server that speaks the OpenAI chat API; ``policy`` is the model's name there.
        api_key_env: environment variable with the server's key. If None, that of OPENAI_API_KEY if it is set, else
            none: a server on one's own machine wants no key.
        verifier: picks the best of several samples, by what it thinks of them alone. The figures of
            :func:`rehearsal.evaluation.best_of.best_of_figures` come with it.
        verifier_options: of the verifier.

    Returns:
        the figures of :class:`rehearsal.evaluation.held_out.Evaluation`, and what judges and sandboxes were asked to do
        for all of it, by the names of :mod:`rehearsal.usage`.

    Raises:
        RehearsalError: with one sentence, for whatever the user can mend.
    """
    if episodes < 1:
        raise RecipeError(f"episodes must be 1 or more, not {episodes}.")
    if samples < 1:
        raise RecipeError(f"samples must be 1 or more, not {samples}.")
    account = Account()
    if url is not None:
        if against is not None:
            raise RecipeError(
                "A policy behind a server cannot be compared here; evaluate both and compare the figures."
            )
        recipe = resolve_recipe(recipe, overrides)
        result = _evaluate_remote(str(policy), recipe, split, episodes, temperature, samples, url, api_key_env)
        return {**result.figures, **_picked(result, verifier, verifier_options), **account.take()}
    recipe, loaded = load_for_evaluation(policy, recipe, overrides)
    source = _tasks_of(recipe, policy)
    if against is None:
        result = _played(recipe, source, loaded, split, episodes, temperature, samples)
        return {**result.figures, **_picked(result, verifier, verifier_options), **account.take()}
    # Both are looked for before either plays.
    _, other = load_for_evaluation(against, recipe, ())
    result = _played(recipe, source, loaded, split, episodes, temperature, samples)
    rival = _played(recipe, source, other, split, episodes, temperature, samples)
    if "success" not in result.figures or "success" not in rival.figures:
        raise RecipeError("The environment tells no success, by which the policies could be compared.")
    found = compare(success_by_task(result.groups), success_by_task(rival.groups))
    figures = {f"against/{name}": float(value) for name, value in vars(found).items()}
    figures |= _picked(result, verifier, verifier_options)
    return {**result.figures, "against/success": rival.figures["success"], **figures, **account.take()}


def evaluate_mint(
    policy: str | Path, *, recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (), split: str = "test", episodes: int = 256, turns: int = 5,
    proposals: int = 2, feedback: str | Feedback | None = "scripted", feedback_model: str | None = None,
    feedback_key_env: str | None = None, temperature: float = 0.0, samples: int = 1, url: str | None = None,
    api_key_env: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """Success after k turns with tools, with and without feedback; see :mod:`rehearsal.evaluation.mint`.

    Args:
        policy, recipe, overrides, split, episodes, samples, url, api_key_env: as for :func:`evaluate_policy`.
        turns: the most turns; tasks are played with 1, 2, ... of them.
        proposals: answers to a task, of which only the last may be right.
        feedback: "scripted", "none", the address of a server that speaks the OpenAI chat API, or a user of your own.
        feedback_model, feedback_key_env: the model there, and the environment variable with the server's key.
        temperature: of the answers; MINT takes the likeliest token.

    Returns:
        the figures of :func:`rehearsal.evaluation.mint.mint_figures`, and what judges, remarks of a model and sandboxes
        were asked to do, by the names of :mod:`rehearsal.usage`.

    Raises:
        RehearsalError: with one sentence, for whatever the user can mend.
    """
    if episodes < 1:
        raise RecipeError(f"episodes must be 1 or more, not {episodes}.")
    if samples < 1:
        raise RecipeError(f"samples must be 1 or more, not {samples}.")
    account = Account()
    user = user_of(feedback, feedback_model, feedback_key_env) if isinstance(feedback, str | None) else feedback
    loaded: Policy | RemoteEngine
    if url is not None:
        recipe = resolve_recipe(recipe, overrides)
        loaded = _remote_engine(str(policy), recipe, url, api_key_env)
    else:
        recipe, loaded = load_for_evaluation(policy, recipe, overrides)
    tasks = _tasks_of(recipe, None if url is not None else policy).held_out(recipe.evaluation.seed, split, episodes)
    with _mint_player(recipe, loaded, turns, proposals, None) as player:
        plain = play_mint(player, tasks, turns, temperature=temperature, samples=samples)
    check_failures([group for groups in plain for group in groups], recipe.training.abort_failed_share)
    assisted = None
    if user is not None:
        with _mint_player(recipe, loaded, turns, proposals, user) as player:
            # With a single turn there is nothing to comment on: those episodes are the same.
            helped = play_mint(player, tasks, turns, first=2, temperature=temperature, samples=samples)
        check_failures([group for groups in helped for group in groups], recipe.training.abort_failed_share)
        assisted = [plain[0], *helped]
    return {**mint_figures(plain, assisted), **account.take()}


@contextlib.contextmanager
def _mint_player(
    recipe: Recipe, policy: Policy | RemoteEngine, turns: int, proposals: int, user: Feedback | None
) -> Iterator[Rollout]:
    makers, limits = mint_environments(recipe, turns, proposals)
    if isinstance(policy, RemoteEngine):
        rollout: Rollout = _chat_rollout(recipe, policy, makers=makers, limits=limits, feedback=user)
    else:
        rollout = make_rollout(recipe, policy, makers=makers, limits=limits, feedback=user)
    try:
        yield rollout
    finally:
        rollout.close()


def _picked(result: Evaluation, verifier: str | None, options: Mapping[str, Any] | None) -> dict[str, float]:
    if verifier is None:
        return {}
    return best_of_figures(result.groups, verify_episodes(result.groups, verifier, options))


def _tasks_of(recipe: Recipe, policy: str | Path | None) -> TaskSource:
    """The tasks of a recipe with the tools of the stage that a run has reached; those of the last stage for a policy
    that is no run."""
    source = TaskSource(recipe)
    if not isinstance(source.sampler, Staged):
        return source
    saved: list[Path] = []
    if policy is not None and (Path(policy) / "run.json").is_file():
        saved = standing_checkpoints(RunFolder.open(policy))
    state = load_checkpoint(saved[-1])[1]["tasks"] if saved else {}
    if "stage" in state:
        source.sampler.load_state_dict(state)
    else:
        source.sampler.stage = source.sampler.stages - 1
    return source


def _played(
    recipe: Recipe, source: TaskSource, policy: Policy, split: str, episodes: int, temperature: float, samples: int
) -> Evaluation:  # fmt: skip
    rollout = make_rollout(recipe, policy)
    try:
        tasks = source.held_out(recipe.evaluation.seed, split, episodes)
        result = evaluate(rollout, tasks, temperature=temperature, samples=samples)
        check_failures(result.groups, recipe.training.abort_failed_share)
        return result
    finally:
        rollout.close()


def load_for_evaluation(
    policy: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    overrides: Mapping[str, Any] | Sequence[str],
    command: str = "eval",
) -> tuple[Recipe, Policy]:
    """A policy by name, and the recipe that it is to be judged by.

    Args:
        policy, recipe, overrides: as for :func:`evaluate_policy`.
        command: of the command line that does the same, for messages.

    Raises:
        RehearsalError: with one sentence, for whatever the user can mend.
    """
    folder = Path(policy)
    if not folder.exists():
        _refuse_other_names(str(policy), command)
    is_run = (folder / "run.json").is_file()
    if recipe is None and is_run:
        recipe = folder / "recipe.toml"
    recipe = resolve_recipe(recipe, overrides)
    trained = folder / "policy"
    run = RunFolder.open(folder) if is_run else None
    # The policy folder is written when a run ends; one that was resumed since, and failed, has newer checkpoints.
    written = run is not None and trained.is_dir() and run.info.status != "running"
    stale = run is not None and run.info.policy_step == -1
    unfinished = standing_checkpoints(run) if run is not None and (stale or not written) else []
    ended = written and not unfinished
    if is_run and not ended and not unfinished:
        raise ModelError(f"{folder} has neither a policy nor a checkpoint yet; let the run get on first.")
    if unfinished:
        # A checkpoint holds what is trained, which may be adapters alone.
        loaded = policy_of(recipe)
        restore_weights(loaded.model, load_checkpoint(unfinished[-1])[0], unfinished[-1])
    else:
        loaded = load_policy(
            trained if ended else policy, device=recipe.model.device, dtype=recipe.model.dtype,
            history=recipe.model.history, template_options=recipe.model.template_options,
        )  # fmt: skip
    return recipe, loaded


def _refuse_other_names(name: str, command: str) -> None:
    """A recipe or an environment in the place of a policy is a slip that no hub needs to be asked about."""
    for what, known, option in (
        ("a recipe", built_in_recipes(), "--recipe"),
        ("an environment", names(), "--environment.name"),
    ):
        if name in known and name != "base":
            raise RecipeError(f"{name} is {what} and no policy; try `rehearsal {command} base {option} {name}`.")


def _evaluate_remote(
    name: str,
    recipe: Recipe,
    split: str,
    episodes: int,
    temperature: float,
    samples: int,
    url: str,
    api_key_env: str | None,
) -> Evaluation:
    engine = _remote_engine(name, recipe, url, api_key_env)
    rollout = _chat_rollout(recipe, engine)
    try:
        tasks = _tasks_of(recipe, None).held_out(recipe.evaluation.seed, split, episodes)
        result = evaluate(rollout, tasks, temperature=temperature, samples=samples)
        check_failures(result.groups, recipe.training.abort_failed_share)
    finally:
        rollout.close()
    tokens = float(engine.stats.tokens_sampled)
    result.figures |= {"server_tokens": tokens, "server_retries": float(engine.stats.retries)}
    return result


def _remote_engine(name: str, recipe: Recipe, url: str, api_key_env: str | None) -> RemoteEngine:
    if api_key_env is None and os.environ.get("OPENAI_API_KEY", "").strip():
        api_key_env = "OPENAI_API_KEY"
    return RemoteEngine(url, name, api_key_env=api_key_env, concurrency=min(32, recipe.engine.max_sessions))


def _chat_rollout(
    recipe: Recipe, engine: RemoteEngine, *, makers: Sequence[Callable[[], TextEnv]] | None = None,
    limits: Sequence[Limits] | None = None, feedback: Feedback | None = None,
) -> ChatRollout:  # fmt: skip
    return ChatRollout(
        [variant.maker for variant in variants_of(recipe)] if makers is None else makers, engine,
        answer_protocol(recipe), episode_limits(recipe) if limits is None else limits,
        seed=recipe.seed, workers=recipe.environment.workers, step_timeout=recipe.environment.step_timeout,
        toolkit=make_toolkit(recipe), feedback=feedback,
    )  # fmt: skip
