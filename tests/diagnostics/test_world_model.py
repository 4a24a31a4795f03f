"""Gaps in episodes: the right filling is right, guessing gets chance, and one who knows the world gets them all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rehearsal.diagnostics.world_model as world_model_module
from rehearsal.agents.agent import Limits
from rehearsal.agents.toolbox import FunctionTools, Toolkit, ToolLimits, ToolSource
from rehearsal.agents.tools import Tool
from rehearsal.diagnostics.world_model import PROBES, Gap, fill_gaps, make_gaps
from rehearsal.environments import make
from rehearsal.environments.arithmetic import parse_expression
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError


@pytest.fixture(scope="module")
def gaps_of(renderer: Any) -> Callable[..., list[Gap]]:
    def build(name: str = "frozenlake", count: int = 40, seed: int = 0, **params: Any) -> list[Gap]:
        env = make(name, **params)
        return make_gaps(env, renderer, Limits.for_env(env), count, seed=seed)

    return build


def parts(renderer: Any, gap: Gap) -> tuple[str, list[str]]:
    """The context of the first candidate, and the text of all fillings."""
    ids, first = gap.candidates[0]
    return renderer.decode(ids[:first]), [renderer.decode(ids[first:]) for ids, first in gap.candidates]


def player(grid: str) -> tuple[int, int]:
    """Where the player stands in a lake."""
    rows = [row.split() for row in grid.strip().splitlines()]
    return next((r, c) for r, row in enumerate(rows) for c, sign in enumerate(row) if sign in "PXV")


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("frozenlake", {}),
        ("frozenlake", {"slip": 0.5}),
        ("sokoban", {}),
        ("bandit", {}),
        ("helpdesk", {}),
        ("countdown", {}),
        ("calculate", {}),
        ("lookup", {}),
    ],
)
def test_gaps_have_right_and_wrong_fillings(
    name: str, params: dict[str, Any], gaps_of: Callable[..., list[Gap]]
) -> None:
    gaps = gaps_of(name, **params)
    assert {gap.kind for gap in gaps} <= set(PROBES)
    assert {"action", "forward"} <= {gap.kind for gap in gaps}
    for gap in gaps:
        assert 0 < len(gap.right) < len(gap.candidates)
        assert all(0 < first < len(ids) for ids, first in gap.candidates)
        filled = [ids.tobytes() for ids, _ in gap.candidates]
        assert len(set(filled)) == len(filled) == len(gap.texts)
        assert len({ids[:first].tobytes() for ids, first in gap.candidates}) == 1 or gap.kind == "by_forward"


def test_the_same_seed_makes_the_same_gaps(gaps_of: Callable[..., list[Gap]]) -> None:
    def content(gaps: list[Gap]) -> list[tuple[str, bytes, frozenset[int]]]:
        return [(gap.kind, ids.tobytes(), gap.right) for gap in gaps for ids, _ in gap.candidates]

    assert content(gaps_of(count=10)) == content(gaps_of(count=10))
    assert content(gaps_of(count=10)) != content(gaps_of(count=10, seed=1))


def test_the_environment_itself_agrees(renderer: Any, gaps_of: Callable[..., list[Gap]]) -> None:
    """In a lake without slips the grids before and after an action say which action it was."""
    places = {"Left": (0, -1), "Right": (0, 1), "Up": (-1, 0), "Down": (1, 0)}
    looked = 0
    for gap in gaps_of(count=60):
        if gap.kind != "forward":
            continue
        (true,) = gap.right
        context, fillings = parts(renderer, gap)
        action = context.rpartition("<answer>")[2].partition("</answer>")[0]
        shown = context.rpartition("<|im_start|>user\n")[0].rpartition("<|im_start|>user\n")[2]
        before = player("\n".join(shown.splitlines()[:4]))
        size = len(fillings[true].strip().splitlines())
        after = tuple(min(size - 1, max(0, at + by)) for at, by in zip(before, places[action], strict=True))
        assert player(fillings[true]) == after
        looked += 1
    assert looked > 30


def test_budgets_are_asked_both_ways(renderer: Any, gaps_of: Callable[..., list[Gap]]) -> None:
    gaps = [gap for gap in gaps_of(count=80) if gap.kind == "budget"]
    texts = [parts(renderer, gap) for gap in gaps]
    right = [fillings[next(iter(gap.right))] for gap, (_, fillings) in zip(gaps, texts, strict=True)]
    assert {text[:11] for text in right} == {"<answer>yes", "<answer>no<"}
    assert all("yes or no." in context for context, _ in texts)


def test_one_who_knows_fills_them_all_and_a_guesser_gets_chance(
    gaps_of: Callable[..., list[Gap]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = gaps_of(count=120)
    rng = np.random.default_rng(0)
    for knows in (True, False):
        rows = []
        for gap in gaps:
            for place, (ids, first) in enumerate(gap.candidates):
                likely = place in gap.right if knows else False
                logprob = -0.01 if likely else -1.0 - float(rng.random())
                n = len(ids) - first
                # The same number of nats for each candidate, whatever its length, so that a guesser has no bias.
                rows.append(np.stack([np.full(n, logprob / n), np.full(n, float(likely))], axis=1))
        monkeypatch.setattr(world_model_module, "_scored", lambda *_, rows=rows: rows)
        figures = fill_gaps(None, gaps)
        for kind in PROBES:
            if knows:
                assert figures[f"{kind}/accuracy"] == figures[f"{kind}/exact"] == 1.0
            else:
                spread = 4 * math.sqrt(0.25 / figures[f"{kind}/count"])
                guessing = float(np.mean([gap.chance for gap in gaps if gap.kind == kind]))
                assert abs(figures[f"{kind}/accuracy"] - guessing) < spread
                assert figures[f"{kind}/chance"] >= guessing
                assert figures[f"{kind}/exact"] == 0.0


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [("frozenlake", "budget", "yes"), ("frozenlake", "reward", "0"), ("helpdesk", "reward", "0"),
     ("helpdesk", "budget", "no"), ("frozenlake", "inverse", "Left"), ("frozenlake", "action", "Left"),
     ("countdown", "forward", "wrong")],
)  # fmt: skip
def test_one_who_always_says_the_same_gets_no_more_than_chance(
    name: str, kind: str, answer: str, gaps_of: Callable[..., list[Gap]], renderer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gaps = [gap for gap in gaps_of(name, count=80) if gap.kind == kind]
    told = [text == answer for gap in gaps for text in gap.texts]
    lengths = [len(ids) - first for gap in gaps for ids, first in gap.candidates]
    rows = [np.tile([-0.1 / n if own else -5.0, float(own)], (n, 1)) for own, n in zip(told, lengths, strict=True)]
    monkeypatch.setattr(world_model_module, "_scored", lambda *_: rows)
    figures = fill_gaps(None, gaps)
    # It is right more often than one candidate in several, and nothing else is right more often.
    assert figures[f"{kind}/accuracy"] == figures[f"{kind}/chance"] > np.mean([gap.chance for gap in gaps]) + 0.02


@pytest.mark.parametrize("kind", ["forward", "action", "inverse", "by_forward"])
def test_one_to_whom_all_is_alike_gets_chance(
    kind: str, gaps_of: Callable[..., list[Gap]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = [gap for gap in gaps_of() if gap.kind == kind]
    rows = [np.zeros((len(ids) - first, 2)) for gap in gaps for ids, first in gap.candidates]
    monkeypatch.setattr(world_model_module, "_scored", lambda *_: rows)
    figures = fill_gaps(None, gaps)
    assert figures[f"{kind}/accuracy"] == pytest.approx(np.mean([gap.chance for gap in gaps]))
    assert figures[f"{kind}/accuracy"] <= figures[f"{kind}/chance"] + 1e-9


def test_scores_are_those_of_plain_passes(gaps_of: Callable[..., list[Gap]], tiny_qwen3: Callable[..., Any]) -> None:
    gaps = [gap for gap in gaps_of(count=6) if gap.kind == "forward"][:3]
    model = tiny_qwen3(480, max_position_embeddings=2048)
    figures = fill_gaps(model, gaps)
    nats = tokens = 0.0
    hits = 0
    for gap in gaps:
        scores = []
        for place, (ids, first) in enumerate(gap.candidates):
            whole = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logprobs = model(input_ids=whole[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, whole[1:, None])[first - 1 :, 0]
            scores.append(float(own.sum()))
            if place in gap.right:
                nats, tokens = nats - float(own.sum()), tokens + len(own)
        hits += int(np.argmax(scores)) in gap.right
    assert figures["forward/accuracy"] == hits / len(gaps)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert not model.training


def test_no_gaps_no_figures(tiny_qwen3: Callable[..., Any]) -> None:
    assert fill_gaps(tiny_qwen3(), []) == {}


def test_the_action_between_two_states_is_asked_for(renderer: Any, gaps_of: Callable[..., list[Gap]]) -> None:
    """In a lake without slips each shown pair of grids tells which moves are right."""
    moves = {"Left": (0, -1), "Right": (0, 1), "Up": (-1, 0), "Down": (1, 0)}
    asked = [gap for gap in gaps_of(count=40) if gap.kind == "inverse"]
    for gap in asked:
        context, fillings = parts(renderer, gap)
        assert [text.partition("</answer>")[0] for text in fillings] == [f"<answer>{text}" for text in gap.texts]
        shown, _, rest = context.rpartition("<|im_start|>user\n")[2].partition("After one action came:\n")
        after, which, _ = rest.partition("\nWhich action was it?")
        assert which and set(gap.texts) == set(moves)
        before, size = player(shown), len(after.splitlines())
        ends = {
            text: tuple(min(size - 1, max(0, at + by)) for at, by in zip(before, moves[text], strict=True))
            for text in gap.texts
        }
        assert {gap.texts[place] for place in gap.right} == {text for text in ends if ends[text] == player(after)}
    assert len(asked) > 30


class Riddle(TextEnv):
    """Any text is an action: the first one opens the box that it names, the second one takes what is in it. Words go
    by their small letters, and the best of both is known."""

    name = "riddle"
    max_turns = 3
    known = True
    """Whether it tells how well the best player does."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.box, self.thing = (int(self.np_random.integers(4)) for _ in range(2))
        self.opened = self.over = self.won = False
        return f"box {self.box}", {}

    def parse_action(self, text: str) -> str | None:
        return text.strip().lower() if text.strip().lower().startswith(("open", "take")) else None

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert action == self.parse_action(action) and not self.over
        if not self.opened:
            self.opened = action == f"open {self.box}"
            self.over = not self.opened
            return f"there is {self.thing}" if self.opened else "locked", 0.0, self.over, False, {"success": False}
        self.over, self.won = True, action == f"take {self.thing}"
        return "well" if self.won else "no", float(self.won), True, False, {"success": self.won}

    def oracle(self) -> list[str] | None:
        if self.over:
            return []
        # Things are asked for in two ways, which mean the same.
        plan = [f"open {self.box}", f"Take {self.thing}" if self.box % 2 else f"take {self.thing}"]
        return plan[1:] if self.opened else plan

    def optimal_success(self) -> float | None:
        return (float(self.won) if self.over else 1.0) if self.known else None


