"""The plots of a report: which metrics they show, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass

from rehearsal.reports.plots import Unit


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
    """

    title: str
    note: str
    metrics: dict[str, str]
    unit: Unit = "number"
    zero: bool = True
    evaluated: str = ""
    smooth: bool = True


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
        Plan("Entropy", "Nats a token. Towards zero, it tries nothing new any more.", {"policy/entropy": "policy"}),
        Plan(
            "Gradient norm",
            "Before clipping. Single peaks are harmless; a steady rise comes before divergence.",
            {"policy/grad_norm": "all parameters"},
        ),
        Plan(
            "Sampling against training",
            "KL divergence between the policy that sampled and the one that learns. It should stay near zero.",
            {"policy/kl_sampling": "KL"},
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
            "Gaps filled",
            "Share of gaps in held-out episodes that the policy fills right: what comes of an action, which action "
            "lies between two states, which is the best.",
            {
                "probe/forward/accuracy": "what comes",
                "probe/inverse/accuracy": "action between",
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
    ],
}

SIGNAL_PLANS: dict[str, list[Plan]] = {
    "Is there something to learn from?": [
        Plan(
            "Dead groups",
            "Share of groups whose episodes all got the same reward: they teach the policy nothing. Near 100%, the "
            "tasks are too easy or too hard.",
            {
                "signal/dead_groups": "all",
                "signal/dead_groups_solved": "all solved",
                "signal/dead_groups_failed": "none solved",
            },
            "share",
        ),
        Plan(
            "Kept groups",
            "Share of the played groups that the policy learned from, after the filter.",
            {"signal/kept_share": "kept"},
            "share",
        ),
        Plan(
            "Spread of rewards",
            "Standard deviation of the reward inside a group: what advantages are made of.",
            {"signal/reward_std_in_group": "inside groups"},
        ),
        Plan(
            "Updates",
            "Optimiser updates of a step: fewer of them are not a better signal.",
            {"policy/updates": "updates"},
            smooth=False,
        ),
    ],
    "Do thoughts depend on their prompts?": [
        Plan(
            "Information",
            "I(X;Z) over its ceiling. At 100% every thought tells its prompt from all others of the sample.",
            {
                "information/first/sequence/share": "first turn",
                "information/all/sequence/share": "all turns",
            },
            "share",
        ),
        Plan(
            "Retrieval",
            "How often a thought is likeliest under the prompt that it was an answer to, against guessing.",
            {
                "information/first/sequence/retrieval": "first turn",
                "information/all/sequence/retrieval": "all turns",
                "information/first/chance": "guessing",
            },
            "share",
        ),
        Plan(
            "Information a token",
            "The same by the published code's definition: of log-likelihoods divided by the thought's length.",
            {
                "information/first/per_token/mutual_information": "first turn",
                "information/all/per_token/mutual_information": "all turns",
            },
        ),
        Plan(
            "Shared phrases",
            "Runs of four tokens that stand in more than half of the first thoughts: the template.",
            {"behaviour/shared_ngrams": "shared", "behaviour/distinct_ngrams": "distinct"},
            "share",
        ),
    ],
    "Signal and noise": [
        Plan(
            "Gradient",
            "Mean norm of the gradient of a single group, by objective. Above the policy's, a term other than the "
            "reward moves the weights.",
            {
                "gradient/policy/norm": "policy",
                "gradient/kl/norm": "KL",
                "gradient/entropy/norm": "entropy",
            },
        ),
        Plan(
            "Agreement of groups",
            "What groups' gradients have in common over what they differ by. A step of P groups has the square root "
            "of P times as much.",
            {"gradient/policy/snr": "policy"},
        ),
        Plan(
            "Effective samples",
            "Share of the tokens that the step is worth after importance weights.",
            {"policy/effective_sample_share": "share"},
            "share",
            zero=False,
        ),
        Plan(
            "Engine against learner",
            "Difference of log-probs before the first update, nats a token. More than rounding is a defect.",
            {"policy/mismatch_first": "difference"},
        ),
    ],
    "What it does": [
        Plan(
            "Entropy by kind",
            "Nats a token, of thoughts and of answers.",
            {"behaviour/entropy_thought": "thoughts", "behaviour/entropy_action": "answers"},
        ),
        Plan(
            "Length by kind",
            "Tokens a turn, tags included.",
            {"behaviour/thought_tokens": "thoughts", "behaviour/answer_tokens": "answers"},
            "tokens",
        ),
        Plan(
            "Going in circles",
            "Share of turns that begin where the episode has been before, and of valid ones that change nothing.",
            {"behaviour/repeated_states": "been before", "behaviour/unchanged_states": "changed nothing"},
            "share",
        ),
        Plan(
            "Answers that are no use",
            "Share of turns with a broken or illegal answer, and of those that were cut off.",
            {"behaviour/invalid_turns": "broken or illegal", "behaviour/cut_off": "cut off"},
            "share",
        ),
    ],
}
"""The plots of the page of signal."""
