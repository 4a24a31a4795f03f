"""The rules of the verdict: what can be wrong with a run, how it shows, what it means and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rehearsal.diagnostics.dead_groups import Cause, DeadGroups, cause_of, dead_groups
from rehearsal.diagnostics.series import Series
from rehearsal.diagnostics.tool_use import TOOL_FIGURES, abandoned_tools


@dataclass(frozen=True)
class Thresholds:
    """The numbers in the rules. Shares are of 1.

    Attributes:
        dead: of groups without reward variance, from which on there is no signal to speak of.
        solved: of groups in which every episode succeeds, from which on the tasks are too easy. A run that has learned
            its tasks comes near it without anything being wrong.
        information_low: I(X;Z) over its ceiling, below which thoughts hardly depend on prompts.
        information_fall: the same over what it was at the start.
        ignored: I(X;Z) over its ceiling, two standard errors included, below which thoughts have nothing to do with
            prompts.
        varied: H(Z|X) over what it was at the start, above which thoughts count as varied.
        entropy_fall: entropy over what it was at the start.
        entropy_rise: entropy over what it was at the start, above which the policy is on its way to chance.
        large_step: KL divergence, in nats a token, between the policy that played and the one that learns, while
            it learns from what was played.
        unpaid: correlation of reward and success inside groups, below which the reward pays for something else.
        unpaid_fall: the same correlation over its highest mean, below which the reward has ceased to pay for success.
        surer: self-certainty over what it was at the start.
        success_done: a run that succeeds this often may be sure of itself.
        spread_fall: in-group spread over its highest mean.
        reward_fall: fall of the mean reward from its highest mean, in units of the highest mean of in-group spread.
        spike: gradient norm over its median.
        noise: signal-to-noise ratio of the gradient over all groups.
        longer, shorter: length of thoughts over what it was at the start.
        invalid: of turns with broken or illegal answers, above what it was at the start.
        mismatch: mean difference of log-probs between generation and learning before the first update, in nats.
        success_fall: fall of success from its highest mean, over that mean.
        tool_use: share of the episodes that call a tool, over its highest mean, below which the tool is given up.
        certain: standard errors that a rise or a fall must have to be more than chance.
    """

    dead: float = 0.75
    solved: float = 0.85
    information_low: float = 0.25
    information_fall: float = 0.5
    ignored: float = 0.1
    varied: float = 0.5
    entropy_fall: float = 0.075
    entropy_rise: float = 2.0
    large_step: float = 0.01
    unpaid: float = 0.08
    unpaid_fall: float = 0.25
    surer: float = 1.2
    success_done: float = 0.85
    spread_fall: float = 0.5
    reward_fall: float = 0.4
    spike: float = 4.0
    noise: float = 0.05
    longer: float = 1.75
    shorter: float = 0.5
    invalid: float = 0.15
    mismatch: float = 0.02
    success_fall: float = 0.2
    tool_use: float = 0.2
    certain: float = 3.0


Condition = Callable[[Series, Thresholds], "str | None"]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        name: short, as ``diagnostics.stop_on`` names it.
        title: for people.
        sentence: what it means.
        suggestion: what to try.
        needs: a metric without which it cannot be judged in a step; "*" in it stands for what differs by run, as the
            names of environments.
        condition: returns the evidence if it holds for the last step of a series, else None.
        begins_after: judged steps in a row with the condition before the verdict begins.
        ends_after: judged steps in a row without it before the verdict ends.
        looks: values of the metric that there must be before all of the condition can be judged.
        unless: a metric, as in ``needs``, in whose presence the condition would say nothing of the policy, so that it
            is not judged; "" for none.
    """

    name: str
    title: str
    sentence: str
    suggestion: str
    needs: str
    condition: Condition
    begins_after: int = 3
    ends_after: int = 5
    looks: int = 1
    unless: str = ""

    @property
    def first_call(self) -> int:
        """Values of the metric that there must be before the rule can say all that it is for."""
        return self.looks + self.begins_after - 1