@pytest.mark.parametrize("known", [True, False])
def test_where_any_text_is_an_action_others_are_what_the_oracle_says_elsewhere(known: bool, renderer: Any) -> None:
    env = Riddle()
    env.known = known
    gaps = make_gaps(env, renderer, Limits.for_env(env), 40)
    both = set()
    for gap in gaps:
        if gap.kind not in ("action", "inverse", "by_forward"):
            continue
        # Four boxes and four things, each once however it is spelled.
        assert sorted(gap.texts) == [f"{verb} {n}" for verb in ("open", "take") for n in range(4)]
        shown = parts(renderer, gap)[0].rpartition("<|im_start|>user\n")[2].split("\n")[0]
        if gap.kind == "action":
            opened = shown.startswith("there is")
            assert [gap.texts[place] for place in gap.right] == [f"{'take' if opened else 'open'} {shown.split()[-1]}"]
            both.add(opened)
    assert both == {True, False}
    forward = [gap.texts[place] for gap in gaps if gap.kind == "forward" for place in gap.right]
    # The oracle's own action is what is tried half of the time, so that what it leads to is met as well.
    best = sum(text == "well" or text.startswith("there is") for text in forward)
    assert len(forward) * 0.3 < best < len(forward) * 0.85


def test_actions_of_which_nobody_knows_whether_they_are_right_are_left_out(renderer: Any) -> None:
    class Either(Riddle):
        """Opens for two numbers, and its oracle names one of them."""

        known = False

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            won = action.removeprefix("open ") in (str(self.box), str((self.box + 1) % 4))
            self.over, self.won = True, won
            return "well" if won else "no", float(won), True, False, {"success": won}

    for known in (True, False):
        env = Either()
        env.known = known
        gaps = [gap for gap in make_gaps(env, renderer, Limits.for_env(env), 10) if gap.kind == "action"]
        assert gaps
        for gap in gaps:
            box = int(parts(renderer, gap)[0].rpartition("box ")[2][0])
            named, other = f"open {box}", f"open {(box + 1) % 4}"
            assert {gap.texts[place] for place in gap.right} == ({named, other} if known else {named})
            assert (other in gap.texts) == known


