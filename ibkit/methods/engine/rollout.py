"""Rollouts: sample images and keep every step, so that the policy gradient can be taken later.

Shapes: B images, T denoising steps, C/H/W latent channels, height, width.
"""

from dataclasses import dataclass

import torch

from ibkit.model.ddim import Schedule
from ibkit.model.sample import denoise
from ibkit.model.text_to_image import TextToImage, default_batch


@dataclass
class Trajectories:
    """What a policy did: `latents` (T + 1, B, C, H, W) fp32 from noise to image, `log_probs` (T, B), B `prompts`."""

    latents: torch.Tensor
    log_probs: torch.Tensor
    prompts: list[str]


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
    batch_size = batch_size or default_batch(model.image_px)
    latents, log_probs = [], []
    for i in range(0, len(prompts), batch_size):
        part = slice(i, i + batch_size)
        steps = list(denoise(model, prompts[part], schedule, guidance, generators[part]))
        latents.append(torch.stack([steps[0].x_t, *(step.x_prev for step in steps)]))
        log_probs.append(torch.stack([step.log_prob for step in steps]))
    return Trajectories(torch.cat(latents, 1), torch.cat(log_probs, 1), list(prompts))
