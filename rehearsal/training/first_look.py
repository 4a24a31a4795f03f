"""What is wrong with the first episodes of a run, if anything: nothing done that its environment understands, or no
room for the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rehearsal.training.options import AgentOptions
from rehearsal.trajectory import Group, SampleStop, Turn, all_trajectories

_NEARLY_ALL = 0.95
_FEWEST_TURNS = 4
_MAX_QUOTED = 60
_MANY_CUT = 0.05
"""A share of cut-off answers above which rehearsing has too little room."""


def first_look(groups: Sequence[Group], *, base: bool = False) -> str | None:
    """What to tell where nearly all answers were unreadable or illegal: then nothing can be learnt, and the figures
    (a reward of nothing but penalties) do not say why.

    Args:
        groups: the first episodes of a run.
        base: whether the policy is the model that ships.

    Returns:
        one sentence with an example and what to do; None where the environment is stepped now and then.
    """
    turns = [turn for one in all_trajectories(groups) if not one.failed for turn in one.turns]
    idle = [turn for turn in turns if not turn.executed and not turn.calls]
    if len(turns) < _FEWEST_TURNS or len(idle) < _NEARLY_ALL * len(turns):
        return None
    unreadable = [turn for turn in idle if not turn.actions]
    cut = [turn for turn in unreadable if turn.stop != SampleStop.END]
    if len(unreadable) <= len(idle) / 2:
        example = _commonest([turn.actions[0] for turn in idle if turn.actions])
        advice = (
            "name the actions and how they are written in its instructions, let parse_action take what is written, or "
            "begin with a model that knows them"
        )
    elif len(cut) > len(unreadable) / 2:
        example = _commonest([_answer(turn) for turn in cut])
        advice = "most answers were cut off before they came to an action, so raise agent.max_tokens_per_turn"
    else:
        example = _commonest([_answer(turn) for turn in unreadable])
        advice = "begin with a model that keeps the answer format, such as an instruction-tuned one"
    if base:
        # Where it babbles, more room would only make it babble longer.
        known = "the base model knows the built-in environments alone, and another one is given by --model.path"
        advice = known if len(unreadable) > len(idle) / 2 else f"{advice}; {known}"
    steps = len(turns) - len(idle)
    stepped = "never stepped" if steps == 0 else f"stepped in {steps} of them alone"
    return (
        f'The policy wrote no legal action in {len(idle)} of {len(turns)} turns, such as "{example}"; your environment '
        f"was {stepped}; {advice}."
    )


def cut_off_warning(agent: AgentOptions, share: float) -> str | None:
    """A sentence about a policy that rehearses and has too little room for it, if it has: its format has then little
    chance to be learnt, and the reward punishes rehearsing.

    Args:
        agent: of the recipe.
        share: of the answers that were cut off.
    """
    if not agent.rehearse or share <= _MANY_CUT:
        return None
    return (
        f"{100 * share:.0f}% of the answers were cut off after {agent.max_tokens_per_turn} tokens, since a rehearsal "
        "writes the expected answer too: raise agent.max_tokens_per_turn (FrozenLake 4x4 takes about 160, Sokoban 6x6 "
        "about 224), and agent.max_context with it."
    )


def _answer(turn: Turn) -> str:
    return turn.response or "(nothing)"


def _commonest(texts: Sequence[str]) -> str:
    text, _ = Counter(" ".join(text.split()) for text in texts).most_common(1)[0]
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
