"""What the diagnostics cost, as a share of the training steps that they watch.

    python benchmarks/diagnostics.py [--steps 40] [--recipe frozenlake] [--quick]

A run of a shipped recipe with the diagnostics as they come: information between prompts and thoughts every few steps,
gradients of single groups now and then, behaviour and rewards in every step. The time of every part is taken inside the
run, so the share is that of one and the same machine at one and the same time.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import parser, report, say
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.recipe import resolve_recipe


class Teller(SilentObserver):
    def step(self, step: int, metrics: object) -> None:
        say(f"step {step}")


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--recipe", default="frozenlake")
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    changes = {"training.steps": 4, "training.groups": 8} if options.quick else {"training.steps": options.steps}
    trainer = Trainer(
        resolve_recipe(
            options.recipe,
            {"seed": options.seed, "evaluation.episodes": 0, "evaluation.every": 0, "checkpoint.every": 0, **changes},
        ),
        observer=Teller(),
    )
    trainer.run()
    rows = trainer.history
    total = sum(row["time/step"] for row in rows)
    probed = [row for row in rows if "gradient/policy/norm" in row]
    informed = [row for row in rows if "information/first/prompts" in row and row not in probed]
    plain = [row for row in rows if row not in probed and row not in informed]

    def share(some: list[dict[str, float]]) -> float:
        return sum(row["time/diagnostics"] for row in some) / max(sum(row["time/step"] for row in some), 1e-9)

    figures = {
        "share": sum(row["time/diagnostics"] for row in rows) / total,
        "share_of_steps_with_information": share(informed),
        "share_of_steps_with_gradients": share(probed),
        "share_of_other_steps": share(plain),
        "steps": len(rows),
        "steps_with_information": len(informed),
        "steps_with_gradients": len(probed),
        "prompts": statistics.mean(
            row["information/first/prompts"] for row in rows if "information/first/prompts" in row
        ),
        "seconds_a_step": total / len(rows),
    }
    result = report("diagnostics", figures, {"share": "<= 0.1"}, [options.seed], options.quick)
    return 0 if result["holds"] or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
