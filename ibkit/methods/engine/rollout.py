"""Rollouts: sample images and keep every step, so that the policy gradient can be taken later.

Shapes: B images, T denoising steps, C/H/W latent channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ibkit.model.ddim import Schedule, log_prob, step_mean
from ibkit.model.text_to_image import TextToImage, default_batch


@dataclass
class Trajectories:
    """What a policy did: `latents` (T + 1, B, C, H, W) fp32 from noise to image, `log_probs` (T, B), `text` (B,
    L, D).
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    text: torch.Tensor


@torch.no_grad()
def rollout(
    model: TextToImage,
    prompts: list[str],
    schedule: Schedule,
    guidance: float,
    generators: list[torch.Generator],
    batch_size: int = 0,
) -> Trajectories:
    """Sample one image for each prompt and record the trajectory.

    Args:
        generators: one for each image, on the CPU; it draws the initial noise and each step's, so an image depends on
            its own stream alone, whatever batch it is in.
        batch_size: images in a forward pass (twice as many rows with guidance); 0 = what suits their size.
    """
    text = model.encode_text(prompts)
    batch_size = batch_size or default_batch(model.image_px)
    parts = [
        _rollout(model, text[i : i + batch_size], schedule, guidance, generators[i : i + batch_size])
        for i in range(0, len(prompts), batch_size)
    ]
    return Trajectories(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), text)


def _rollout(model, text, schedule, guidance, generators):
    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators]).to(model.device)

    x = noise()
    latents, log_probs = [x], []
    for i in range(len(schedule)):
        t = schedule.timesteps[i].expand(len(x))
        eps_hat = model.guided_noise(x, t, text, guidance)
        mean = step_mean(x, eps_hat, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], schedule.std[i])
        if schedule.std[i] > 0:
            x = mean + schedule.std[i] * noise()
            log_probs.append(log_prob(x, mean, schedule.std[i]))
        else:  # the deterministic sampler has no density
            x = mean
            log_probs.append(torch.full((len(x),), torch.nan, device=x.device))
        latents.append(x)
    return torch.stack(latents), torch.stack(log_probs)
