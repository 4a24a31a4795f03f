"""An environment of your own: walk along a corridor to the goal.

In the folder of this file:

    rehearsal check own_environment:Corridor
    rehearsal train frozenlake --name corridor --environment.name own_environment:Corridor
"""

import rehearsal as rh
from rehearsal.environments.splits import draw_in_split


class Corridor(rh.EpisodeEnv):
    name = "corridor"
    max_turns = 8
    instructions = "Walk to the goal.\nSymbols: P player, _ floor, G goal.\nActions: Left, Right."

    def legal_actions(self):
        return ["Left", "Right"]

    def _draw(self, split):  # a task; tasks of different splits differ in content
        self.cells = list(draw_in_split(lambda: self.np_random.permutation(list("PG_______")), "".join, split))
        return "".join(self.cells)

    def _act(self, action):  # reward, whether it is over, success, whether anything changed
        here = self.cells.index("P")
        there = min(max(here + (1 if action == "Right" else -1), 0), len(self.cells) - 1)
        won = self.cells[there] == "G"
        self.cells[here], self.cells[there] = "_", "P"
        return float(won), won, won, here != there

    def _observation(self):
        return " ".join(self.cells)
