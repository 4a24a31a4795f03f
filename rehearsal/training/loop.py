"""The training loop: play, learn, look, keep.

:class:`Trainer` puts the rooms together; :meth:`Trainer.run` is the lap of the design, once for each step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rehearsal.algorithms.filters import at_most, loss_scale, within_families
from rehearsal.algorithms.reward_parts import RewardShaping
from rehearsal.diagnostics import Verdict
from rehearsal.errors import CheckpointError, TrainingDiverged
from rehearsal.evaluation.held_out import Evaluation, evaluate
from rehearsal.evaluation.probe import Prober
from rehearsal.models.adapters import adapter_names, save_adapters
from rehearsal.models.load import Policy, save_policy
from rehearsal.rollout import Player, check_failures, rollout_metrics
from rehearsal.training.batch import Batch, by_environment, kept_figures, learned_from
from rehearsal.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_after,
    remove_partial,
    restore_weights,
    save_checkpoint,
    standing_checkpoints,
    state_errors,
    step_of,
    tensor_errors,
    trainable_weights,
)
from rehearsal.training.choices import chosen
from rehearsal.training.first_look import cut_off_warning, first_look
from rehearsal.training.learner import Learner, keeps_start
from rehearsal.training.monitor import Monitor
from rehearsal.training.observer import Observer, SilentObserver
from rehearsal.training.playing import (
    make_processes,
    make_rollout,
    policy_of,
    processes_for,
    with_adapters,
    with_memory,
)
from rehearsal.training.recipe import Recipe
from rehearsal.training.replay import Memory
from rehearsal.training.runs import RunFolder
from rehearsal.training.storage import flush_tree, storage_errors
from rehearsal.training.tasks import TaskSource
from rehearsal.training.trackers import Tracker, make_trackers
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.training.world import world_of
from rehearsal.trajectory import Group, all_trajectories, rewards_matrix
from rehearsal.usage import Account, added


@dataclass
class Trainer:
    """One run.

    Attributes:
        recipe: what to do.
        folder: where it is written; None writes nothing (tests, experiments).
        observer: who watches.
        policy: loaded from the recipe if not given. One that is given gets the adapters of the recipe if it has none,
            and those are put to work that world.mode plays and learns with.
    """

    recipe: Recipe
    folder: RunFolder | None = None
    observer: Observer = field(default_factory=SilentObserver)
    policy: Policy | None = None
    steps_done: int = 0
    stop_requested: bool = False
    evaluations: list[tuple[int, str, dict[str, float]]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.algorithm, self.filter = chosen(recipe)
        self.shaping = RewardShaping(**recipe.rewards.model_dump())
        if self.policy is None:
            self.policy = policy_of(recipe)
        else:
            self.policy = replace(self.policy, model=with_adapters(self.policy.model, recipe))
        # The number of places bears on rounding: a run that is resumed must not have another one by chance.
        recipe = self.recipe = with_memory(recipe, self.policy)
        self.tasks = TaskSource(recipe)
        self.rollout = make_rollout(recipe, self.policy)
        self.processes = processes_for(recipe, self.policy)
        self._player: Player | None = None
        self.learner = Learner(
            self.policy.model,
            self.algorithm,
            recipe.training,
            temperature=recipe.sampling.temperature,
            truncated=recipe.sampling.truncated,
            seed=recipe.seed,
            world=world_of(recipe.world, adapter_names(self.policy.model)),
            start=keeps_start(recipe.diagnostics, self.policy.model),
        )
        self.monitor = Monitor(
            recipe.diagnostics, self.learner, self.policy.renderer, recipe.seed, recipe.agent.thinking
        )
        probes = recipe.diagnostics.probes
        self.prober = Prober(recipe, self.policy.renderer, probes) if probes else None
        self._probed: dict[str, float] = {}
        self.memory = Memory(recipe, self.policy.renderer)
        self.ended_by: Verdict | None = None
        self.trackers: list[Tracker] = []
        self.facts = self.rollout.facts()
        self.usage: dict[str, float] = {}
        self._account = Account()

    # The loop

    def run(self) -> dict[str, Any]:
        """Train to the end of the recipe, or until a stop is asked for; returns the summary."""
        self.observer.started(self)
        self._start_trackers()
        if self.folder is not None:
            self.folder.write_facts(self.facts)
        if self.steps_done == 0:
            self.evaluate("test", self.recipe.evaluation.episodes)
        if self.ended_by is not None:
            self.end_on(self.ended_by)
        while self.steps_done < self.recipe.training.steps and not self.stop_requested and self.ended_by is None:
            started = time.perf_counter()
            learnt, updates = self.learnt(), self.learner.updates
            batch = self.play()
            played = time.perf_counter()
            self.observer.learning()
            figures = self.monitor.measure(batch.groups, self.steps_done, self.tasks.families)
            try:
                figures |= self.learner.step(
                    batch.groups, self.steps_done, batch.kept.keep_PG,
                    loss_scale(batch.kept, self.recipe.filter.loss_scaling, self.recipe.training.groups),
                    self.monitor.probe_groups(self.steps_done), self.tasks.families,
                    self.memory.situations(batch.groups, self.steps_done),
                )  # fmt: skip
            except TrainingDiverged:
                if self.learner.updates == updates:  # a part of the step may have been learnt
                    self.rescue(learnt)
                raise
            figures |= self.memory.figures
            self.steps_done += 1
            self.record(batch, figures, started, played)
            if self.judge():
                break
            last = self.steps_done == self.recipe.training.steps
            if last:
                self.evaluate("test", self.recipe.evaluation.episodes)
            elif _due(self.steps_done, self.recipe.evaluation.every):
                self.evaluate("validation", self.recipe.evaluation.validation_episodes)
            if last or self.stop_requested or _due(self.steps_done, self.recipe.checkpoint.every):
                self.save()
        return self.finish()

    def play(self) -> Batch:
        """The episodes of the next step; groups that the filter turns down are replaced if the algorithm says so."""
        recipe, step = self.recipe, self.steps_done
        wanted, size = recipe.training.groups, recipe.training.group_size
        groups: list[Group] = []
        rounds = 0
        missing = wanted
        while True:
            rounds += 1
            self.observer.playing(f"step {step + 1}" + (f", refill {rounds - 1}" if rounds > 1 else ""), missing * size)
            tasks = self.tasks.of_step(step, missing, first=len(groups))
            fresh = self.player.play(tasks, size, step=step, on_episode=self.observer.episode)
            check_failures(fresh, recipe.training.abort_failed_share)
            self.shaping.apply(fresh)
            groups += fresh
            # Filters compare groups with each other, so all are looked at again once there are more of them.
            kept = within_families(
                self.filter, rewards_matrix(groups), self.tasks.families, np.random.default_rng([recipe.seed, step])
            )
            missing = wanted - int(kept.keep_P.sum())
            if missing <= 0 or not self.algorithm.dynamic_sampling or rounds > self.algorithm.max_refill_tries:
                self.tasks.observe(groups)
                return Batch(groups, at_most(kept, wanted), rounds)

    def evaluate(self, split: str, episodes: int) -> Evaluation | None:
        """Play held-out tasks with the present policy and record the figures."""
        if episodes == 0:
            return None
        options = self.recipe.evaluation
        tasks = self.tasks.held_out(options.seed, split, episodes)
        self.observer.playing(f"evaluation after {self.steps_done} steps", len(tasks))
        result = evaluate(
            self.player, tasks, temperature=options.temperature, step=self.steps_done, on_episode=self.observer.episode
        )
        check_failures(result.groups, self.recipe.training.abort_failed_share)
        if self.learner.world is not None or self.recipe.diagnostics.prediction_loss:
            result.figures.update(self.learner.prediction_losses(result.groups))
        result.figures.update(self.probe())
        result.figures.update(self.used())
        self.evaluations.append((self.steps_done, split, result.figures))
        if self.folder is not None:
            self.folder.append_evaluation(self.steps_done, split, result.figures)
            path = self.folder.trajectory_path("eval", self.steps_done)
            write_trajectories(path, result.groups, phase="eval", step=self.steps_done)
        self._track({f"eval/{split}/{name}": value for name, value in result.figures.items()})
        self.observer.evaluation(self.steps_done, split, result.figures)
        if self.steps_done == 0:
            self.look(result.groups, result.figures.get("cut_answers", 0.0))
        return result

    def look(self, groups: list[Group], cut_answers: float) -> None:
        """Say so at once if the policy does nothing that its environment understands, or is cut off."""
        assert self.policy is not None
        self._warn(first_look(groups, base=self.policy.source == "base"))
        self._warn(cut_off_warning(self.recipe.agent, cut_answers))

    def probe(self) -> dict[str, float]:
        """What the policy knows of the world now, as it plays and is saved; told with the next step too."""
        if self.prober is not None:
            assert self.policy is not None
            found = self.prober.measure(self.policy.model)
            self._probed = {f"probe/{name}": value for name, value in found.items()}
        return self._probed if self.prober is not None else {}

    def used(self) -> dict[str, float]:
        """What judges and sandboxes were asked to do since this was last asked, noted for the run."""
        used = self._account.take()
        if used:
            self.usage = added(self.usage, used)
            if self.folder is not None:
                self.folder.add_usage(used)
        return used

    def judge(self) -> bool:
        """Say what is wrong, if anything is; returns whether the recipe ends the run on it."""
        called = self.monitor.judge(self.steps_done, self.history[-1])
        for verdict in called:
            self.observer.verdict(self.steps_done, verdict)
        self.ended_by = self.monitor.end_of(called)
        if self.ended_by is None:
            return False
        # What the run goes back to must not make room for the checkpoint of the end.
        self.save(spare=self.checkpoint_before(self.ended_by.began))
        self.end_on(self.ended_by)
        return True

    def end_on(self, verdict: Verdict) -> None:
        """Leave the policy that the recipe wants after a verdict, and see how good it is."""
        back = verdict.rule.name in self.recipe.diagnostics.go_back_on
        self.observer.warning(
            f"The run ends after step {self.steps_done} by the verdict {verdict.rule.name}, as "
            f"diagnostics.{'go_back_on' if back else 'stop_on'} says."
        )
        if back:
            self.go_back(verdict.began)
        if (self.steps_done, "test") not in [(step, split) for step, split, _ in self.evaluations]:
            self.evaluate("test", self.recipe.evaluation.episodes)

    def go_back(self, step: int) -> None:
        """Take up the weights of the last checkpoint before a step, if there is one."""
        assert self.policy is not None
        earlier = self.checkpoint_before(step)
        if self.folder is None or earlier is None:
            self._warn(f"There is no checkpoint from before step {step} to go back to; the policy is that of the end.")
            return
        weights, _ = load_checkpoint(earlier)
        restore_weights(self.policy.model, weights, earlier)
        self.observer.warning(self.folder.note_return(step_of(earlier)))

    def checkpoint_before(self, step: int) -> Path | None:
        """The last checkpoint from before a step that is still there."""
        found = checkpoints(self.folder.path / "checkpoints") if self.folder is not None else []
        return next((path for path in reversed(found) if step_of(path) < step), None)

    def record(self, batch: Batch, figures: dict[str, float], started: float, played: float) -> None:
        """Write down what a step did and how long it took."""
        ended = time.perf_counter()
        episodes = all_trajectories(batch.groups)
        sampled = sum(trajectory.n_sampled for trajectory in episodes)
        total = max(ended - started, 1e-9)
        looking = figures.get("time/diagnostics", 0.0) + figures.pop("time/probe", 0.0)
        figures = {
            **rollout_metrics(batch.groups),
            **by_environment(batch, self.tasks.families, self.tasks.names),
            **self.tasks.sampler.figures(),
            **figures,
            **self._probed,
            **self.used(),
            **kept_figures(batch, self.algorithm),
            "speed/tokens_per_second": sampled / max(played - started, 1e-9),
            "speed/episodes_per_second": len(episodes) / total,
            "time/generation": played - started,
            "time/diagnostics": looking,
            "time/other": total - (played - started) - figures.get("time/learning", 0.0) - looking,
            "time/step": total,
            "time/diagnostics_share": looking / total,
        }
        self._probed = {}
        self.history.append(figures)
        if self.folder is not None:
            self.folder.append_metrics(self.steps_done, figures)
            if _due(self.steps_done, self.recipe.save_trajectories_every):
                path = self.folder.trajectory_path("train", self.steps_done)
                learned = learned_from(batch, self.algorithm)
                each = list(zip(batch.groups, learned.keep_PG.tolist(), learned.reasons, strict=True))
                extra = {
                    "kept": [keep_G[g] for group, keep_G, _ in each for g in range(len(group))],
                    "filter_reason": [reason for group, _, reason in each for _ in group],
                }
                write_trajectories(path, batch.groups, phase="train", step=self.steps_done, extra=extra)
        self._track(figures)
        self.observer.step(self.steps_done, figures)
        if self.steps_done == 1 and not any(step == 0 for step, _, _ in self.evaluations):
            self.look(batch.groups, figures["train/cut_answers"])

    def save(self, spare: Path | None = None, learnt: dict[str, Any] | None = None, keep: int | None = None) -> None:
        """Write a checkpoint; older ones make room, but not the one to spare.

        Args:
            spare: an older one that stays.
            learnt: what :meth:`learnt` gave after the last step, if it may have changed since.
            keep: checkpoints that stay, if not as many as the recipe says.
        """
        if self.folder is not None:
            assert self.policy is not None
            state = {
                "learner": self.learner.state_dict(), **(learnt or self.learnt()), "seconds": self.folder.seconds
            }  # fmt: skip
            save_checkpoint(
                self.folder.path / "checkpoints", self.steps_done, trainable_weights(self.policy.model), state,
                keep or self.recipe.checkpoint.keep, spare,
            )  # fmt: skip

    def learnt(self) -> dict[str, Any]:
        """What a checkpoint holds beside the learner; playing and measuring change it before a step is learnt."""
        return {
            "monitor": self.monitor.state_dict(), "tasks": self.tasks.sampler.state_dict(),
            "memory": self.memory.replay.state_dict(),
        }  # fmt: skip

    def rescue(self, learnt: dict[str, Any]) -> None:
        """Keep what was learnt since the last checkpoint as the next step diverges, if it is sound. All earlier
        checkpoints stay: what led there may have begun before it."""
        found = checkpoints(self.folder.path / "checkpoints") if self.folder is not None else []
        if self.steps_done > 0 and self.steps_done not in map(step_of, found) and self.learner.is_finite():
            with contextlib.suppress(CheckpointError):  # the divergence is what the user must hear of
                self.save(learnt=learnt, keep=len(found) + 1)

    def load_newest(self) -> None:
        """Take up the newest checkpoint of the folder, if there is one, or the one that the run went back to on a
        verdict. Nothing is written."""
        assert self.folder is not None and self.policy is not None
        if found := standing_checkpoints(self.folder):
            weights, state = load_checkpoint(found[-1])
            restore_weights(self.policy.model, weights, found[-1])
            with state_errors(found[-1]):
                self.learner.load_state_dict(state["learner"])
                self.monitor.load_state_dict(state["monitor"])
                self.tasks.sampler.load_state_dict(state["tasks"])
                self.memory.replay.load_state_dict(state["memory"])
                self.steps_done = int(state["step"])

    def restore(self) -> None:
        """Bring the folder back to the checkpoint that was loaded, or to the beginning if there is none."""
        assert self.folder is not None
        where = self.folder.path / "checkpoints"
        remove_partial(where)
        # Without a checkpoint even the evaluation of step 0 is played again.
        self.folder.truncate_after(self.steps_done if checkpoints(where) else -1)
        remove_after(where, self.steps_done)
        self.folder.forget_return()
        self.monitor.replay(self.folder.metrics().rows)
        # What has ended is no reason to end on; the recipe may name it only now.
        self.ended_by = self.monitor.end_of([one for one in self.monitor.watch.verdicts if one.ended is None])
        for row in self.folder.evaluations().rows:
            figures = {name: value for name, value in row.items() if name not in ("step", "time", "split")}
            self.evaluations.append((row["step"], row["split"], figures))
        self.usage = dict(self.folder.info.usage)

    def finish(self) -> dict[str, Any]:
        """Write the policy and the summary."""
        assert self.policy is not None
        done = self.steps_done >= self.recipe.training.steps or self.ended_by is not None
        held_out = [(step, figures) for step, split, figures in self.evaluations if split == "test"]
        summary: dict[str, Any] = {
            "steps": self.steps_done,
            "environment": self.recipe.environment.name,
            "algorithm": self.algorithm.name,
            "parameters": self.policy.n_parameters,
        }
        summary["verdicts"] = sorted({verdict.rule.name for verdict in self.monitor.watch.verdicts})
        if self.ended_by is not None:
            summary["ended_by"] = self.ended_by.rule.name
            if self.folder is not None and self.folder.info.went_back_to is not None:
                summary["went_back_to"] = self.folder.info.went_back_to
        if held_out:
            summary["episodes"] = held_out[0][1]["episodes"]
            for name in ("success", "success_low", "success_high", "reward"):
                if name in held_out[0][1]:
                    summary[f"{name}_before"] = held_out[0][1][name]
                if done and name in held_out[-1][1]:
                    summary[f"{name}_after"] = held_out[-1][1][name]
        self.used()
        if self.folder is not None:
            summary["seconds"] = self.folder.seconds
            where = self.folder.path / "policy"
            with storage_errors(where), tensor_errors():
                save_policy(self.policy.model, self.policy.tokenizer, where)
                for written in (where, *save_adapters(self.policy.model, self.folder.path / "adapters")):
                    flush_tree(written)
            back = self.folder.info.went_back_to
            self.folder.note_policy(self.steps_done if back is None else back)
            self.folder.write_summary(summary)
            self.folder.set_status("finished" if done else "stopped")
        for tracker in self.trackers:
            tracker.finish(summary)
        self.close()
        self.observer.finished(summary)
        return summary

    @property
    def player(self) -> Player:
        """What plays the episodes; other processes begin when they are first needed."""
        if self._player is None:
            assert self.policy is not None
            self._player = self.rollout
            if self.processes > 1:
                self._player = make_processes(self.recipe, self.policy, self.processes)
        return self._player

    def close(self) -> None:
        """Give back environments and processes. Closing twice is harmless."""
        self.rollout.close()
        if self._player is not None:
            self._player.close()
            self._player = None
        if self.folder is not None and self.folder.writable:
            # What a step has used that an error or Ctrl-C broke off. That error matters more than one of the disk.
            with contextlib.suppress(CheckpointError):
                self.used()

    # Small things

    def _start_trackers(self) -> None:
        if self.recipe.trackers and self.folder is not None:
            self.trackers = make_trackers(
                self.recipe.trackers, self.folder.path, self.recipe.model_dump(),
                resume_step=self.steps_done or None, on_warning=self.folder.add_warning,
            )  # fmt: skip

    def _warn(self, sentence: str | None) -> None:
        if sentence is not None:
            self.observer.warning(sentence)
            if self.folder is not None and sentence not in self.folder.info.warnings:
                self.folder.add_warning(sentence)

    def _track(self, metrics: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.steps_done, metrics)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
