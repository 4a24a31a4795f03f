"""What the agent does, as numbers: how long and varied its thoughts are, how sure it is, what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal.trajectory import Group, Kind, SampleStop, Trajectory, all_trajectories

NGRAM = 4
"""Tokens of the runs that thoughts are compared by."""


def behaviour_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Figures of a batch of episodes; one that cannot be had (no thoughts, no states) is left out.

    ``behaviour/entropy``: nats a token, E[-log p] of what was sampled, whoever learns from it; and of a kind of tokens,
    ``behaviour/entropy_thought``, ``behaviour/entropy_action``.
    ``behaviour/thought_tokens``, ``behaviour/answer_tokens``: of a turn, tags included.
    ``behaviour/cut_off``: share of the turns whose answer ended at a limit of tokens.
    ``behaviour/invalid_turns``: share of the turns that broke the format or named an illegal action.
    ``behaviour/unchanged_states``: share of the turns, of those with valid actions and a turn after them, after which
    the state is what it was.
    ``behaviour/repeated_states``: share of the turns that begin in a state that their episode has been in before.
    ``behaviour/distinct_ngrams``: distinct runs of four tokens over those of each thought, in thoughts of the first
    turn, one of each group; 1 where no two groups share any.
    ``behaviour/shared_ngrams``: share of these runs that stand in more than half of the groups' thoughts: the template.
    """
    episodes = [trajectory for trajectory in all_trajectories(groups) if not trajectory.failed]
    figures = _token_figures(episodes)
    turns = [turn for trajectory in episodes for turn in trajectory.turns]
    if turns:
        figures["behaviour/invalid_turns"] = float(np.mean([not turn.valid for turn in turns]))
        figures["behaviour/cut_off"] = float(np.mean([turn.stop != SampleStop.END for turn in turns]))
    figures |= _state_figures(episodes)
    return figures | _ngram_figures(groups)


def _token_figures(episodes: Sequence[Trajectory]) -> dict[str, float]:
    segments = [segment for trajectory in episodes for segment in trajectory.segments]
    n_turns = max(1, sum(len(trajectory.turns) for trajectory in episodes))
    figures = _entropy("behaviour/entropy", [segment.logprobs[segment.sampled_mask] for segment in segments])
    for kind, name, length in ((Kind.THOUGHT, "thought", "thought"), (Kind.ACTION, "action", "answer")):
        logprobs = [segment.logprobs[segment.kinds == kind] for segment in segments]
        if tokens := sum(map(len, logprobs)):
            figures[f"behaviour/{length}_tokens"] = tokens / n_turns
            figures |= _entropy(f"behaviour/entropy_{name}", logprobs)
    return figures


def _entropy(name: str, logprobs: Sequence[np.ndarray]) -> dict[str, float]:
    flat = np.concatenate(logprobs).astype(np.float64) if logprobs else np.empty(0)
    # A server may give none.
    return {} if np.isnan(flat).all() else {name: float(-np.nanmean(flat))}


def _state_figures(episodes: Sequence[Trajectory]) -> dict[str, float]:
    known = repeated = followed = unchanged = 0
    for trajectory in episodes:
        # Calling tools is no step: the state behind it is the one before, and says nothing about the agent.
        turns = [turn for turn in trajectory.turns if not turn.calls]
        states = [turn.state for turn in turns]
        if not all(states):
            continue
        known += len(states)
        repeated += len(states) - len(set(states))
        for turn, after in zip(turns, states[1:], strict=False):
            if turn.valid:
                followed += 1
                unchanged += turn.state == after
    figures = {}
    if known:
        figures["behaviour/repeated_states"] = repeated / known
    if followed:
        figures["behaviour/unchanged_states"] = unchanged / followed
    return figures


def _ngram_figures(groups: Sequence[Group]) -> dict[str, float]:
    found: list[set[bytes]] = []
    for group in groups:
        thought = next((ids for trajectory in group if len(ids := _first_thought(trajectory)) >= NGRAM), None)
        if thought is None:
            continue
        runs = [thought[i : i + NGRAM].tobytes() for i in range(len(thought) - NGRAM + 1)]
        found.append(set(runs))
    if len(found) < 2:
        return {}
    everything = set().union(*found)
    counts = dict.fromkeys(everything, 0)
    for runs_of_group in found:
        for run in runs_of_group:
            counts[run] += 1
    occurrences = sum(len(runs_of_group) for runs_of_group in found)
    template = sum(count for count in counts.values() if count > len(found) / 2)
    return {
        "behaviour/distinct_ngrams": len(everything) / occurrences,
        "behaviour/shared_ngrams": template / occurrences,
    }


def _first_thought(trajectory: Trajectory) -> np.ndarray:
    if trajectory.failed or not trajectory.segments:
        return np.empty(0, np.int32)
    segment = trajectory.segments[0]
    return segment.token_ids[(segment.kinds == Kind.THOUGHT) & (segment.turns == 0)]