_SPREAD = "signal/reward_std_in_group"
_ADAPTIVE = "curriculum/adaptive*"
"""Told by curricula that choose tasks by success: success and reward in training are where such a one puts them."""
_SAME_TIME = 2
"""Steps that two falls may be apart by chance: means of five steps tell no order that is finer than half of them."""
_PERPLEXITIES = "probe/*perplexity"
_IGNORED_LOOKS = 4
_NOISE_LOOKS = 4
_UNPAID_LOOKS = 5
_LASTING = 5
"""Judged steps in a row for what the tasks of one step can feign, as long as it is among the five that means are taken
over."""
_PAID = 0.5
"""Correlation of reward and success from which on a run has paid for success."""
_LARGE_LOOKS = 3


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _cause(series: Series, limits: Thresholds) -> tuple[Cause | None, DeadGroups]:
    """The rule that says why groups are dead, and their shares; None while there is enough to compare."""
    found = dead_groups(series)
    return cause_of(found, dead=limits.dead, solved=limits.solved, done=limits.success_done), found


def _too_easy(series: Series, limits: Thresholds) -> str | None:
    cause, found = _cause(series, limits)
    return f"In {_percent(found.solved)} of the groups every episode succeeds." if cause == "too_easy" else None


def _too_hard(series: Series, limits: Thresholds) -> str | None:
    cause, found = _cause(series, limits)
    return f"In {_percent(found.failed)} of the groups no episode succeeds." if cause == "too_hard" else None


def _no_signal(series: Series, limits: Thresholds) -> str | None:
    cause, found = _cause(series, limits)
    if cause != "no_signal":
        return None
    mixture = f": {found.mixture}" if found.mixture else ""
    return f"In {_percent(found.dead)} of the groups all episodes have the same reward{mixture}."


def _all_or_nothing(series: Series, limits: Thresholds) -> str | None:
    cause, found = _cause(series, limits)
    if cause != "all_or_nothing":
        return None
    return (
        f"In {_percent(found.solved)} of the groups every episode succeeds, and in {_percent(found.failed)} none does."
    )


def _template_collapse(series: Series, limits: Thresholds) -> str | None:
    name = "information/first/sequence/share"
    share, start = series.recent(name, 3), series.start(name)
    varied = series.recent("information/first/sequence/conditional_entropy", 3)
    varied_start = series.start("information/first/sequence/conditional_entropy")
    if not share < limits.information_low or not share < limits.information_fall * start:
        return None
    if not varied >= limits.varied * varied_start:
        return None
    retrieval = series.recent("information/first/sequence/retrieval", 3)
    return (
        f"Thoughts carry {_percent(share)} of what they could say about their prompt ({_percent(start)} at the start), "
        f"and are as varied as before ({varied:.1f} nats, {varied_start:.1f} at the start); the prompt that a thought "
        f"belongs to is found in {_percent(retrieval)} of the cases."
    )


def _prompt_ignored(series: Series, limits: Thresholds) -> str | None:
    prefix = "information/first/sequence"
    # Ceilings differ a little from look to look; the share says how large each was.
    start, now = series.start(f"{prefix}/share"), series.recent(f"{prefix}/share", 3)
    found, error = series.recent(f"{prefix}/mutual_information", 3), series.recent(f"{prefix}/standard_error", 3)
    slack = 2 * error * now / found if now * found > 0 else 0.0
    if len(series.measured(f"{prefix}/share")) < _IGNORED_LOOKS or not max(start, now) + slack < limits.ignored:
        return None
    retrieval = series.recent(f"{prefix}/retrieval", 3)
    return (
        f"Thoughts carry {_percent(max(now, 0.0))} of what they could say about their prompt, and did from the start; "
        f"the prompt that a thought belongs to is found in {_percent(retrieval)} of the cases."
    )


