"""The ratio of new to old policy: whether it starts at 1, how far it went, and where PPO cuts its gradient.

Shapes: M (image, step) pairs, T denoising steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ibkit.errors import TrainingError
from ibkit.model.ddim import Schedule, step_weight
from ibkit.model.text_to_image import TextToImage

if TYPE_CHECKING:
    from ibkit.methods.ddpo import DDPOConfig
    from ibkit.methods.dpok import DPOKConfig


def gradient_cut(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where PPO's clip cuts the gradient, (high, low), each bool in the shape of `ratio`: of good actions made likelier
    than 1 + ε, and of bad ones less likely than 1 - ε.

    A ratio outside the range on the other side is a step in the wrong direction, and its gradient stays.
    """
    return (advantage > 0) & (ratio > 1 + clip_range), (advantage < 0) & (ratio < 1 - clip_range)


def approx_kl(ratio: torch.Tensor) -> torch.Tensor:
    """Mean of (r - 1) - log r, Schulman's estimator k3 ("Approximating KL Divergence", 2020), never negative; fp64,
    since in fp32 nothing is left of it at a clip range of 1e-4.

    The ratio is the D-th root of that of the densities, see `log_prob`. So this is half its mean squared logarithm, as
    in DDPO's code: a measure of how far an update went, and not the divergence in nats.
    """
    r = ratio.double()
    return ((r - 1) - r.log()).mean()


def rounding_tolerance(
    schedule: Schedule, guidance: float, unit: float, n_roundings: int, n_values: int
) -> torch.Tensor:
    """How far rounding alone may move the log-ratio of each step, (T,), when a step is scored again by the same policy.

    A rounded value is off by at most u times itself, evenly spread, so by a variance of at most u²/3 of its square. L
    independent roundings after one another, by layers that do not magnify errors, make L u²/3. Values of ε̂ are those
    of noise, of mean square 1; guidance adds 1 - g times one to g times another; and sampling and training each have
    their own errors. So their guided ε̂ differ by the variance

        v = 2/3 L u² ((1 - g)² + g²),

    and the means of the step, in units of s, by a mean square m = w v (w: `step_weight`). The log-ratio is the mean
    over D values of z d - d²/2, with d that difference and z the noise of the step, drawn after it. It is normal with
    mean -m/2 and variance (m + m²/2)/D, and two pairs in 10⁹ are more than six deviations from the mean:

        |log r| <= m/2 + 6 √((m + m²/2)/D)

    Args:
        guidance: g.
        unit: u, the rounding unit of the dtype that the network computes in, 2⁻⁸ for bf16, 2⁻¹¹ for fp16.
        n_roundings: L.
        n_values: D, the latent values that `log_prob` is the mean of.
    """
    variance = 2 / 3 * n_roundings * unit**2 * ((1 - guidance) ** 2 + guidance**2)
    m = step_weight(schedule) * variance
    return m / 2 + 6 * ((m + m**2 / 2) / n_values).sqrt()


def ratio_tolerance(model: TextToImage, schedule: Schedule, config: DDPOConfig | DPOKConfig) -> torch.Tensor:
    """The largest |ratio - 1| of each step (T,) that is believed before an update: a tenth of the clip range, or what
    rounding explains (`rounding_tolerance`), which is more under autocast.

    Each layer of the U-Net counts as a rounding, but for the adapter's, which run beside one. That is more than there
    are after one another: in bf16 the pocket model's ε̂ is as far off as 7 to 21 roundings make it, of 119 layers
    (measured on a CPU).
    """
    unit = torch.finfo(model.autocast or torch.float32).eps / 2
    layers = [name for name, m in model.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    n_layers = sum("lora_" not in name for name in layers)
    n_values = math.prod(model.latent_shape)
    log_ratio = rounding_tolerance(schedule, config.sampler.guidance, unit, n_layers, n_values)
    return log_ratio.expm1().clamp(min=config.clip_range / 10)


def check_first_ratio(ratio: torch.Tensor, step: torch.Tensor, schedule: Schedule, tolerance: torch.Tensor) -> float:
    """The largest |ratio - 1| of pairs before an update, where new and old policy are one; a TrainingError where
    rounding does not explain it.

    Args:
        ratio, step: (M,).
        tolerance: of each step (T,), see `ratio_tolerance`.
    """
    deviation = (ratio - 1).abs()
    worst = (deviation / tolerance[step]).argmax()
    if deviation[worst] > tolerance[step[worst]]:
        raise TrainingError(
            f"before the first update the ratio at t = {int(schedule.timesteps[step[worst]])} is off 1 by "
            f"{deviation[worst].item():.2g}, and rounding explains {tolerance[step[worst]].item():.2g}: rollout and "
            "training compute different probabilities, so compare their guidance, prompts, schedule and precision."
        )
    return deviation.max().item()