def test_what_an_oracle_says_and_nobody_can_do_is_not_asked_for(renderer: Any) -> None:
    class Muddled(Riddle):
        """Its oracle has a word for one of the boxes that the environment does not know."""

        def oracle(self) -> list[str] | None:
            plan = super().oracle()
            return ["", *plan[1:]] if plan and self.box == 0 and not self.opened else plan

    env = Muddled()
    gaps = make_gaps(env, renderer, Limits.for_env(env), 30)
    shown = [parts(renderer, gap)[0].rpartition("box ")[2][0] for gap in gaps if gap.kind == "action"]
    assert "0" not in shown and len(shown) > 10
    assert all("" not in gap.texts for gap in gaps)


def test_countdown_has_candidates_that_are_right_and_wrong(gaps_of: Callable[..., list[Gap]], renderer: Any) -> None:
    gaps = [gap for gap in gaps_of("countdown") if gap.kind == "action"]
    assert len(gaps) == 40
    for gap in gaps:
        context, _ = parts(renderer, gap)
        numbers, _, target = context.rpartition("numbers ")[2].split("\n")[0].partition(" target ")
        right = set()
        for place, text in enumerate(gap.texts):
            read = parse_expression(text)
            assert read is not None
            if read.value == int(target) and sorted(read.numbers) == sorted(map(int, numbers.split())):
                right.add(place)
        assert gap.right == right


