"""A bounded memory of past situations and the answers to them, so that what is no longer met is not forgotten."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from rehearsal.agents.rehearse import Hindsight, hindsight
from rehearsal.models.chat import ChatRenderer
from rehearsal.training.recipe import Recipe
from rehearsal.training.world import REPLAYED
from rehearsal.trajectory import Group


class Replay:
    """Keeps situations by topic, and deals them out evenly over topics.

    A topic that was met a hundred times has no more of the memory, and comes no more often, than one that was met
    once. Within a topic the newest situations stay, so that what has changed drives out what was.

    Args:
        size: situations that are kept, of all topics together.
        per_topic: and of one topic.
    """

    def __init__(self, size: int, per_topic: int = 8) -> None:
        self.size = size
        self.per_topic = per_topic
        self._topics: dict[tuple[str, str], deque[Hindsight]] = {}

    def __len__(self) -> int:
        return sum(len(held) for held in self._topics.values())

    def add(self, situations: Sequence[Hindsight]) -> None:
        """Take in new situations; one that is known already, token for token, becomes the newest of its topic."""
        for one in situations:
            held = self._topics.setdefault((one.environment, one.topic), deque())
            content = one.token_ids.tobytes()
            for old in list(held):
                if old.token_ids.tobytes() == content:
                    held.remove(old)
            held.append(one)
            if len(held) > self.per_topic:
                held.popleft()
        while len(self) > self.size:
            # The fullest topic gives way; among equals, the one that was met first.
            fullest = max(self._topics, key=lambda topic: len(self._topics[topic]))
            self._topics[fullest].popleft()
            if not self._topics[fullest]:
                del self._topics[fullest]

    def draw(self, count: int, rng: np.random.Generator) -> list[Hindsight]:
        """``count`` situations: topics in turn, in random order, and of each topic any situation. Fewer if there are
        fewer."""
        left = {topic: list(rng.permutation(len(held))) for topic, held in self._topics.items()}
        drawn: list[Hindsight] = []
        while left and len(drawn) < count:
            topics = list(left)
            for number in rng.permutation(len(topics))[: count - len(drawn)]:
                topic = topics[number]
                drawn.append(self._topics[topic][left[topic].pop()])
                if not left[topic]:
                    del left[topic]
        return drawn

    # State

    def state_dict(self) -> dict[str, Any]:
        """All situations, as lists and numbers."""
        return {
            "situations": [
                {
                    "token_ids": one.token_ids.tolist(), "first": one.first, "topic": one.topic,
                    "environment": one.environment, "foretold": one.foretold, "meaning": one.meaning,
                    "speaker": one.speaker,
                }
                for held in self._topics.values()
                for one in held
            ]
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._topics = {}
        for values in state["situations"]:
            one = Hindsight(**{**values, "token_ids": np.array(values["token_ids"], dtype=np.int32)})
            self._topics.setdefault((one.environment, one.topic), deque()).append(one)


class Memory:
    """What a run makes of its rehearsals: true answers to those of a step, and situations of earlier steps.

    Args:
        recipe: says whether there are rehearsals, and how many situations are replayed.
        renderer: of the model that plays.

    Attributes:
        replay: the situations of earlier steps.
        figures: of the last step: ``rehearse/predictions`` of an episode, ``rehearse/answered`` (share whose actions
            were taken), ``rehearse/foretold`` (share of those that said just what came), ``rehearse/kept``.
    """

    def __init__(self, recipe: Recipe, renderer: ChatRenderer) -> None:
        self.options = recipe.world
        self.rehearses = recipe.agent.rehearse
        self.seed = recipe.seed
        self.renderer = renderer
        self.replay = Replay(recipe.world.replay_size)
        self.figures: dict[str, float] = {}

    def situations(self, groups: Sequence[Group], step: int) -> dict[str, list[Hindsight]]:
        """What the world model learns in this step beside the answers in its episodes; taken into the memory too.

        Each update has a draw from the memory of its own, all of one length, one after the other.
        """
        self.figures = {}
        if not self.rehearses:
            return {}
        episodes = [trajectory for group in groups for trajectory in group]
        fresh = [one for t in episodes for one in hindsight(t, self.renderer, horizon=self.options.horizon)]
        made = sum(len(turn.predictions) for t in episodes for turn in t.turns)
        self.figures = {"rehearse/predictions": made / max(1, len(episodes))}
        if made:
            self.figures["rehearse/answered"] = len(fresh) / made
        if fresh:
            self.figures["rehearse/foretold"] = sum(one.foretold for one in fresh) / len(fresh)
        if self.options.mode == "policy_only":
            return {}
        rng = np.random.default_rng([self.seed, step, 5])
        past = [one for _ in range(self.options.updates) for one in self.replay.draw(self.options.replay, rng)]
        if self.options.replay:
            self.replay.add(fresh)
            self.figures["rehearse/kept"] = float(len(self.replay))
        return {name: some for name, some in (("hindsight", fresh), (REPLAYED, past)) if some}
