"""What the reward of a turn is made of, in words."""

from __future__ import annotations

from rehearsal.trajectory import Turn


def made_of(turn: Turn) -> str:
    """Parts, what the recipe added, rules that were broken and duties that were done; "" where nothing is told."""
    amounts = [*turn.parts.items(), *((name, amount) for name, amount in turn.shaping.items() if amount)]
    told = [", ".join(f"{name} {amount:+.3g}".replace("-", "−") for name, amount in amounts)]
    told += [f"broke {', '.join(turn.violations)}" if turn.violations else ""]
    told += [f"did {', '.join(turn.obligations)}" if turn.obligations else ""]
    return "; ".join(text for text in told if text)
