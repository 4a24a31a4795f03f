"""The plots of the page of signal: which metrics they show, and how to read them."""

from __future__ import annotations

from rehearsal.reports.chart_plans import Plan

SIGNAL_PLANS: dict[str, list[Plan]] = {
    "Is there something to learn from?": [
        Plan(
            "Dead groups",
            "Share of groups whose episodes all got the same reward: what compares these learns nothing from them. "
            "Near 100%, the tasks are too easy or too hard.",
            {
                "signal/dead_groups": "all",
                "signal/dead_groups_solved": "all solved",
                "signal/dead_groups_failed": "none solved",
                "signal/dead_groups_equal": "equal scores",
            },
            "share",
        ),
        Plan(
            "Kept episodes",
            "Share of the played episodes with a reward that the filter left for the policy.",
            {"signal/kept_share": "kept"},
            "share",
        ),
        Plan(
            "Spread of rewards",
            "Standard deviation of the reward. What is spread inside a group makes advantages; what is spread over all "
            "episodes also tells easy tasks from hard ones.",
            {"signal/reward_std_in_group": "inside groups", "train/reward_std": "all episodes"},
        ),
        Plan(
            "Reward and success",
            "Their correlation inside groups. Near 1, the reward pays for success; near 0 or below, for something "
            "else.",
            {"signal/success_correlation": "correlation"},
        ),
        Plan(
            "Unevenness of groups",
            "Standard deviation of the groups' variances over their mean. In published runs dropping groups of little "
            "variance helped above 1 and harmed near a third.",
            {"signal/variance_spread": "variances"},
        ),
        Plan(
            "Self-certainty",
            "How far the policy's predictions are from a uniform guess, nats a token. Rising while the reward falls: "
            "it grows surer and worse.",
            {"signal/self_certainty": "policy"},
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
                "information/all/chance": "guessing, all turns",
            },
            "share",
        ),
        Plan(
            "Standing out",
            "Information over how much thoughts differ in likelihood (z-score). Smoothed over steps it went with "
            "success best of all that was published.",
            {
                "information/first/sequence/z_score_smoothed": "first turn, smoothed",
                "information/all/sequence/z_score_smoothed": "all turns, smoothed",
                "information/first/sequence/z_score": "first turn",
                "information/all/sequence/z_score": "all turns",
            },
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
    "Can the updates be trusted?": [
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
    "How information was measured": [
        Plan(
            "Information in nats",
            "I(X;Z) of whole thoughts, with its 95% interval, and the most that so many prompts can show.",
            {
                "information/first/sequence/mutual_information": "first turn",
                "information/all/sequence/mutual_information": "all turns",
                "information/first/ceiling": "ceiling",
                "information/all/ceiling": "ceiling, all turns",
            },
            errors={
                "information/first/sequence/mutual_information": "information/first/sequence/standard_error",
                "information/all/sequence/mutual_information": "information/all/sequence/standard_error",
            },
        ),
        Plan(
            "Entropy of thoughts",
            "Nats a thought, under its own prompt and under all of them. The difference is the information.",
            {
                "information/first/sequence/conditional_entropy": "first turn, own prompt",
                "information/all/sequence/conditional_entropy": "all turns, own prompt",
                "information/first/sequence/entropy": "first turn, any prompt",
                "information/all/sequence/entropy": "all turns, any prompt",
            },
        ),
        Plan(
            "Entropy of thoughts a token",
            "The same by the published code's definition.",
            {
                "information/first/per_token/conditional_entropy": "first turn, own prompt",
                "information/all/per_token/conditional_entropy": "all turns, own prompt",
                "information/first/per_token/entropy": "first turn, any prompt",
                "information/all/per_token/entropy": "all turns, any prompt",
            },
        ),
        Plan(
            "Share and retrieval a token",
            "Information over its ceiling and how often the own prompt is found, by the published code's definition.",
            {
                "information/first/per_token/share": "share, first turn",
                "information/all/per_token/share": "share, all turns",
                "information/first/per_token/retrieval": "retrieval, first turn",
                "information/all/per_token/retrieval": "retrieval, all turns",
            },
            "share",
        ),
        Plan(
            "Standing out a token",
            "The z-scores by the published code's definition.",
            {
                "information/first/per_token/z_score_smoothed": "first turn, smoothed",
                "information/all/per_token/z_score_smoothed": "all turns, smoothed",
                "information/first/per_token/z_score": "first turn",
                "information/all/per_token/z_score": "all turns",
            },
        ),
        Plan(
            "At the ceiling",
            "1 where the estimate is so near the most that it can show that the truth may lie far above.",
            {
                "information/first/sequence/saturated": "first turn",
                "information/all/sequence/saturated": "all turns",
                "information/first/per_token/saturated": "first turn, a token",
                "information/all/per_token/saturated": "all turns, a token",
            },
            smooth=False,
        ),
        Plan(
            "Sample",
            "How many thoughts and prompts were compared with each other.",
            {
                "information/first/thoughts": "thoughts, first turn",
                "information/all/thoughts": "thoughts, all turns",
                "information/first/prompts": "prompts, first turn",
                "information/all/prompts": "prompts, all turns",
            },
            smooth=False,
        ),
        Plan(
            "Tokens scored",
            "What the measurement costs.",
            {"information/first/tokens": "first turn", "information/all/tokens": "all turns"},
            "tokens",
            smooth=False,
        ),
        Plan(
            "Empty thoughts",
            "Share of the thoughts that say nothing, and so nothing about their prompt.",
            {"information/first/empty": "first turn", "information/all/empty": "all turns"},
            "share",
        ),
    ],
    "How much was played": [
        Plan(
            "Groups",
            "Played, and kept by the filter.",
            {"signal/played_groups": "played", "signal/kept_groups": "kept"},
            smooth=False,
        ),
        Plan(
            "Episodes",
            "Played, kept by the filter, and broken off without a reward.",
            {"train/episodes": "played", "signal/kept_episodes": "kept", "train/failed_episodes": "broken off"},
            smooth=False,
        ),
        Plan(
            "Rounds of play",
            "More than one: groups were played again, because the filter left too few.",
            {"signal/rounds": "rounds"},
            smooth=False,
        ),
    ],
}
"""The plots of the page of signal by the question that they answer."""

FOLDED = ("How information was measured", "How much was played")
"""Which of them wait behind a line that opens them: what one looks at to trust the others."""
