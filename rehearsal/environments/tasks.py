"""Tasks with checkable answers, from a file or a data set, as an environment."""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rehearsal.environments.base import SPLITS
from rehearsal.environments.episode import EpisodeEnv, real_number, whole_number
from rehearsal.environments.registry import check_names
from rehearsal.environments.splits import content_split
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.rewards.answers import prompt_key
from rehearsal.rewards.composition import Combination, combination, verify_combined
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.registry import verifier as make_verifier
from rehearsal.rewards.tasks import check_disjoint, load_tasks
from rehearsal.rewards.verifier import Score, Task, Verifier
from rehearsal.usage import merged


class VerifiedTasks(EpisodeEnv):
    """One task of a list, and a verifier that scores the answer.

        rehearsal train --environment.name tasks --environment.params.source gsm8k/ \\
            --environment.params.verifier last-number --environment.params.prompt question \\
            --environment.params.reference answer

    The answer ends the episode; its reward is the value that the verifier gives, and success is whether it passed.
    ``info`` of the step carries ``evidence`` and ``parts``. Where the verifier cannot say (it hung, or the task is
    unusable) the episode has failed and has no reward. Checks run in processes of their own that all environments of
    this process share, with a hard time limit.

    Several verifiers make one score where ``also`` names others, and ``combine`` says how, such as a form that counts
    only with a right answer::

        [environment.params.also.form]
        verifier = "pattern"
        pattern = ".+ = .+"

        [environment.params.combine]
        how = "gate"
        success = "last-number"
        bonus = { form = 0.1 }

    The scores of the single verifiers are then among the ``parts``.

    Without ``splits`` the tasks of the source are dealt out by the content of their prompts, eight of ten to training.
    With it, each split is read from the source's own, and splits that share prompts are refused.

    Args:
        source: see :func:`rehearsal.rewards.tasks.load_tasks`: a file of JSON lines, a folder, or a data set.
        verifier: a name from :func:`rehearsal.rewards.registry.verifiers`, or ``package.module:Class``.
        prompt: name of the field with the prompt, or a template with fields in braces.
        reference: name of the field with the reference; None, or "" in a recipe, for tasks without one.
        options: of the verifier.
        splits: the source's name for "train", "validation" and "test", such as ``{"train": "train", "test": "test"}``;
            a validation split that is not named is taken from the training split, by content.
        told: what an agent is told about all the tasks, once.
        turns: turns of an episode; more than 1 where an agent has tools to use first.
        timeout: seconds that a check may take; verifiers that run in threads keep their own.
        category: name of a field that says what kind of task it is; success is told for each kind apart.
        config: of a Hugging Face data set that has several.
        also: other verifiers by a name of your choice: for each its ``verifier`` and its options. The first one is
            known by the name in ``verifier``.
        combine: ``how`` (see :func:`rehearsal.rewards.composition.combination`) and its options.

    Raises:
        RecipeError: for a parameter out of its range, or splits without a train and a test split.
        RewardError: for a source, field, verifier or option that cannot be used, and for splits that overlap.
    """

    name = "tasks"
    fast = False
    step_seconds = 900.0
    """Checks keep time limits of their own, and wait for one another where many answers come at once."""
    max_turns = 1
    max_actions_per_turn = 1

    def __init__(
        self, source: str, verifier: str, prompt: str = "prompt", reference: str | None = "reference",
        options: Mapping[str, Any] | None = None, splits: Mapping[str, str] | None = None,
        told: str = "Do the task. The action is the answer.", turns: int = 1, timeout: float = 10.0,
        category: str | None = None, config: str | None = None, also: Mapping[str, Mapping[str, Any]] | None = None,
        combine: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(max_steps=1)
        self._category = category
        self.max_turns = whole_number("turns", turns, 1, 1000)
        self.told = told
        self._combine = _combination(verifier, also, combine)
        made_of = {verifier: {**(options or {}), "verifier": verifier}, **(also or {})}
        self._pools = (json.dumps(made_of, sort_keys=True), real_number("timeout", timeout, 0.01, 3600))
        named = None if splits is None else tuple(sorted(splits.items()))
        self._tasks = _split_tasks(source, prompt, reference or None, named, config)
        _verifiers(self._pools[0])  # one that cannot be made is told of at once
        if category is not None:
            _check_category(category, self._tasks)
        self._now = Task("")
        self._score: Score | None = None

    @property
    def instructions(self) -> str:
        """What holds for all tasks; see :attr:`TextEnv.instructions`."""
        return self.told

    def task_count(self, split: str) -> int:
        """Those of the list that belong to the split."""
        return len(self._tasks[split])

    def _draw(self, split: str) -> str:
        tasks = self._tasks[split]
        if not tasks:
            raise EnvironmentFault(
                f"None of the tasks belongs to the {split} split: there are too few, or splits does not name it."
            )
        self._now = self._pick(tasks)
        self._score = None
        return self._now.prompt

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        pool = _pool(*self._pools)
        if self._combine is None:
            (found,) = pool.verify([action], [self._now])
        else:
            (found,) = verify_combined(pool, self._combine, [action], [self._now])
        if not isinstance(found, Score):
            raise EnvironmentFault(f"The answer could not be checked ({found.kind}): {found.message}")
        self._score = found
        return found.value, True, found.passed, True

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        if self._category is not None:
            info["category"] = str(self._now.data[self._category])
        if self._score is None:
            return info
        return {**info, "evidence": self._score.evidence, "parts": dict(self._score.parts)}

    def _observation(self) -> str:
        return self._now.prompt if self._score is None else f"score {self._score.value:g}"

    def _state(self) -> str:
        return self._task if self._score is None else f"{self._task} {self._score.value:g}"

    def oracle(self) -> list[str] | None:
        """The reference where it is a text, which most verifiers take for an answer; nothing once one was given."""
        self._need_reset()
        if self._over:
            return []
        return [self._now.reference] if isinstance(self._now.reference, str) else None

    def describe(self) -> dict[str, Any]:
        """``prompt``, ``reference`` and ``data`` of the task."""
        self._need_reset()
        return {"prompt": self._now.prompt, "reference": self._now.reference, "data": dict(self._now.data)}

    def facts(self) -> dict[str, str]:
        """Those of the verifiers."""
        return merged(getattr(verifier, "facts", dict)() for verifier in _verifiers(self._pools[0]).values())


def _combination(
    verifier: str, also: Mapping[str, Mapping[str, Any]] | None, combine: Mapping[str, Any] | None
) -> Combination | None:
    """How the scores of several verifiers become one; None where there is one verifier."""
    if not also and combine is None:
        return None
    if not also or combine is None:
        raise RecipeError("also names other verifiers, and combine says what to make of their scores: give both.")
    for name, options in also.items():
        if name == verifier or not isinstance(options, Mapping) or not isinstance(options.get("verifier"), str):
            raise RecipeError(
                f"also.{name} must be a table that names its verifier, and be called other than {verifier}."
            )
    if not isinstance(combine, Mapping) or not isinstance(combine.get("how"), str):
        raise RecipeError('combine must be a table with how = "sum", "gate" or "partial" and what that needs.')
    made = combination(combine["how"], {name: value for name, value in combine.items() if name != "how"})
    check_names("verifier (the first one, or in also) called", sorted(made.names), [verifier, *also])
    unused = sorted({verifier, *also} - made.names)
    if unused:
        raise RecipeError(f"combine makes no use of {unused[0]}; give it a weight, which may be 0.")
    return made


def _check_category(field: str, splits: Mapping[str, Sequence[Task]]) -> None:
    """Refuse a field of categories that a task lacks, or that is its prompt or reference."""
    for task in (task for tasks in splits.values() for task in tasks):
        if field not in task.data:
            raise RecipeError(
                f"There is no field {field!r} to take categories from; it is one of "
                f"{', '.join(sorted(task.data)) or 'no fields, for the tasks have prompts and references alone'}."
            )


@lru_cache(maxsize=8)
def _split_tasks(
    source: str, prompt: str, reference: str | None, splits: tuple[tuple[str, str], ...] | None, config: str | None
) -> dict[str, Sequence[Task]]:
    """The tasks of each split; read once for all environments of a run."""
    if splits is None:
        dealt: dict[str, list[Task]] = {split: [] for split in SPLITS}
        for task in load_tasks(source, prompt=prompt, reference=reference, config=config):
            dealt[_split_of(task)].append(task)
        return {split: tuple(tasks) for split, tasks in dealt.items()}
    named = dict(splits)
    check_names("split", named, SPLITS)
    if not {"train", "test"} <= set(named):
        raise RecipeError('splits must name the source\'s split for "train" and for "test".')
    found = {
        split: load_tasks(source, prompt=prompt, reference=reference, split=theirs, config=config)
        for split, theirs in named.items()
    }
    check_disjoint(found)
    if "validation" not in found:
        # A tenth of the training split, by content, as everywhere.
        found["validation"] = [task for task in found["train"] if _split_of(task) == "validation"]
        found["train"] = [task for task in found["train"] if _split_of(task) != "validation"]
    return {split: tuple(found[split]) for split in SPLITS}


def _split_of(task: Task) -> str:
    """Prompts that check_disjoint takes for the same fall into one split."""
    return content_split(prompt_key(task.prompt))


@lru_cache(maxsize=8)
def _verifiers(made_of: str) -> dict[str, Verifier]:
    """By name, made once for all environments of this process: some load a model."""
    verifiers = {}
    for name, settings in json.loads(made_of).items():
        options = {option: value for option, value in settings.items() if option != "verifier"}
        verifiers[name] = make_verifier(settings["verifier"], **options)
    return verifiers


_LOCK = threading.Lock()
_POOLS: dict[tuple[str, float], VerifierPool] = {}


def _pool(made_of: str, timeout: float) -> VerifierPool:
    """The pool of some verifiers: one for all environments of this process, which step in many threads."""
    with _LOCK:
        key = (made_of, timeout)
        if key not in _POOLS:
            made = _verifiers(made_of)
            _POOLS[key] = VerifierPool(next(iter(made.values())) if len(made) == 1 else made, timeout=timeout)
        return _POOLS[key]


def close_pools() -> None:
    """End the processes of all verifiers, which outlive the environments; the next check starts new ones. What waits
    for a check fails. It is called when this process ends.
    """
    with _LOCK:
        pools = [_POOLS.popitem() for _ in range(len(_POOLS))]
    for (made_of, _), pool in pools:
        # The pool before what its verifiers hold, such as a sandbox.
        pool.close(now=True)
        for verifier in _verifiers(made_of).values():
            getattr(verifier, "close", lambda: None)()


atexit.register(close_pools)
