"""The sampler as a policy: against diffusers' scheduler and torch's own Normal."""

import pytest
import torch
from torch.distributions import Normal

from ibkit.errors import ParameterError
from ibkit.model.ddim import log_prob, make_schedule, predict_x0, step_mean, step_weight
from ibkit.runs import project_root
from tests.tiny import scheduler

ALPHAS = scheduler().alphas_cumprod


@pytest.mark.parametrize("n_steps", [5, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_is_diffusers_own(n_steps, eta):
    reference = scheduler()
    reference.set_timesteps(n_steps)
    schedule = make_schedule(ALPHAS, n_steps, eta)
    assert schedule.timesteps.tolist() == reference.timesteps.tolist()
    x, eps, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for i, t in enumerate(reference.timesteps):
        expected = reference.step(eps, int(t), x, eta=eta, variance_noise=noise if eta else None).prev_sample
        mean = step_mean(x, eps, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], schedule.std[i])
        torch.testing.assert_close(mean + schedule.std[i] * noise, expected, rtol=1e-5, atol=1e-5)


def test_standard_deviation_is_positive_at_every_step_and_zero_is_refused():
    for n_steps in (1, 5, 20, 50, 100):
        schedule = make_schedule(ALPHAS, n_steps, 1.0)
        assert bool((schedule.std > 0).all()) and bool(torch.isfinite(schedule.std).all())
    with pytest.raises(ParameterError, match="standard deviation 0"):
        make_schedule(ALPHAS, 50, 1.0, steps_offset=0)  # ends at t = t' = 0


@pytest.mark.parametrize("n_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(n_steps):
    with pytest.raises(ParameterError, match="denoising steps"):
        make_schedule(ALPHAS, n_steps, 1.0)


def test_log_prob_is_the_mean_of_torchs_normal():
    g = torch.Generator().manual_seed(1)
    x, mean = torch.randn(2, 3, 4, 8, 8, generator=g, dtype=torch.float64).unbind()
    std = torch.tensor([0.02, 0.3, 1.5], dtype=torch.float64)
    expected = Normal(mean, std.view(3, 1, 1, 1)).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, std), expected, rtol=1e-12, atol=1e-12)


def test_log_prob_does_not_differentiate_the_action():
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    mean = torch.zeros(1, 1, 2, 2, requires_grad=True)
    log_prob(x, mean, torch.tensor(0.5)).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(mean.grad, (x.detach() / 0.25 / 4))  # d/dmean of the mean of -(x - mean)^2 / 2s^2


def test_x0_is_not_clipped():
    x0 = torch.full((1, 1, 2, 2), 7.0)  # latents are not pixels: values beyond ±1 are normal
    eps = torch.randn(1, 1, 2, 2)
    a = torch.tensor([0.3])
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    torch.testing.assert_close(predict_x0(x_t, eps, a), x0)


def test_a_steps_weight_is_the_variance_of_its_score():
    schedule = make_schedule(ALPHAS, 15, 1.0)
    weights = step_weight(schedule)
    x = torch.zeros(1, 1, 1, 1)
    stream = torch.Generator().manual_seed(0)
    for i in (0, 7, 13):
        eps = torch.zeros(20_000, 1, 1, 1, requires_grad=True)
        mean = step_mean(x, eps, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], schedule.std[i])
        noise = torch.randn(mean.shape, generator=stream)
        log_prob((mean + schedule.std[i] * noise).detach(), mean, schedule.std[i]).sum().backward()
        torch.testing.assert_close(eps.grad.var(), weights[i], rtol=0.05, atol=0)
    assert weights[13] > weights[:13].sum()  # why `trained_share` exists


@pytest.mark.parametrize(("n_steps", "t", "percent"), [(10, 101, 86), (50, 21, 49)])
def test_the_last_step_but_one_outweighs_the_others(n_steps, t, percent):
    """What notebook 13 says of the pocket's preset and of the paper's."""
    schedule = make_schedule(scheduler().alphas_cumprod, n_steps, 1.0)
    shares = step_weight(schedule) / step_weight(schedule).sum()
    assert shares.argmax() == n_steps - 2 and schedule.timesteps[-2] == t
    assert round(100 * shares.max().item()) == percent
    notebook = (project_root() / "notebooks" / "13_inside_rl.ipynb").read_text(encoding="utf-8")
    assert f"{percent} % of" in notebook
