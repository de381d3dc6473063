"""The pitfalls of DDPO that other implementations' users reported, and the tests that stand for each.

A test that is renamed or removed leaves its pitfall open, which fails here.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PITFALLS = {
    "1 summed log-probabilities": (
        "test_ddim.py::test_log_prob_is_the_mean_of_torchs_normal",
        "test_selfcheck.py::test_a_log_prob_that_is_a_sum",
    ),
    "2 latents in half precision": (
        "test_selfcheck.py::test_latents_in_half_precision",
        "test_models.py::test_the_policy_is_kept_in_fp32",
    ),
    "3 a ratio other than 1 before the first update": (
        "test_ddpo.py::test_ratio_is_one_before_the_first_update_of_each_epoch",
        "test_chain.py::test_the_policy_starts_as_the_personalized_model",
    ),
    "4 a standard deviation of 0": (
        "test_ddim.py::test_standard_deviation_is_positive_at_every_step_and_zero_is_refused",
        "test_selfcheck.py::test_a_deviation_of_zero",
    ),
    "5 a scheduler that clips x0": (
        "test_ddim.py::test_x0_is_not_clipped",
        "test_models.py::test_a_scheduler_that_clips_is_loaded_without_clipping",
    ),
    "6 gradients that are not summed over processes": ("test_processes.py::test_two_processes_end_as_one",),
    "7 guidance in sampling and not in training": (
        "test_ddpo.py::test_another_guidance_in_training_than_in_sampling_breaks_the_ratio",
        "test_selfcheck.py::test_training_without_guidance",
    ),
    "8 accumulation that forgets the timesteps": (
        "test_ddpo.py::test_accumulated_gradients_equal_those_of_the_whole_batch",
        "test_selfcheck.py::test_a_micro_batch_that_is_averaged_by_itself",
    ),
    "9 per-prompt statistics": (
        "test_ddpo.py::test_prompts_with_and_without_the_identifier_have_their_own_baselines",
        "test_ddpo.py::test_equal_rewards_give_zero_and_a_prompt_seen_once_uses_those_of_its_kind",
        "test_ddpo.py::test_the_baseline_remembers_earlier_epochs_and_survives_a_checkpoint",
    ),
    "10 NaN of half precision": (
        "test_ddpo.py::test_a_reward_that_is_not_finite_names_the_image_and_keeps_the_checkpoint",
        "test_models.py::test_the_policy_is_kept_in_fp32",
    ),
    "11 collapse and reward hacking": (
        "test_guard.py::test_the_alarm_rings_when_the_reward_rises_and_a_watched_number_falls",
        "test_guard.py::test_training_ends_early_and_returns_the_best_policy",
        "test_ddpo.py::test_a_heavy_kl_holds_the_policy",
    ),
    "12 an adapter that loads nowhere else": (
        "test_adapt.py::test_what_is_exported_draws_the_same_in_diffusers",
        "test_chain.py::test_the_adapter_loads_into_diffusers_own_pipeline",
    ),
    "13 class images of another prompt or model": (
        "test_dreambooth.py::test_class_images_are_made_once_and_keyed_by_all_that_made_them",
    ),
    "14 the identifier in the text of the reward": (
        "test_models.py::test_both_kinds_of_prompts_and_what_the_reward_reads",
        "test_models.py::test_identifiers",
    ),
    "15 ImageReward's 35 tokens and dropout": (
        "test_scorers.py::test_reward_scorer_names_a_text_that_it_cuts_once",
        "test_scorers.py::test_scorers_are_in_evaluation_mode",
    ),
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_pitfall(pitfall):
    for place in PITFALLS[pitfall]:
        file, name = place.split("::")
        tests = {n.name for n in ast.walk(ast.parse((HERE / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in tests, f"{place} is gone: what stands for pitfall {pitfall!r} now?"


def test_all_fifteen():
    assert [int(name.split()[0]) for name in PITFALLS] == list(range(1, 16))
