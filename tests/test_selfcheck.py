"""`ibkit check rl`: it passes on the kit as it is, and each check fails on the error that it is for."""

import json
import math

import torch

from ibkit import cli
from ibkit.errors import ParameterError
from ibkit.job import selfcheck
from ibkit.job.selfcheck import run_checks
from ibkit.methods import ddpo
from ibkit.methods.engine import advantages
from ibkit.model import ddim
from tests.tiny import tiny_model

log_prob, step_mean, policy_loss, pair_loss = ddim.log_prob, ddim.step_mean, ddpo.policy_loss, ddpo.pair_loss


def failed(tokenizer):
    return {check.name for check in run_checks(tiny_model(tokenizer)) if not check.ok}


def test_all_is_well(tokenizer):
    assert failed(tokenizer) == set()


def summed(x, mean, std):
    return log_prob(x, mean, std) * x[0].numel()


def half(x, mean, std):
    return log_prob(x.bfloat16().float(), mean, std)


def test_a_log_prob_that_is_a_sum(tokenizer, monkeypatch):
    """Pitfall 1: the clip range is meant for the mean."""
    monkeypatch.setattr(selfcheck, "log_prob", summed)
    assert "log-prob against torch.distributions.Normal, fp64" in failed(tokenizer)


def test_latents_in_half_precision(tokenizer, monkeypatch):
    """Pitfall 2: rounding x_{t-1} shifts the log-probability by more than the clip range."""
    monkeypatch.setattr("ibkit.model.sample.log_prob", half)
    names = failed(tokenizer)
    assert {"|ratio - 1| before the first update", "stored log-prob, scored again in the same batch shape"} <= names


def test_a_mean_that_training_computes_otherwise(tokenizer, monkeypatch):
    """Pitfall 3."""
    monkeypatch.setattr(ddpo, "step_mean", lambda *terms: step_mean(*terms) * 1.001)
    assert failed(tokenizer) == {"|ratio - 1| before the first update"}


def test_a_deviation_of_zero(tokenizer, monkeypatch):
    """Pitfall 4: a schedule that ends at t = 0."""
    make = ddim.make_schedule

    def broken(*arguments, **settings):
        schedule = make(*arguments, **settings)
        schedule.std[-1] = 0
        return schedule

    monkeypatch.setattr("ibkit.model.sample.make_schedule", broken)
    assert "steps whose deviation is not finite and > 0" in failed(tokenizer)


def test_training_without_guidance(tokenizer, monkeypatch):
    """Pitfall 7: the ratio then shows it before the first update."""

    def unguided(model, trajectories, image, step, advantage, schedule, config):
        config = ddpo.DDPOConfig(sampler=ddpo.Sampler(len(schedule), 1.0, 1.0), clip_range=config.clip_range)
        return pair_loss(model, trajectories, image, step, advantage, schedule, config)

    monkeypatch.setattr(selfcheck, "pair_loss", unguided)
    assert "|ratio - 1| before the first update" in failed(tokenizer)


def test_a_ratio_that_ignores_guidance(tokenizer, monkeypatch):
    def blind(model, trajectories, image, step, advantage, schedule, config):
        loss, ratio, kl = pair_loss(model, trajectories, image, step, advantage, schedule, config)
        return loss, torch.ones_like(ratio), kl

    monkeypatch.setattr(selfcheck, "pair_loss", blind)
    assert failed(tokenizer) == {"another guidance in sampling goes unnoticed"}


def test_a_micro_batch_that_is_averaged_by_itself(tokenizer, monkeypatch):
    """Pitfall 8: accumulation must count pairs."""

    def averaged(*arguments):
        loss, ratio, kl = pair_loss(*arguments)
        return loss / len(loss), ratio, kl

    monkeypatch.setattr(selfcheck, "pair_loss", averaged)
    assert failed(tokenizer) == {"accumulated gradient against the whole batch, relative"}


def test_a_loss_of_the_wrong_sign(tokenizer, monkeypatch):
    monkeypatch.setattr(selfcheck, "policy_loss", lambda new, old, a, clip: policy_loss(new, old, -a, clip))
    assert failed(tokenizer) == {"policy gradient against REINFORCE, relative"}


def test_one_baseline_for_all_prompts(tokenizer, monkeypatch):
    """Pitfall 9."""
    right = advantages.PromptStats.advantages
    monkeypatch.setattr(
        advantages.PromptStats,
        "advantages",
        lambda self, prompts, rewards: right(self, prompts[:1] * len(prompts), rewards),
    )
    assert failed(tokenizer) == {"advantages of prompts by hand"}


def test_a_log_prob_of_nan_is_not_hidden_by_the_finite_ones(tokenizer, monkeypatch):
    steps = []

    def broken(x, mean, std):
        steps.append(1)
        return log_prob(x, mean, std) * (torch.nan if len(steps) == 2 else 1.0)

    monkeypatch.setattr(selfcheck, "log_prob", broken)
    assert failed(tokenizer) == {"stored log-prob, scored again in the same batch shape"}


def test_ratios_of_nan_are_not_taken_for_a_notice_of_guidance(tokenizer, monkeypatch):
    def broken(*arguments):
        loss, ratio, kl = pair_loss(*arguments)
        return loss, ratio * torch.nan, kl

    monkeypatch.setattr(selfcheck, "pair_loss", broken)
    assert failed(tokenizer) == {"|ratio - 1| before the first update", "another guidance in sampling goes unnoticed"}


def test_an_error_fails_the_checks_that_meet_it_and_no_other(tokenizer, monkeypatch):
    def refuse(*arguments, **settings):
        raise ParameterError("denoising step 9 has standard deviation 0.")

    monkeypatch.setattr("ibkit.model.sample.make_schedule", refuse)
    checks = run_checks(tiny_model(tokenizer))
    assert [check.name for check in checks if check.ok] == [
        "log-prob against torch.distributions.Normal, fp64",
        "policy gradient against REINFORCE, relative",
        "advantages of prompts by hand",
    ]
    failures = [check for check in checks if not check.ok]
    assert all(math.isnan(check.measured) and check.hint.startswith("denoising step 9") for check in failures)


def test_the_command(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "load_model", lambda name, device: tiny_model(tokenizer))
    assert cli.main(["check", "rl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["findings"]) == len(selfcheck.CHECKS)
    monkeypatch.setattr(selfcheck, "policy_loss", lambda new, old, a, clip: policy_loss(new, old, 2 * a, clip))
    assert cli.main(["check", "rl"]) == 1
    out = capsys.readouterr().out
    assert "STOP  policy gradient against REINFORCE" in out and "-> the loss or its clipping is wrong" in out