def test_environments_that_cannot_be_probed(renderer: Any) -> None:
    class Unknown(Riddle):
        def oracle(self) -> list[str] | None:
            return None

    class Still(Riddle):
        def legal_actions(self) -> list[str]:
            return []

    for env, told in ((Unknown(), r"oracle\(\) is None"), (Still(), "no action is legal")):
        with pytest.raises(RecipeError, match=rf"riddle cannot be probed: .*{told}"):
            make_gaps(env, renderer, Limits.for_env(env), 3)


def test_to_probe_leaves_the_environment_as_it_was(renderer: Any) -> None:
    env = make("sokoban")
    env.reset(seed=0)
    before = copy.deepcopy(env.describe())
    make_gaps(env, renderer, Limits.for_env(env), 3)
    assert env.describe() == before


def test_tools_are_shown_as_in_an_episode(renderer: Any) -> None:
    def doubled(number: int) -> int:
        """Twice a number.

        Args:
            number: any.
        """
        return 2 * number

    def shown(toolkit: Toolkit | None) -> list[str]:
        env = make("frozenlake")
        gaps = make_gaps(env, renderer, Limits.for_env(env), 20, toolkit=toolkit)
        assert {gap.kind for gap in gaps} == set(PROBES)
        return [parts(renderer, gap)[0] for gap in gaps]

    toolkit = Toolkit([FunctionTools(doubled)], ToolLimits(max_calls=3))
    assert not any("doubled" in context for context in shown(None))
    for context in shown(toolkit):
        assert "doubled" in context.partition("<|im_start|>user")[0]
        assert context.count("actions left") + context.count("1 action left") == 0
        assert ", 3 tool calls left." in context


def test_the_tools_of_an_episode_are_closed(renderer: Any) -> None:
    class Opened(ToolSource):
        open_now = 0

        def open(self) -> list[Tool]:
            self.open_now += 1
            return [Tool("wait", "Wait.", {}, lambda arguments: "", close=self._closed)]

        def _closed(self) -> None:
            self.open_now -= 1

    source = Opened()
    env = make("frozenlake")
    make_gaps(env, renderer, Limits.for_env(env), 5, toolkit=Toolkit([source]))
    assert source.open_now == 0
