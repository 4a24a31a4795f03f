"""What goes wrong in the soak, and when: a plan for every episode, and the parts of it that break as the plan says.

The agent is scripted: its answers come from a plan that is drawn from the noise of its episode. Everything else is
real. So it is known of every fault in which episode it was, and what must have come of it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.soak_verifier import FAULTS as VERIFIER_FAULTS
from benchmarks.soak_verifier import MuteError
from rehearsal.agents.calls import spell_call
from rehearsal.agents.toolkit.calculator import calculate
from rehearsal.environments.calculate import Calculate
from rehearsal.environments.tasks import VerifiedTasks
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import EngineStats, Sampled
from rehearsal.models.chat import ChatRenderer
from rehearsal.trajectory import SampleStop

WORDS = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "garnet", "harbour", "indigo", "juniper")
_LINE = re.compile(r"\d+(?: [-+*] \d+)+")

TOOL_FAULTS: dict[str, tuple[str, str]] = {
    "tool raises": ("brittle", "raised"),
    "tool leaves the program": ("leave", "raised"),
    "tool hangs": ("doze", "timeout"),
    "tool does not exist": ("teleport", "unknown"),
    "arguments are wrong": ("calculator", "arguments"),
    "code exits": ("python", "raised"),
    "code kills itself": ("python", "raised"),
    "code hangs": ("python", "raised"),
    "code fills the memory": ("python", "raised"),
    "code leaves processes behind": ("python", ""),
    "server dies": ("die", "raised"),
    "server hangs": ("stall", "timeout"),
}
"""By name: the tool that is called, and the kind of error that must come of it ("" for none)."""
ENVIRONMENT_FAULTS = (
    "reset raises", "step raises", "step returns rubbish", "reset hangs", "step hangs", "opening of tools fails"
)  # fmt: skip
RARE = ("reset hangs", "step hangs")
"""Each of them keeps a whole round waiting, so they come at a tenth of the rate of the others."""
_CODE = {
    "code exits": "import os; os._exit(3)",
    "code kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "code hangs": "while True: pass",
    "code fills the memory": "x = bytearray(1 << 30)",
    "code leaves processes behind": (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(1000)\n"
        "print('left')"
    ),
}


# What the agent does


@dataclass(frozen=True)
class Move:
    """One answer of the agent with one call.

    Attributes:
        tool, arguments: the call.
        fault: what is wrong with it, "" for nothing.
        expected: how the result must end where the call comes back without an error.
    """

    tool: str
    arguments: dict[str, Any]
    fault: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Plan:
    """What the agent does in one episode.

    Attributes:
        key: of the episode's noise; its first call tells it.
        moves: the calls.
        fault: of the verifier, "" for none.
    """

    key: int
    moves: tuple[Move, ...]
    fault: str = ""


@dataclass
class Dice:
    """How often what goes wrong.

    Attributes:
        rate: of each fault: in a move for those of tools, in an episode for the others.
        server: whether there is an MCP server.
    """

    rate: float
    server: bool

    def draw(self, rng: random.Random, faults: Sequence[str]) -> str:
        """One of these faults, or ""."""
        for fault in faults:
            if rng.random() < self.rate * (0.1 if fault in RARE else 1.0):
                return fault
        return ""

    def plan(self, key: int, line: str, verified: bool) -> Plan:
        """The plan of an episode: the same one for the same arguments."""
        rng = random.Random(key)
        value = str(calculate(line))
        moves = [Move("ledger", {"entry": str(key)}, expected=f"noted {key}")]
        faults = [name for name in TOOL_FAULTS if self.server or not name.startswith("server")]
        for _ in range(rng.randint(1, 4)):
            fault = self.draw(rng, rng.sample(faults, len(faults)))
            moves.append(_broken_move(fault) if fault else self._sound_move(rng, key, line, value))
        return Plan(key, tuple(moves), self.draw(rng, list(VERIFIER_FAULTS)) if verified else "")

    def environment_fault(self, seed: int, sample: int) -> str:
        """What the environment does in the episode of a task and a sample."""
        rng = random.Random(f"{seed}/{sample}")
        return self.draw(rng, rng.sample(ENVIRONMENT_FAULTS, len(ENVIRONMENT_FAULTS)))

    def _sound_move(self, rng: random.Random, key: int, line: str, value: str) -> Move:
        kind = rng.choice(("calculator", "python", "python", "python", "search", *(["double"] if self.server else [])))
        if kind == "calculator":
            return Move(kind, {"expression": line}, expected=value)
        if kind == "search":
            word = rng.choice(WORDS)
            return Move(kind, {"query": word}, expected=f"the token of {word} is {WORDS.index(word) * 7}.")
        if kind == "double":
            return Move(kind, {"number": key % 1000}, expected=str(2 * (key % 1000)))
        # Whatever another episode left would show.
        code = f"mine = globals().get('mine', {key})\nopen('mine', 'a').close()\nimport os\n"
        code += f"print(len(os.listdir()), mine, {line})"
        return Move(kind, {"code": code}, expected=f"1 {key} {value}")


def _broken_move(fault: str) -> Move:
    tool, _ = TOOL_FAULTS[fault]
    if tool == "python":
        return Move(tool, {"code": _CODE[fault]}, fault, "left" if fault == "code leaves processes behind" else "")
    return Move(tool, {"formula": "1"} if tool == "calculator" else {}, fault)


class ScriptedSession:
    """Reads the task off the prompt, and answers as the plan says; the number is always right."""

    def __init__(self, engine: ScriptedEngine, verified: bool, key: int, shown: str = "") -> None:
        self._engine, self._verified, self._key, self._shown = engine, verified, key, shown
        self._said = 0

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        if not self._said:
            self._shown += self._engine.renderer.decode(token_ids)

    async def sample(self, params: SamplingParams) -> Sampled:
        line = _LINE.findall(self._shown)[-1]
        plan = self._engine.dice.plan(self._key, line, self._verified)
        self._engine.plans[self._key] = plan
        if self._said < len(plan.moves):
            move = plan.moves[self._said]
            text = spell_call(move.tool, move.arguments)
        else:
            text = f"<answer>{f'{plan.fault}: ' if plan.fault else ''}{calculate(line)}</answer>"
        self._said += 1
        ids = self._engine.renderer.encode(text + "<|im_end|>")
        return Sampled(ids, np.zeros(len(ids), np.float32), SampleStop.END)

    def fork(self, key: int) -> ScriptedSession:
        return ScriptedSession(self._engine, self._verified, key, self._shown)

    def close(self) -> None:
        pass


class ScriptedEngine:
    """Stands where the model would be.

    Attributes:
        plans: of the episodes that gave an answer, by key.
    """

    max_context, capacity, gives_logprobs = 1 << 20, 16, True

    def __init__(self, renderer: ChatRenderer, dice: Dice, verified: bool) -> None:
        self.renderer, self.dice, self.stats = renderer, dice, EngineStats()
        self.plans: dict[int, Plan] = {}
        self._verified = verified

    def session(self, key: int) -> Any:
        return ScriptedSession(self, self._verified, key)

    def reset_stats(self) -> None:
        pass


# What breaks


def ledger(entry: str) -> str:
    """Notes something.

    Args:
        entry: what to note
    """
    return f"noted {entry}"


def brittle() -> str:
    """Raises an exception that cannot even be shown."""
    raise MuteError


def leave() -> str:
    """Leaves the program."""
    raise SystemExit(4)


@dataclass(frozen=True)
class Doze:
    """A tool that takes longer than it may.

    Args:
        seconds: that it takes.
    """

    seconds: float

    def doze(self) -> str:
        """Sleeps."""
        time.sleep(self.seconds)
        return "awake"


class _Breaking:
    """An environment that breaks in the episodes in which the dice say so.

    Args:
        dice: see :meth:`Dice.environment_fault`.
        hang: seconds that it hangs.
        **params: of the environment.
    """

    fast = False

    def __init__(self, dice: Dice, hang: float, **params: Any) -> None:
        super().__init__(**params)
        self._dice, self._hang, self._fault = dice, hang, ""

    @property
    def tools(self) -> Any:
        # Not text, not a function: the toolkit cannot make a tool of it.
        return (3,) if self._fault == "opening of tools fails" else ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._fault = self._dice.environment_fault(seed or 0, int((options or {}).get("chance", 0)))
        if self._fault == "reset raises":
            raise ConnectionError("lost")
        if self._fault == "reset hangs":
            time.sleep(self._hang)
        return super().reset(seed=seed, options=options)  # type: ignore[misc]

    def step(self, action: str) -> Any:
        if self._fault == "step raises":
            raise StopIteration
        if self._fault == "step hangs":
            time.sleep(self._hang)
        if self._fault == "step returns rubbish":
            return "x", float("nan"), True, False, {}
        return super().step(action)  # type: ignore[misc]


class BreakingCalculate(_Breaking, Calculate):
    """``calculate`` that breaks."""


class BreakingTasks(_Breaking, VerifiedTasks):
    """``tasks`` that breaks. A quarter of an hour for checks that wait for one another would hide a step that hangs."""

    step_seconds = 0.0
