"""The ratio: where the gradient is cut, how far an update went, and what rounding explains before the first."""

import dataclasses
import math

import pytest
import torch

from ibkit.device import generator
from ibkit.errors import TrainingError
from ibkit.methods.ddpo import policy_loss, train
from ibkit.methods.engine import policy
from ibkit.methods.engine.ratio import approx_kl, gradient_cut, ratio_tolerance, rounding_tolerance
from ibkit.methods.engine.rollout import rollout
from ibkit.model.ddim import log_prob, make_schedule, step_mean
from ibkit.runs import Checkpoints
from tests.test_ddpo import CONFIG, PROMPTS, brightness
from tests.tiny import scheduler


@pytest.mark.parametrize(
    "advantage, ratio, cut",
    [
        (2.0, 1.30, "high"),
        (2.0, 0.70, ""),  # outside the range, and its gradient is not cut
        (-2.0, 1.30, ""),
        (-2.0, 0.70, "low"),
        (2.0, 1.05, ""),
        (-2.0, 0.95, ""),
        (0.0, 1.30, ""),
    ],
)
def test_the_cut_by_hand_is_where_the_loss_has_no_gradient(advantage, ratio, cut):
    new, advantages = torch.tensor([math.log(ratio)], requires_grad=True), torch.tensor([advantage])
    policy_loss(new, torch.zeros(1), advantages, 0.1)[0].sum().backward()
    high, low = gradient_cut(new.detach().exp(), advantages, 0.1)
    assert (high.item(), low.item()) == (cut == "high", cut == "low")
    assert (new.grad.item() == 0) == bool(cut) or advantage == 0


def test_the_approximate_kl_by_hand_and_at_the_papers_clip_range():
    assert approx_kl(torch.tensor([1.0, math.e, 0.5])).item() == pytest.approx((math.e - 2 + math.log(2) - 0.5) / 3)
    log_ratio = 1e-4 * torch.randn(4096, generator=generator(0), dtype=torch.float64)
    assert approx_kl(log_ratio.exp().float()).item() == pytest.approx(log_ratio.square().mean().item() / 2, rel=1e-2)


@pytest.mark.parametrize("dtype, guidance, n_roundings", [(torch.bfloat16, 7.5, 12), (torch.float16, 2.0, 3)])
def test_the_rounding_tolerance_against_rounding(dtype, guidance, n_roundings):
    """The same ε̂ twice, each time rounded again and again in the dtype: log-ratios of 2000 pairs a step."""
    stream, unit = generator(0), torch.finfo(dtype).eps / 2
    schedule = make_schedule(scheduler().alphas_cumprod, 10, 1.0)
    tolerance = rounding_tolerance(schedule, guidance, unit, n_roundings, 64)

    def in_dtype(eps_hat):
        for _ in range(n_roundings):  # at another scale each time, so that the errors are independent
            scale = 1 + torch.rand(eps_hat.shape, generator=stream)
            eps_hat = (eps_hat * scale).to(dtype).float() / scale
        return eps_hat

    for i in range(len(schedule)):
        x_t, empty, text = torch.randn(3, 2000, 4, 4, 4, generator=stream).unbind()
        std = schedule.std[i].double()
        means = []
        for _ in ("sampling", "training"):
            without, with_text = in_dtype(empty), in_dtype(text)
            eps_hat = without + guidance * (with_text - without)
            means.append(step_mean(x_t, eps_hat, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], std).double())
        x_prev = means[0] + std * torch.randn(x_t.shape, generator=stream, dtype=torch.float64)
        log_ratio = log_prob(x_prev, means[1], std) - log_prob(x_prev, means[0], std)
        assert log_ratio.abs().max() < tolerance[i]
        # within reach, too: an error is at most u times the value, over all mantissas .74 of that
        assert 6 * log_ratio.std() > 0.4 * tolerance[i]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_ratios_that_are_not_one_before_the_first_update_end_the_training(tiny, tmp_path, monkeypatch, autocast):
    """Rollouts of another prompt than training reads; in bf16 they have to differ by more than rounding does."""
    tiny.autocast = autocast
    other = lambda model, texts, *rest: rollout(model, [t + " on the moon" for t in texts], *rest)  # noqa: E731
    monkeypatch.setattr(policy, "rollout", other)
    with torch.no_grad():  # random weights hardly read the text
        for name, weight in tiny.unet.named_parameters():
            if "attn2" in name:
                weight.mul_(3)
    config = dataclasses.replace(CONFIG, clip_range=1e-4)
    said = r"before the first update the ratio at t = \d+ is off 1 by [\d.e-]+, and rounding explains [\d.e-]+: rollout"
    with pytest.raises(TrainingError, match=said):
        train(tiny, PROMPTS, brightness, config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_end_a_training(tiny, tmp_path, monkeypatch, autocast):
    """Rollouts in fp32, one picture at a time; training in the dtype, eight pairs at a time."""
    config = dataclasses.replace(CONFIG, clip_range=1e-5, n_epochs=1)

    def exact(*words):
        tiny.autocast = None
        made = rollout(*words)
        tiny.autocast = autocast
        return made

    monkeypatch.setattr(policy, "rollout", exact)
    (row,) = train(tiny, PROMPTS, brightness, config, tmp_path)
    assert row["ratio_first"] < ratio_tolerance(tiny, config.sampler.schedule(tiny), config).max()
    assert autocast is None or row["ratio_first"] > 1e-5  # more than a tenth of the clip range
