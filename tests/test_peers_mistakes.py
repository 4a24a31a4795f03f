"""Mistakes that trainers of agents have shipped, and the tests here that would fail if we made them.

The table is what somebody asks who knows those threads. It holds what could happen in a trainer of this kind: nothing
about clusters of services, and nothing about a package's own dependencies.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "verl#3960, verl#6501": (
        "templates rendered the conversation otherwise for training than for play; a separator was lost at each turn",
        (
            "models/test_chat.py::test_parts_put_together_are_the_whole_conversation",
            "models/test_chat.py::test_separator_behind_the_end_of_a_turn_is_not_lost",
            "models/test_chat_tools.py::test_parts_with_calls_and_results_are_the_whole",
        ),
    ),
    "trl#5224, rllm#352": (
        "answers were decoded and tokenised again, so other ids were trained than had been sampled",
        ("models/test_chat.py::test_sampled_ids_are_not_tokenised_again",),
    ),
    "tinker-cookbook#837": (
        "renderers written by hand differed from the template, in conversations that end otherwise than those tested",
        (
            "models/test_chat.py::test_parts_put_together_are_the_whole_conversation",
            "models/test_chat.py::test_refusing_templates_that_rewrite_history",
            "models/test_chat.py::test_earlier_thinking_is_kept_where_the_template_drops_it",
        ),
    ),
    "agent-lightning#326": (
        "a server's ids did not belong to its text",
        (
            "generation/test_remote.py::test_ids_and_log_probs_of_a_server_that_gives_both",
            "generation/test_remote.py::test_log_probs_of_other_tokens_are_not_taken",
        ),
    ),
    "unsloth#5673": (
        "the policy was trained on what the environment had said",
        (
            "algorithms/test_credit.py::test_only_sampled_tokens_of_scored_episodes_have_an_advantage",
            "algorithms/test_batch.py::test_check_refuses_a_policy_mask_on_observations",
            "algorithms/test_known_bugs.py::test_an_observation_never_counts_as_a_token",
        ),
    ),
    "trl#6789": (
        "top-p and top-k renormalise, and ratios were taken to the whole distribution",
        (
            "generation/test_sampling.py::test_log_probs_are_renormalised_over_what_is_left",
            "training/test_recipe.py::test_truncated_sampling_needs_log_probs_computed_again",
            "training/test_monitor.py::test_truncated_sampling_is_no_disagreement",
        ),
    ),
    "trl#4159, trl#4772": (
        "log-probabilities without the temperature; ratios that exploded",
        (
            "training/test_learner.py::test_the_first_ratio_is_one",
            "algorithms/test_known_bugs.py::test_a_token_that_became_impossible_does_not_blow_up_the_step",
        ),
    ),
    "SkyRL#1315": (
        "old log-probabilities computed again with the present policy hid how stale the samples were",
        (
            "algorithms/test_known_bugs.py::test_stale_samples_are_not_hidden_by_recomputed_log_probabilities",
            "algorithms/test_known_bugs.py::test_every_preset_corrects_for_staleness",
        ),
    ),
    "Megatron-LM#4168": (
        "routers chose other experts in learning than in sampling",
        (
            "training/test_learner.py::test_experts_are_the_same_in_sampling_and_in_learning",
            "training/test_learner.py::test_the_first_ratio_is_one",
        ),
    ),
    "unsloth-zoo#941, verl#3516": (
        "adapters were not what the sampler used, and shapes matched, so nobody saw it",
        (
            "models/test_adapters.py::test_the_engine_sees_a_change_of_adapters",
            "models/test_adapters.py::test_an_adapter_comes_back_from_its_folder",
            "models/test_adapters.py::test_one_adapter_of_summed_rank_gives_the_same_logits",
        ),
    ),
    "trl#6024, trl#6439, SkyRL#1296, verl#3741": (
        "the loss depended on how a step was cut into batches, or counted tokens that it had left out",
        (
            "algorithms/test_aggregation.py::test_one_batch_of_eight_equals_eight_batches_of_one",
            "algorithms/test_aggregation.py::test_a_mean_of_micro_batch_means_would_be_seen",
            "algorithms/test_known_bugs.py::test_truncated_sequences_count_in_no_denominator",
            "training/test_learner.py::test_one_pack_or_a_pack_for_each_episode",
        ),
    ),
    "OpenRLHF#1239, NeMo-RL#4158": (
        "samples without an action moved the baseline of their group; a filter left out only those that lost",
        (
            "algorithms/test_credit.py::test_an_episode_without_a_sampled_token_is_left_out_of_the_baseline",
            "training/test_learner.py::test_episodes_that_a_filter_turns_down_stay_in_the_baseline",
        ),
    ),
    "prime-rl#3223": (
        "a filter on advantages dropped episodes that the world model would have learnt from",
        (
            "algorithms/test_observation.py::test_rewards_and_filters_do_not_matter",
            "algorithms/test_known_bugs.py::test_a_filter_on_the_policy_leaves_the_critic_its_tokens",
        ),
    ),
    "verl#5635, verl#5839": (
        "a time limit by signal raised off the main thread and made every answer wrong; without it checks hung",
        (
            "rewards/test_pool.py::test_it_works_off_the_main_thread_and_from_several_at_once",
            "rewards/test_pool.py::test_several_hangs_in_one_chunk_cost_a_time_limit_each",
            "rewards/test_pool.py::test_what_goes_wrong_costs_only_itself",
        ),
    ),
    "NeMo-RL#3470": (
        "failed generations became rows of reward zero",
        (
            "algorithms/test_advantages.py::test_missing_rewards_are_left_out_of_the_baseline",
            "training/test_learner.py::test_failed_episodes_are_left_out_and_change_nothing_else",
        ),
    ),
    "SkyRL#1613, agent-lightning#448": (
        "one failed rollout ended the step; or many failed and nobody was told",
        (
            "rollout/test_rollout.py::test_a_broken_episode_is_data",
            "training/test_loop.py::test_too_many_failed_episodes_end_the_run",
        ),
    ),
    "verl#5725, open-instruct#1523, prime-rl#3299": (
        "a resumed run played the same data again, or ended at once",
        (
            "training/test_loop.py::test_a_run_that_was_killed_ends_as_one_that_was_not",
            "training/test_loop.py::test_a_finished_run_can_be_taken_further",
            "training/test_tasks.py::test_a_run_with_a_curriculum_resumes_as_if_it_had_not_stopped",
        ),
    ),
    "Search-R1#162": (
        "samples of one prompt were in groups of their own",
        ("rollout/test_rollout.py::test_a_group_is_the_samples_of_one_task_and_of_no_other",),
    ),
    "trl#2959": (
        "no figure but the reward: it rose while what was wanted fell, and the best checkpoint was the worst",
        (
            "training/test_loop.py::test_held_out_tasks_are_the_same_before_and_after",
            "diagnostics/test_verdict.py::test_a_reward_that_ceases_to_pay_is_called_in_a_few_steps",
        ),
    ),
    "verl#4709, OpenRLHF#865, ART#346": (
        "a prompt beyond the context, or an engine that broke, made everything wait for ever",
        (
            "rollout/test_rollout.py::test_an_opening_without_room",
            "generation/test_local.py::test_an_error_in_the_model_reaches_everyone_and_the_engine_goes_on",
            "rollout/test_rollout.py::test_a_hanging_environment_costs_its_own_episodes",
            "rollout/test_processes.py::test_a_process_that_is_killed_is_told",
        ),
    ),
    "verl#3910": (
        "a prompt that grew with the turns ran out of memory",
        (
            "rollout/test_rollout.py::test_an_observation_without_room_ends_the_episode",
            "generation/test_local.py::test_too_little_memory",
        ),
    ),
    "verl#180, verl#1524": (
        "batch sizes were multiplied and divided until nobody knew how many updates a step makes",
        ("training/test_learner.py::test_minibatches_use_every_episode_once",),
    ),
    "verl#3126, open-instruct#648": (
        "two runs of one seed were not the same",
        (
            "training/test_loop.py::test_two_runs_of_one_recipe_are_the_same",
            "rollout/test_rollout.py::test_the_same_seed_gives_the_same_episodes",
        ),
    ),
    "verl#7244": (
        "turns were read off rewards, or normalised by their number, which paid for every further turn",
        (
            "algorithms/test_credit.py::test_group_estimators_give_all_segments_of_an_episode_the_same",
            "algorithms/test_advantages.py::test_bi_level_gae_keeps_turns_of_zero_reward_apart",
        ),
    ),
    "agent-lightning#489": (
        "turns of different prompts were compared with each other, and the agent stopped to call tools",
        (
            "algorithms/test_credit.py::test_an_episode_counts_once_in_its_baseline_however_many_segments_it_has",
            "training/test_learner.py::test_episodes_in_several_segments_keep_their_credit",
        ),
    ),
    "trl#6349": (
        "members of a group began in different states, and their baseline was noise",
        ("rollout/test_rollout.py::test_a_group_is_the_samples_of_one_task_and_of_no_other",),
    ),
}


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("threads", MISTAKES)
def test_the_tests_that_would_see_it_are_there(threads: str) -> None:
    what, tests = MISTAKES[threads]
    assert what
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        assert name in names_in(TESTS / file), f"{threads}: there is no {test}"