def _entropy_collapse(series: Series, limits: Thresholds) -> str | None:
    entropy, start = series.recent("behaviour/entropy"), series.start("behaviour/entropy")
    success = series.recent("train/success")
    if not entropy < limits.entropy_fall * start or success >= limits.success_done:
        return None
    return f"The entropy is {entropy:.3g} nats a token, {_percent(entropy / start)} of what it was at the start."


def _entropy_rise(series: Series, limits: Thresholds) -> str | None:
    entropy, start = series.recent("behaviour/entropy", 3), series.start("behaviour/entropy")
    if not entropy > limits.entropy_rise * start:
        return None
    return f"The entropy is {entropy:.3g} nats a token, {entropy / start:.1f} times what it was at the start."


def _large_steps(series: Series, limits: Thresholds) -> str | None:
    # The median: now and then a single step of a healthy run is ten times as large as those around it. It is what keeps
    # a single step from being called, so it need not hold for several steps besides.
    moved = series.recent_median("policy/moved")
    if len(series.measured("policy/moved")) < _LARGE_LOOKS or not moved > limits.large_step:
        return None
    return f"While it learns from a batch, the policy moves {moved:.3f} nats a token away from the one that played it."


def _no_progress(series: Series, limits: Thresholds) -> str | None:
    if _cause(series, limits)[0] is not None:
        return None  # that has a name of its own
    if series.recent("train/success") >= limits.success_done:
        return None
    if not series.rise("train/reward") < limits.certain:
        return None
    return (
        f"After {series.step} steps the reward is {series.recent('train/reward', 10):.3g}; it was "
        f"{series.start('train/reward', 5):.3g} in the first ones."
    )


def _success_unpaid(series: Series, limits: Thresholds) -> str | None:
    name = "signal/success_correlation"
    paid, best, now = series.recent(name), series.best(name), series.recent(name, 2)
    if len(series.measured(name)) >= _UNPAID_LOOKS and paid < limits.unpaid:
        return f"Inside groups the correlation of reward and success is {paid:.2f}."
    # What has paid and all at once does not is seen in a look or two. Where nearly all succeed it means nothing: groups
    # in which everybody does have rewards that differ, and no success to go with them.
    broke = best >= _PAID and now < limits.unpaid_fall * best
    if not broke or series.recent("train/success", 2) >= limits.success_done:
        return None
    return f"Inside groups the correlation of reward and success fell from {best:.2f} to {now:.2f}."


