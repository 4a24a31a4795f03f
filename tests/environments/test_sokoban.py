"""Sokoban: rules, solver, generator, level files, rewards, views."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.environments import SPLITS, make
from rehearsal.environments.sokoban import Sokoban, draw_levels, parse_level, parse_levels, read_levels, solve
from rehearsal.environments.sokoban.generator import placed, positions_by_length
from rehearsal.environments.sokoban.solver import SOLVED, UNKNOWN, UNSOLVABLE
from rehearsal.environments.splits import content_split
from rehearsal.errors import EnvironmentFault, RecipeError

LEVEL = """
########
#  .   #
# $@ $ #
#   .  #
########
"""

STEPS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}


def naive_board(level):
    rows = level.content.split("/")
    at = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
    walls = {cell for cell, symbol in at.items() if symbol == "#"}
    targets = frozenset(cell for cell, symbol in at.items() if symbol in ".*+")
    boxes = frozenset(cell for cell, symbol in at.items() if symbol in "$*")
    (player,) = [cell for cell, symbol in at.items() if symbol in "@+"]
    return walls, targets, boxes, player


def naive_move(walls, boxes, player, action):
    dr, dc = STEPS[action]
    to, beyond = (player[0] + dr, player[1] + dc), (player[0] + 2 * dr, player[1] + 2 * dc)
    if to in walls or (to in boxes and (beyond in walls or beyond in boxes)):
        return boxes, player
    return (boxes - {to} | {beyond} if to in boxes else boxes), to


def naive_shortest(level, limit=60):
    """Breadth-first search in single moves over plain sets, None where there is no solution."""
    walls, targets, boxes, player = naive_board(level)
    frontier, seen, length = [(boxes, player)], {(boxes, player)}, 0
    while frontier and length <= limit:
        if any(state[0] == targets for state in frontier):
            return length
        following = []
        for state in frontier:
            for action in STEPS:
                after = naive_move(walls, *state, action)
                if after not in seen:
                    seen.add(after)
                    following.append(after)
        frontier, length = following, length + 1
    return None


def some_levels(seed, count, size=6, boxes=1, longest=20):
    stream = draw_levels(np.random.default_rng(seed), size, size, boxes, 1, longest)
    found = [level for level in (next(stream) for _ in range(4 * count)) if level is not None]
    return found[:count]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), boxes=st.integers(1, 2))
def test_the_solver_finds_a_shortest_solution(seed, boxes):
    for level in some_levels(seed, 2, boxes=boxes):
        solution = solve(level)
        assert solution.status == SOLVED
        assert len(solution.moves) == naive_shortest(level)
        walls, targets, at, player = naive_board(level)
        for number, action in enumerate(solution.moves):
            assert at != targets, f"solved before move {number}"
            at, player = naive_move(walls, at, player, action)
        assert at == targets


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), moves=st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=30))
def test_the_engine_plays_by_the_rules(seed, moves):
    (level,) = some_levels(seed, 1, boxes=2)
    walls, targets, boxes, player = naive_board(level)
    env = Sokoban(size=6, boxes=2)
    env.reset(seed=0)
    env._level = level
    for action in moves:
        stored = len(boxes & targets)
        boxes, moved = naive_move(walls, boxes, player, action)
        observation, reward, terminated, _, info = env.step(action)
        facts = env.describe()
        assert (facts["player"], set(facts["boxes"])) == (moved, boxes)
        done = boxes == targets
        assert reward == pytest.approx(-0.1 + len(boxes & targets) - stored + 10 * done)
        assert (terminated, info["success"], info["effective"]) == (done, done, moved != player)
        assert observation.count("*") == len(boxes & targets)
        player = moved
        if done:
            break


@pytest.mark.parametrize(
    ("size", "boxes", "span"),
    [
        (6, 1, (1, 10)), (6, 1, (7, 9)), (8, 2, (5, 12)), (5, 1, (3, 3)), ([4, 9], 2, (1, 10)), (6, 13, (1, 10)),
        (12, 30, (1, 6)), (40, 20, (4, 9)),
    ],
)  # fmt: skip
def test_made_levels_have_the_wanted_length(size, boxes, span):
    env = Sokoban(size=size, boxes=boxes, min_solution=span[0], max_solution=span[1])
    lengths = []
    for seed in range(25):
        env.reset(seed=seed)
        height, width = size if isinstance(size, list) else (size, size)
        assert (env.level.height, env.level.width) == (height, width)
        assert (env.level.boxes.bit_count(), env.level.targets.bit_count()) == (boxes, boxes)
        lengths.append(len(env.oracle()))
    assert span[0] <= min(lengths)
    assert max(lengths) <= span[1]
    assert len(set(lengths)) > 1 or span[0] == span[1]


def test_lengths_from_reverse_play_are_exact():
    level = some_levels(5, 1, boxes=2)[0]
    for length, layer in enumerate(positions_by_length(level, 9)):
        for position in layer[:: max(1, len(layer) // 5)]:
            assert naive_shortest(placed(level, position)) == length


def test_an_impossible_range_is_refused_in_words():
    env = Sokoban(size=5, min_solution=90, max_solution=95)
    with pytest.raises(EnvironmentFault, match="relax the environment's parameters"):
        env.reset(seed=0)


def test_dead_ends_are_proven():
    cornered = parse_level("#####\n#$  #\n# @.#\n#####")
    assert solve(cornered).status == UNSOLVABLE
    walled = parse_level("######\n#    #\n#@$ .#\n#  $.#\n######")
    assert solve(walled).status == SOLVED
    # Two boxes side by side along a wall: neither stands on a dead cell, and neither can leave.
    stuck = parse_level("#######\n#  .  #\n#     #\n#@    #\n#.$$  #\n#######")
    assert naive_shortest(stuck) is None
    assert solve(stuck).status == UNSOLVABLE


def test_the_solver_gives_up_at_its_bound():
    level = parse_level(LEVEL)
    assert solve(level, max_nodes=1).status == UNKNOWN
    assert solve(level).status == SOLVED
    assert len(solve(level).moves) == naive_shortest(level)


def test_the_oracle_knows_a_dead_end():
    env = Sokoban()
    env.reset(seed=0)
    env._level = parse_level("######\n#@$ .#\n#    #\n######")
    assert env.oracle() == ["Right", "Right"]
    assert env.optimal_success() == 1.0
    env._level = parse_level("######\n#  @$#\n#.   #\n######")
    assert env.oracle() == []
    assert env.optimal_success() == 0.0


def test_a_solution_longer_than_the_steps_left_cannot_succeed(tmp_path):
    file = tmp_path / "corridor.txt"
    file.write_text("\n\n".join(f"#####{'#' * n}\n#@$ {' ' * n}.#\n######{'#' * n}" for n in range(40)))
    env = Sokoban(levels=file, max_steps=4)
    outcomes = set()
    for seed in range(60):
        env.reset(seed=seed)
        outcomes.add((len(env.oracle()) <= 4, env.optimal_success()))
    assert outcomes <= {(True, 1.0), (False, 0.0)}
    assert (False, 0.0) in outcomes


def test_xsokoban_text_is_read():
    text = f"""; 0
{LEVEL.strip()}

