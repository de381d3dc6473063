"""The DDIM sampler as a stochastic policy: one denoising step, its Gaussian log-probability, and the schedule.

| here | DDIM (Song et al. 2021) / DDPO (Black et al. 2023) |
|---|---|
| `alpha_bar`, `alpha_bar_prev` | ᾱ_t, ᾱ_{t'} (DDIM writes α_t), t' = t - 1000 // N clamped at 0 |
| `mean` | μ_θ(x_t, t, c), the first two terms of DDIM eq. 12 |
| `std` | s = η sqrt((1 - ᾱ')/(1 - ᾱ) · (1 - ᾱ/ᾱ')), DDIM eq. 16 |
| `log_prob` | log p_θ(x_{t'} | x_t, c), the policy of DDPO section 4.3 |

Shapes: B batch, C/H/W latent channels, height, width.
"""

import math
from dataclasses import dataclass

import torch

from ibkit.errors import ParameterError

MIN_WALKED = 0.9  # of the noise levels; below it a picture would begin as noise where the model expects less


@dataclass(frozen=True)
class Schedule:
    """The N timesteps of a sampler, first to last, with what each step needs; all (N,), on one device.

    Attributes:
        timesteps: t, int64.
        alpha_bar, alpha_bar_prev: ᾱ at t and at t', fp32.
        std: s of each step, fp32.
    """

    timesteps: torch.Tensor
    alpha_bar: torch.Tensor
    alpha_bar_prev: torch.Tensor
    std: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(
    alphas_cumprod: torch.Tensor, n_steps: int, eta: float, steps_offset: int = 1, device: torch.device | str = "cpu"
) -> Schedule:
    """Evenly spaced timesteps as in Stable Diffusion ("leading" spacing plus an offset of 1).

    Args:
        alphas_cumprod: ᾱ, (1000,).
        n_steps: N, at most 1000.
        eta: η; 0 is the deterministic DDIM sampler, 1 has the variance of DDPM.

    Raises:
        ParameterError: N out of range, or a step whose standard deviation is 0 although η > 0 (its log-probability is
            not defined).
    """
    n_train = len(alphas_cumprod)
    if not 1 <= n_steps <= n_train:
        raise ParameterError(f"{n_steps} denoising steps are not possible: give 1 to {n_train}.")
    if eta < 0:
        raise ParameterError(f"eta is {eta}: it must be 0 (deterministic) or positive.")
    check_spacing(n_steps, n_train)
    stride = n_train // n_steps
    t = (torch.arange(n_steps).flip(0) * stride + steps_offset).clamp(0, n_train - 1)
    t_prev = (t - stride).clamp(0, n_train - 1)
    a, a_prev = alphas_cumprod.double()[t], alphas_cumprod.double()[t_prev]
    std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
    if eta > 0 and not bool((std > 0).all()):
        step = int((std <= 0).nonzero()[0])
        raise ParameterError(
            f"denoising step {step} (t = {int(t[step])}) has standard deviation 0: its "
            f"log-probability is not defined; use a scheduler with steps_offset = 1."
        )
    return Schedule(t.to(device), a.float().to(device), a_prev.float().to(device), std.float().to(device))


def check_spacing(n_steps: int, n_train: int = 1000) -> None:
    """Refuse (ParameterError) a number of steps whose spacing would begin far from pure noise, below nine tenths of the
    noise levels: with 667 steps, of one level each, the first is at t = 667, and noise is put in where the model
    expects a third of a picture. The nearest numbers that are possible are named.
    """

    def walked(n: int) -> float:
        return n * (n_train // n) / n_train

    if 1 <= n_steps <= n_train and walked(n_steps) < MIN_WALKED:
        fewer = next(n for n in range(n_steps, 0, -1) if walked(n) >= MIN_WALKED)
        more = next(n for n in range(n_steps, n_train + 1) if walked(n) >= MIN_WALKED)
        raise ParameterError(
            f"{n_steps} denoising steps would begin at t = {round(n_train * walked(n_steps))} of {n_train}, where the "
            f"model does not expect pure noise: give {fewer} or {more}."
        )


def step_mean(
    x_t: torch.Tensor, eps_hat: torch.Tensor, alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """μ = √ᾱ' x̂0 + √(1 - ᾱ' - s²) ε̂ with x̂0 = (x - √(1 - ᾱ) ε̂) / √ᾱ (DDIM eq. 12).

    Args:
        x_t, eps_hat: (B, C, H, W) fp32.
        alpha_bar, alpha_bar_prev, std: scalars or (B,).
    """
    a, a_prev, s = (v.view(-1, 1, 1, 1) for v in (alpha_bar, alpha_bar_prev, std))
    x0_hat = predict_x0(x_t, eps_hat, alpha_bar)
    return a_prev.sqrt() * x0_hat + (1 - a_prev - s**2).clamp(min=0).sqrt() * eps_hat


def predict_x0(x_t: torch.Tensor, eps_hat: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x̂0 = (x_t - √(1 - ᾱ) ε̂) / √ᾱ, not clipped; (B, C, H, W)."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()


def step_weight(schedule: Schedule) -> torch.Tensor:
    """(∂μ/∂ε̂)² / s² of each step, (N,): how loudly it speaks in the policy gradient.

    The gradient of log p with respect to the network's output is Gaussian noise of this variance, times the advantage.
    With few steps the last but one, which leaps to almost no noise, outweighs all others together and decides nothing
    of what the picture shows.
    """
    a, a_prev, s = schedule.alpha_bar, schedule.alpha_bar_prev, schedule.std
    slope = (1 - a_prev - s**2).clamp(min=0).sqrt() - (a_prev * (1 - a) / a).sqrt()
    return (slope / s) ** 2


def log_prob(x_prev: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Gaussian log-density of the step taken, averaged over C, H, W (DDPO's code; a clip range of 1e-4 needs the mean,
    not the sum): (B,) nats per latent value.

    Args:
        x_prev, mean: (B, C, H, W) fp32.
        std: scalar or (B,), positive.
    """
    s = std.view(-1, 1, 1, 1)
    values = -((x_prev.detach() - mean) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)
    return values.mean(dim=(1, 2, 3))
