"""The plots of the learning curves: which metrics they show, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from rehearsal.reports.scales import Unit


@dataclass(frozen=True)
class Plan:
    """A plot of training metrics, and of the same quantity in held-out evaluations where they have it.

    Attributes:
        title: of the plot.
        note: how to read it.
        metrics: legend by metric name, the main one first.
        unit: of the values.
        zero: see :class:`rehearsal.reports.plots.Chart`.
        evaluated: name of the quantity in evaluations, "" if they do not have it.
        smooth: whether single steps are noise around a running mean.
        errors: names of the standard errors of these metrics, which become bands of 95%.
        marks: metrics that are not drawn here, whose verdicts are marked here all the same.
    """

    title: str
    note: str
    metrics: dict[str, str]
    unit: Unit = "number"
    zero: bool = True
    evaluated: str = ""
    smooth: bool = True
    errors: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


PLANS: dict[str, list[Plan]] = {
    "How it plays": [
        Plan(
            "Reward",
            "Mean reward of an episode, penalties included.",
            {"train/reward": "train"},
            zero=False,
            evaluated="reward",
        ),
        Plan(
            "Response length",
            "Sampled tokens of one answer. Falling with success: it learned to be brief. Rising without: it rambles.",
            {"train/response_tokens": "train"},
            "tokens",
            evaluated="response_tokens",
        ),
        Plan("Turns", "Exchanges in one episode.", {"train/turns": "train"}, evaluated="turns"),
        Plan(
            "Answers it could not use",
            "Share of turns whose answer broke the format, or named an action that is not legal.",
            {"train/format_errors": "format errors", "train/illegal_actions": "illegal actions"},
            "share",
            evaluated="format_errors",
        ),
    ],
    "The policy": [
        Plan("Entropy", "Nats a token. Towards zero, it tries nothing new any more.", {"behaviour/entropy": "policy"}),
        Plan(
            "Gradient norm",
            "Before clipping. Single peaks are harmless; a steady rise comes before divergence.",
            {"policy/grad_norm": "all parameters"},
        ),
        Plan(
            "Sampling against training",
            "KL divergence between the policy that sampled and the one that learns, in steps of several updates. It "
            "should stay near zero.",
            {"policy/moved": "KL"},
        ),
        Plan(
            "Distance from the start",
            "KL divergence from the policy that the run began with, nats a token.",
            {"policy/kl_reference": "KL"},
        ),
        Plan(
            "Clipped tokens",
            "Share of tokens whose ratio left the trust region.",
            {"policy/clipped_high": "above", "policy/clipped_low": "below"},
            "share",
        ),
        Plan(
            "Ratio",
            "Mean probability ratio of new to old policy. It should stay near 1.",
            {"policy/ratio": "ratio"},
            zero=False,
        ),
        Plan("Learning rate", "As the schedule set it.", {"policy/learning_rate": "learning rate"}, smooth=False),
    ],
    "What it knows of the world": [
        Plan(
            "Prediction of answers",
            "Nats a token of what the environment answers. Falling: it learns how the world answers; the held-out line "
            "says whether that holds for tasks it has not met.",
            {
                "world/prediction_loss": "in training",
                "hindsight/prediction_loss": "what it rehearsed",
                "replay/prediction_loss": "past situations",
            },
            evaluated="prediction_loss",
        ),
        Plan(
            "Words held",
            "Nats a token that the agent's own words lose while the world model goes on learning. Rising: it spoils "
            "what the policy says.",
            {"hold/lost": "lost"},
        ),
        Plan(
            "Answers to learn from",
            "Tokens of answers that the world model learned in a step. At 0 it stands still.",
            {"world/target_tokens": "tokens"},
        ),
        Plan(
            "Gaps filled",
            "Share of gaps in held-out episodes that the policy fills right: what comes of an action, which action "
            "lies between two states (asked in words, and by what comes of each), which is the best.",
            {
                "probe/forward/accuracy": "what comes",
                "probe/inverse/accuracy": "action between, in words",
                "probe/by_forward/accuracy": "action between",
                "probe/action/accuracy": "best action",
            },
            "share",
            smooth=False,
        ),
        Plan(
            "Perplexity of answers",
            "A token. Above the number of symbols the world is foreign to the policy.",
            {"probe/perplexity": "perplexity", "probe/symbols": "symbols"},
            smooth=False,
        ),
        Plan(
            "Rehearsals",
            "Share of rehearsed actions that were taken, so that their answer is known; and of those, whose answer "
            "came out word for word.",
            {"rehearse/answered": "answered", "rehearse/foretold": "foretold"},
            "share",
        ),
        Plan(
            "Gradient norm of the world model",
            "Before clipping.",
            {"world/grad_norm": "world adapter"},
        ),
    ],
    "What it asks of others": [
        Plan(
            "Requests to the judge",
            "In a step. What the cache answers costs nothing.",
            {"judge/requests": "answered by the model", "judge/cached": "from the cache"},
        ),
        Plan(
            "Tokens of the judge",
            "In a step, as its server counts them.",
            {"judge/prompt_tokens": "read", "judge/completion_tokens": "written"},
            "tokens",
        ),
        Plan("Price of the judge", "In a step, by the prices given.", {"judge/money": "price"}),
        Plan(
            "Calls in the sandbox",
            "In a step, by level of isolation.",
            {f"sandbox/{level}": level for level in ("rlimits", "filters", "namespaces", "bubblewrap", "remote")},
        ),
    ],
    "How fast it runs": [
        Plan(
            "Tokens a second",
            "Sampled tokens, while generating.",
            {"speed/tokens_per_second": "tokens/s"},
            "tokens",
        ),
        Plan(
            "Episodes a second",
            "Whole episodes played, over all of a step.",
            {"speed/episodes_per_second": "episodes/s"},
        ),
        Plan("Time of a step", "Seconds from one update to the next.", {"time/step": "step"}, "seconds"),
        Plan(
            "Cost of the diagnostics",
            "Share of the time of a step.",
            {"time/diagnostics_share": "diagnostics"},
            "share",
        ),
    ],
}
"""The plots of the learning curves by the question that they answer."""