; 1
    ####
#####  #
# *@$ .#
########
Title: the second

#######
#+ $  #
#######
"""
    first, second, third = parse_levels(text)
    assert first.content == "########/#  .   #/# $@ $ #/#   .  #/########"
    assert (first.boxes.bit_count(), first.targets.bit_count()) == (2, 2)
    # What lies outside the walls is filled up, and what was inside stays.
    assert second.content == "########/#####  #/# *@$ .#/########"
    assert third.content == "#######/#+ $  #/#######"
    assert parse_level(first.content.replace("/", "\n")) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#####\n#  .#\n# $ #\n#####", "one player"),
        ("#####\n#@@ #\n# $.#\n#####", "one player"),
        ("#####\n#@ .#\n# $$#\n#####", "as many boxes"),
        ("#####\n#@  #\n#####", "as many boxes"),
        ("#####\n#@$. \n#####", "closed"),
        ("######\n#@*  #\n######", "solved"),
        ("########\n#@$.#$ #\n#    #. #\n########", "never get to"),
    ],
)
def test_broken_levels_are_refused(text, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        parse_level(text)
    (tmp_path / "broken.txt").write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.txt"):
        read_levels(tmp_path)


def test_levels_from_a_folder_are_split_by_content(tmp_path):
    levels = [level.content.replace("/", "\n") for seed in range(60) for level in some_levels(seed, 2)]
    (tmp_path / "train.txt").write_text("".join(f"; {n}\n{text}\n\n" for n, text in enumerate(levels)))
    (tmp_path / "test.txt").write_text(levels[0])  # a copy under another name is still the same level
    env = make("sokoban", levels=str(tmp_path))
    seen = {}
    for split in ("train", "validation", "test"):
        seen[split] = {env.reset(seed=seed, options={"split": split})[1]["task"] for seed in range(100)}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert len(seen["train"]) > len(seen["test"]) > 1
    assert sum(map(len, seen.values())) <= len(set(levels))


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "levels.txt"
    file.write_text("#####\n#@$.#\n#####")
    assert read_levels(file)[0].content == "#####/#@$.#/#####"
    file.write_text("######\n#@ $.#\n######")
    assert read_levels(file)[0].content == "######/#@ $.#/######"


def test_files_without_levels_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no file or folder"):
        make("sokoban", levels=tmp_path / "none")
    with pytest.raises(RecipeError, match="no Sokoban levels"):
        make("sokoban", levels=tmp_path)
    (tmp_path / "one.txt").write_text("#####\n#@$.#\n#####")
    env = make("sokoban", levels=tmp_path)
    other = next(split for split in SPLITS if split != content_split(read_levels(tmp_path)[0].layout))
    with pytest.raises(EnvironmentFault, match="give more levels"):
        env.reset(options={"split": other})


BOXOBAN = Path(__file__).resolve().parents[3] / "shared" / "data" / "boxoban"


@pytest.mark.skipif(not BOXOBAN.is_dir(), reason="the Boxoban levels are not beside the repository")
def test_public_boxoban_levels_are_read_and_solved():
    levels = read_levels(BOXOBAN / "unfiltered_test_000.txt")
    assert len(levels) == 1000
    assert {(level.width, level.height, level.boxes.bit_count()) for level in levels[:50]} <= {
        (width, height, 4) for width in range(5, 11) for height in range(5, 11)
    }
    solution = solve(levels[0])
    assert solution.status == SOLVED
    walls, targets, boxes, player = naive_board(levels[0])
    for action in solution.moves:
        boxes, player = naive_move(walls, boxes, player, action)
    assert boxes == targets


def test_views_tell_the_same():
    for seed in range(20):
        env, plain = Sokoban(view="both"), Sokoban()
        observation = env.reset(seed=seed)[0]
        *grid, coordinates = observation.split("\n")
        assert "\n".join(grid) == plain.reset(seed=seed)[0]
        cells = {(r, c): symbol for r, row in enumerate(grid) for c, symbol in enumerate(row.split(" "))}
        facts = env.describe()
        assert [at for at, symbol in cells.items() if symbol in "PS"] == [facts["player"]]
        assert [at for at, symbol in cells.items() if symbol in "X*"] == facts["boxes"]
        assert [at for at, symbol in cells.items() if symbol in "O*S"] == facts["targets"]
        inner = [at for at, symbol in cells.items() if symbol == "#" and 0 < at[0] < 5 and 0 < at[1] < 5]
        assert inner == facts["walls"]
        row, column = facts["player"]
        assert f"player ({row},{column}) boxes" in coordinates
        assert ("walls" in coordinates) == bool(inner)


def test_the_episode_is_truncated_at_the_step_limit():
    env = Sokoban(max_steps=2, max_solution=2, min_solution=2)
    env.reset(seed=0)
    first = env.oracle()[0]
    undo = {"Up": "Down", "Down": "Up", "Left": "Right", "Right": "Left"}
    assert env.step(first)[2:4] == (False, False)
    assert env.step(undo[first])[2:4] == (False, True)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"size": 3}, "size"),
        ({"size": 101}, "size"),
        ({"boxes": 14}, "boxes must be a whole number from 1 to 13"),
        ({"size": [6, 7, 8]}, "size"),
        ({"boxes": 0}, "boxes"),
        ({"min_solution": 11, "max_solution": 10}, "max_solution"),
        ({"min_solution": 11, "max_steps": 10}, "max_steps"),
        ({"levels": "x.txt", "boxes": 2}, "boxes"),
    ],
)
def test_bad_values_are_named(params, named):
    with pytest.raises(RecipeError, match=named):
        make("sokoban", **params)


def test_a_board_may_be_oblong():
    env = Sokoban(size=[5, 9])
    rows = env.reset(seed=1)[0].split("\n")
    assert (len(rows), {len(row.split(" ")) for row in rows}) == (5, {9})
