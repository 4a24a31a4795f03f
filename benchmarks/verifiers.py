"""How fast completions are verified: the pool of processes over the plain library call in a loop.

Every text is an answer with a formula in it, checked against a reference. Three ways, each timed in turn:

- ``loop``: math-verify's own ``parse`` and ``verify`` in a loop of this process, with its time limits (signals), as
  its documentation shows. The reference is parsed with every answer, as there.
- ``one``: our pool with one process, which is what isolation costs: ``one_over_loop`` is its time over the loop's.
- ``pool``: our pool with one process for each of two cores: ``pool_over_loop`` is what a user waits.

Both sides give the same verdicts, which is checked first. A pool's overhead shows best where checks are cheap, so the
last number of GSM8K's answers is timed as well, without a goal: such a check takes microseconds, and sending it to a
process costs more than doing it.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, parser, ratio, report, say
from rehearsal.rewards.mathematics import LastNumber, Mathematics
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.verifier import Score, Task, Verifier

CORES = 2


def answers(count: int, seed: int) -> tuple[list[str], list[Task]]:
    """Boxed answers, half of them right, and what they are checked against; four answers to each task."""
    rng = random.Random(seed)
    forms = [
        "{a}",
        "\\frac{{{a}}}{{{b}}}",
        "{a}\\sqrt{{{b}}}",
        "x^2+{a}x+{b}",
        "({a},{b})",
        "{a}.{b}",
        "\\{{{a},{b}\\}}",
    ]
    texts, tasks = [], []
    while len(texts) < count:
        form = rng.choice(forms)
        a, b = rng.randint(2, 900), rng.randint(2, 900)
        task = Task("What is it?", form.format(a=a, b=b))
        for n in range(4):
            answer = form.format(a=a + n % 2, b=b)
            texts.append(f"We look at it from two sides, and then we see that it must be so.\n\\boxed{{{answer}}}")
            tasks.append(task)
    return texts[:count], tasks[:count]


def numbers(count: int, seed: int) -> tuple[list[str], list[Task]]:
    """Short worked answers that end in a number."""
    rng = random.Random(seed)
    pairs = [(rng.randint(2, 9000), rng.randint(2, 9000)) for _ in range(count)]
    texts = [f"First there are {a}, then {b} more, so in all it is {a + b + n % 2}." for n, (a, b) in enumerate(pairs)]
    return texts, [Task("How many?", f"#### {a + b}") for a, b in pairs]


def library_loop(texts: list[str], tasks: list[Task]) -> list[bool]:
    """The library alone, as its documentation shows it."""
    from math_verify import parse, verify

    return [bool(verify(parse(f"${task.reference}$"), parse(text))) for text, task in zip(texts, tasks, strict=True)]


def verdicts(pool: VerifierPool, texts: list[str], tasks: list[Task]) -> list[bool]:
    results = pool.verify(texts, tasks)
    failed = [result for result in results if not isinstance(result, Score)]
    if failed:
        raise SystemExit(f"{len(failed)} checks failed: {failed[0]}")
    return [result.passed for result in results if isinstance(result, Score)]


def warm_pool(verifier: Verifier, workers: int) -> VerifierPool:
    pool = VerifierPool(verifier, workers=workers, timeout=30.0)
    pool.wait_until_warm()
    return pool


def mathematics(count: int, repeats: int, seed: int) -> dict[str, float]:
    """Figures of the pool with math-verify."""
    texts, tasks = answers(count, seed)
    with warm_pool(Mathematics(), 1) as one, warm_pool(Mathematics(), CORES) as pool:
        expected = library_loop(texts, tasks)
        if not verdicts(one, texts, tasks) == verdicts(pool, texts, tasks) == expected:
            raise SystemExit("the pool and the library do not agree")
        say(f"{sum(expected)} of {count} answers are right on either side")
        round_number = [0]

        def fresh() -> tuple[list[str], list[Task]]:
            # New answers each time: both sides keep what they have parsed.
            round_number[0] += 1
            return answers(count, seed + 1 + round_number[0] // 3)

        works: dict[str, Any] = {
            "loop": lambda: library_loop(*fresh()),
            "one": lambda: verdicts(one, *fresh()),
            "pool": lambda: verdicts(pool, *fresh()),
        }
        seconds = interleaved(works, repeats)
    return {
        **ratio(seconds["one"], seconds["loop"]).figures("one_over_loop"),
        **ratio(seconds["pool"], seconds["loop"]).figures("pool_over_loop"),
        "loop_per_second": count / statistics.median(seconds["loop"]),
        "one_per_second": count / statistics.median(seconds["one"]),
        "pool_per_second": count / statistics.median(seconds["pool"]),
    }


def last_numbers(count: int, repeats: int, seed: int) -> dict[str, float]:
    """Figures of the pool with a check that takes microseconds."""
    texts, tasks = numbers(count, seed)
    verifier = LastNumber()
    with warm_pool(verifier, CORES) as pool:
        works: dict[str, Any] = {
            "loop": lambda: [verifier.verify(text, task) for text, task in zip(texts, tasks, strict=True)],
            "pool": lambda: verdicts(pool, texts, tasks),
        }
        seconds = interleaved(works, repeats)
    return {
        "last_number_loop_per_second": count / statistics.median(seconds["loop"]),
        "last_number_pool_per_second": count / statistics.median(seconds["pool"]),
    }


def main() -> int:
    options = parser(__doc__).parse_args()
    count, repeats = (300, 3) if options.quick else (2000, 9)
    figures = {
        **mathematics(count, repeats, options.seed),
        **last_numbers(count * 5, repeats, options.seed),
        "answers": float(count),
    }
    goals = {"one_over_loop": "<= 1.2", "pool_over_loop": "<= 1.2"}
    result = report("verifiers", figures, goals, [options.seed], options.quick)
    return 0 if result["holds"] or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