def _echo_trap(series: Series, limits: Thresholds) -> str | None:
    spread, best_spread = series.recent(_SPREAD), series.best(_SPREAD)
    reward, best_reward = series.recent("train/reward"), series.best("train/reward")
    if not spread < limits.spread_fall * best_spread:
        return None
    if not best_reward - reward > limits.reward_fall * max(best_spread, 1e-12):
        return None
    # Alike is what episodes become where a task is solved, too: the reward must have fallen beyond chance.
    if not series.fall("train/reward") > limits.certain:
        return None
    # Elsewhere the reward falls first, and its spread follows because less is left to differ by.
    if not series.fell_at(_SPREAD) <= series.fell_at("train/reward") + _SAME_TIME:
        return None
    norms = series.measured("policy/grad_norm")
    spike = float(norms[-5:].max() / max(float(sorted(norms)[len(norms) // 2]), 1e-12)) if len(norms) else math.nan
    gradient = f" The gradient has jumped to {spike:.1f} times its median." if spike > limits.spike else ""
    return (
        f"The spread of rewards inside groups fell to {_percent(spread / best_spread)} of its best, and the reward "
        f"from {best_reward:.3g} to {reward:.3g}.{gradient}"
    )


def _noise(series: Series, limits: Thresholds) -> str | None:
    ratio = series.recent("gradient/policy/snr", _NOISE_LOOKS)
    task = series.recent("gradient/policy/norm", 3)
    others = {
        "KL term": series.recent("gradient/kl/norm", 3),
        "entropy bonus": series.recent("gradient/entropy/norm", 3),
    }
    louder = {name: norm for name, norm in others.items() if norm > task}
    if louder:
        name = max(louder, key=lambda key: louder[key])
        if louder[name] > 100 * task:
            return f"Beside the gradient of the {name} the rewards give next to none."
        return f"The gradient of the {name} is {louder[name] / task:.1f} times that of the rewards."
    # A look at a few groups cannot tell a small ratio from none, and a small one is enough where many groups are
    # averaged. So several looks have to find nothing, and the run has to have got nowhere. The verdict waits for a
    # second one in a row, so one less than all of them begins it.
    if not series.fresh("gradient/policy/snr") or len(series.measured("gradient/policy/snr")) < _NOISE_LOOKS - 1:
        return None
    got_nowhere = series.recent("train/reward") <= series.start("train/reward") + series.start(_SPREAD) / 4
    if ratio < limits.noise and got_nowhere and not series.fresh(_ADAPTIVE):
        return (
            f"What groups' gradients agree on is {_percent(ratio)} of what they differ by, and the reward is where it "
            "was."
        )
    return None


def _length_drift(series: Series, limits: Thresholds) -> str | None:
    length, start = series.recent("behaviour/thought_tokens"), series.start("behaviour/thought_tokens")
    if not (length > limits.longer * start or length < limits.shorter * start):
        return None
    return f"Thoughts have {length:.0f} tokens, {start:.0f} at the start."


def _format_lost(series: Series, limits: Thresholds) -> str | None:
    broken, start = series.recent("behaviour/invalid_turns"), series.start("behaviour/invalid_turns")
    if not broken > start + limits.invalid:
        return None
    return (
        f"{_percent(broken)} of the answers break the format or name illegal actions, {_percent(start)} at the start."
    )


def _disagree(series: Series, limits: Thresholds) -> str | None:
    mismatch = series.recent("policy/mismatch_first", 3)
    if not mismatch > limits.mismatch:
        return None
    return f"Before any update the learner's log-probs differ from the engine's by {mismatch:.3f} nats a token."


def _success_fell(series: Series, limits: Thresholds) -> str | None:
    success, best = series.recent("train/success"), series.best("train/success")
    if not success < (1 - limits.success_fall) * best or not series.fall("train/success") > limits.certain:
        return None
    return f"Success fell from {_percent(best)} to {_percent(success)}."


def _sure_and_worse(series: Series, limits: Thresholds) -> str | None:
    certainty, start = series.recent("signal/self_certainty"), series.start("signal/self_certainty")
    reward, best = series.recent("train/reward"), series.best("train/reward")
    if not certainty > limits.surer * start:
        return None
    if not best - reward > limits.reward_fall * max(series.best(_SPREAD), 1e-12):
        return None
    if not series.fall("train/reward") > limits.certain:
        return None
    return (
        f"Self-certainty rose from {start:.3g} to {certainty:.3g} nats, and the reward fell from {best:.3g} to "
        f"{reward:.3g}."
    )


def _foreign_world(series: Series, limits: Thresholds) -> str | None:
    told = []
    for name in series.fresh_like(_PERPLEXITIES):
        lead = name.removesuffix("perplexity")
        perplexity, symbols = series.last(name), series.last(f"{lead}symbols")
        if perplexity > symbols:
            where = lead.removeprefix("probe/").rstrip("/") or "the environment"
            told.append(
                f"The perplexity of what {where} answers is {perplexity:.0f}, and it has {symbols:.0f} symbols."
            )
    return " ".join(told) or None


def _nothing_to_foretell(series: Series, limits: Thresholds) -> str | None:
    if series.recent("world/target_tokens", 3) != 0:
        return None
    return "In the last steps there were 0 tokens of answers to learn, and the world model stands still."


def _tool_abandoned(series: Series, limits: Thresholds) -> str | None:
    found = abandoned_tools(series, share=limits.tool_use, certain=limits.certain, done=limits.success_done)
    if not found:
        return None
    told = []
    for one in found:
        failed = "" if math.isnan(one.failures) else f", when {_percent(one.failures)} of its calls failed"
        told.append(f"{_percent(one.now)} of the episodes call {one.name}; it was {_percent(one.most)}{failed}.")
    evidence = " ".join(told)
    before, after, scale = found[0].before, found[0].after, found[0].scale
    if math.isnan(before):
        return evidence
    spell = _percent if scale == "success" else "{:.3g}".format
    return f"{evidence} Since then {scale} went from {spell(before)} to {spell(after)}."


# What changes the algorithm or the filter makes another run of it, which --resume refuses.
_FROM_BEFORE = (
    "in a new run from a checkpoint from before (rehearsal export RUN FOLDER --step N, then --model.path FOLDER)."
)

RULES: tuple[Rule, ...] = (
    Rule(
        "too_easy", "Too easy", "Where everything succeeds there is nothing to compare, and little is left to learn.",
        "Make the tasks harder, or draw them by difficulty (curriculum.name = difficulty).",
        "signal/dead_groups", _too_easy, begins_after=_LASTING,
    ),
    Rule(
        "too_hard", "Too hard", "Where nothing succeeds there is nothing to compare.",
        "Make the tasks easier, give partial credit, play more episodes of each task, or start from a better model.",
        "signal/dead_groups", _too_hard, begins_after=_LASTING,
    ),
    Rule(
        "no_signal", "No signal",
        "Equal rewards do not tell which episode of a task was better; what compares these learns nothing from them.",
        "Look at how the reward is made: does it depend on what the agent does? Finer rewards or larger groups help.",
        "signal/dead_groups", _no_signal, begins_after=_LASTING,
    ),
    Rule(
        "all_or_nothing", "All or nothing",
        "Tasks are either solved whatever the agent does or beyond it, so there is nothing to compare.",
        "Draw tasks by difficulty (curriculum.name = difficulty), play more episodes of each, or give partial credit.",
        "signal/dead_groups", _all_or_nothing, begins_after=_LASTING,
    ),
    Rule(
        "template_collapse", "Template collapse",
        "The reasoning varies, but no longer with the input: it has become a template, which entropy does not show.",
        "Drop groups of little reward variance (filter.name = top_p), weaken KL and entropy terms or lower the "
        f"learning rate, {_FROM_BEFORE}",
        "information/first/sequence/share", _template_collapse, begins_after=2, ends_after=3, looks=3,
    ),
    Rule(
        "prompt_ignored", "Prompt ignored",
        "The reasoning has had nothing to do with the input since the beginning: whatever decides, it is not that.",
        "Read some thoughts in the report. Start from a model that has seen such thoughts, or do without them "
        "(agent.thinking = false).",
        "information/first/sequence/share", _prompt_ignored, begins_after=1, ends_after=3, looks=_IGNORED_LOOKS,
    ),
    Rule(
        "entropy_collapse", "Entropy collapse",
        "The policy has stopped trying other things before it was good, and what it does not try it cannot learn.",
        f"Raise clip_high, add a small entropy_coefficient or lower the learning rate, {_FROM_BEFORE}",
        "behaviour/entropy", _entropy_collapse, looks=3,
    ),
    Rule(
        "entropy_rise", "Entropy runs away",
        "The policy is on its way to answering at random.",
        f"Weaken or drop entropy_coefficient or lower the learning rate, {_FROM_BEFORE}",
        "behaviour/entropy", _entropy_rise, begins_after=1, looks=3,
    ),
    Rule(
        "large_steps", "Steps too large",
        "A batch says which way is better nearby; a policy that goes further than that undoes what it learned.",
        "Lower training.learning_rate, or take fewer minibatches and epochs of each batch.",
        "policy/moved", _large_steps, begins_after=1, looks=_LARGE_LOOKS,
    ),
    Rule(
        "success_unpaid", "Success does not pay",
        "Of the episodes of a task those that succeed get no more than the others: the policy learns something else.",
        "Look at how the reward is made, or at what success means: one of them is not what you want.",
        "signal/success_correlation", _success_unpaid, begins_after=2, looks=_UNPAID_LOOKS,
    ),
    Rule(
        "no_progress", "No progress", "The weights move and the reward does not: what told episodes apart may be luck.",
        "Look at how the reward is made: does it depend on what the agent does? Play more episodes of each task, lower "
        "the chance in the environment, or drop groups of little reward variance.",
        "train/reward", _no_progress, begins_after=_LASTING, looks=20, unless=_ADAPTIVE,
    ),
    Rule(
        "echo_trap", "Echo trap",
        "Episodes of a task have become alike without becoming better; a jump of the gradient usually makes it final.",
        f"Lower the learning rate and drop groups of little reward variance, {_FROM_BEFORE}",
        "signal/reward_std_in_group", _echo_trap, begins_after=_LASTING, looks=5,
    ),
    Rule(
        "noise", "Noise outweighs signal",
        "Most of what moves the weights is not the reward.",
        "Play more episodes a step, drop groups of little reward variance, or weaken KL and entropy terms.",
        "gradient/policy/norm", _noise, begins_after=2, ends_after=3, looks=_NOISE_LOOKS - 1,
    ),
    Rule(
        "length_drift", "Length drift", "The length of thoughts drifts away from where it began.",
        "See in the report whether thoughts still say something; a mean over sequences or a constant "
        "(algorithm.options.aggregation) and a penalty on overlong answers bear on it.",
        "behaviour/thought_tokens", _length_drift, looks=3,
    ),
    Rule(
        "format_lost", "Format lost", "The agent forgets how to answer.",
        "Raise agent.format_penalty, lower the learning rate, or see whether answers are cut off at their token limit.",
        "behaviour/invalid_turns", _format_lost, looks=3,
    ),
    Rule(
        "disagreement", "Generation and learning disagree",
        "The learner corrects for a policy that was not the one that played.",
        "Play and learn in the same precision, or set training.old_logprobs to recompute.",
        "policy/mismatch_first", _disagree,
    ),
    Rule(
        "success_fell", "Success fell", "The agent was better before.",
        f"Keep the policy from before the fall, or go on with a lower learning rate, {_FROM_BEFORE}",
        "train/success", _success_fell, begins_after=_LASTING, looks=5, unless=_ADAPTIVE,
    ),
    Rule(
        "sure_and_worse", "Surer and worse",
        "The policy becomes surer of itself while it gets worse: the reward from within feeds on itself.",
        f"Lower algorithm.options.self_certainty or end earlier, {_FROM_BEFORE}",
        "signal/self_certainty", _sure_and_worse, looks=5,
    ),
    Rule(
        "foreign_world", "Foreign world",
        "The policy foretells the environment worse than somebody who knows nothing but its symbols.",
        "Let it learn the world first: world.mode = world_only for some steps, or dual from the start.",
        _PERPLEXITIES, _foreign_world, begins_after=1, ends_after=1,
    ),
    Rule(
        "nothing_to_foretell", "Nothing to foretell",
        "A world model learns answers to actions, and here there are none that count.",
        "Leave out world.foreseeable = false where all answers follow from the rules (FrozenLake without slip, "
        "Sokoban, Countdown), let episodes have more than one turn, or set world.mode to policy_only.",
        "world/target_tokens", _nothing_to_foretell, begins_after=1, ends_after=1,
    ),
    Rule(
        "tool_abandoned", "Tool abandoned",
        "An agent whose first calls fail or bring nothing stops calling, and what it does not try it cannot learn.",
        "See in the report why its calls failed. Then let calls cost nothing until they work (tools.cost = 0) or pay "
        "for those that bring a result (rewards.call), and begin again from a policy that still calls it.",
        f"{TOOL_FIGURES}calls", _tool_abandoned, begins_after=5,
    ),
)  # fmt: skip
"""All rules, in the order in which they are looked at."""

RULE_NAMES = tuple(rule.name for rule in RULES)
