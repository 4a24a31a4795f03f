"""An environment of your own: walk along a corridor to the goal.

In the folder of this file:

    rehearsal check own_environment:Corridor
    rehearsal train frozenlake --name corridor --environment.name own_environment:Corridor
"""

import gymnasium as gym

import rehearsal as rh
from rehearsal.environments.splits import draw_in_split, split_option


class Corridor(rh.TextEnv):
    name = "corridor"
    fast = True  # a step takes microseconds and never blocks
    max_turns = 8
    instructions = "Walk to the goal.\nSymbols: P player, _ floor, G goal.\nActions: Left, Right."
    over = True

    def legal_actions(self):
        return ["Left", "Right"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        split = split_option(options)
        self.cells = list(draw_in_split(lambda: self.np_random.permutation(list("PG_______")), "".join, split))
        self.over = False
        return " ".join(self.cells), {"task": "".join(self.cells), "split": split, "success": False}

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("The episode is over: call reset().")
        if (move := self.parse_action(action)) is None:
            raise ValueError(f"{action!r} is not a legal action.")
        here = self.cells.index("P")
        there = min(max(here + (1 if move == "Right" else -1), 0), len(self.cells) - 1)
        self.over = self.cells[there] == "G"
        self.cells[here], self.cells[there] = "_", "P"
        return " ".join(self.cells), float(self.over), self.over, False, {"success": self.over}
