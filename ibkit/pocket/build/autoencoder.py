"""Stage 1: the autoencoder, 64x64x3 pixels to 8x8x16 latents (diffusers `AutoencoderKL`).

It decides what subject fidelity can mean: colours and patterns that it loses, no method can keep.
The encoder is frozen part-way so that the diffusion model can start; the decoder goes on alone, on slightly noisy
latents,
because those of a sampler are never as clean as the encoder's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ibkit.pocket.build.common import Budget, begin_with, fit, hash_seed
from ibkit.pocket.build.data import Pictures

JOINT = Budget(steps=4000, batch=256, lr=1e-3, muon_lr=0.01, weight_decay=0.0, ema=0.995)
DECODER = Budget(steps=9000, batch=128, lr=1e-3, muon_lr=0.01, weight_decay=0.0, ema=0.998)
DECODER_CONTINUED = replace(DECODER, steps=2254)  # from earlier weights
# The posterior is a fixed, narrow Gaussian around the mean: a learnt width starts at 1 and drowns the latents for
# hundreds of steps.
POSTERIOR_STD = 0.05
MEAN_WEIGHT = 1e-4  # KL's pull of the mean towards 0, so that the fixed width means something
LATENT_NOISE = 0.05  # of the decoder stage, in units of the latents' own standard deviation


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def reconstruction_loss(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute plus squared error, fp32: the first keeps edges crisp, the second is what PSNR counts."""
    difference = image.float() - target
    return difference.abs().mean() + 4.0 * difference.square().mean()


def psnr(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio per picture (B,), dB; pictures in [-1, 1]."""
    error = (image.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error)


def with_noise(z: torch.Tensor, strongest: float, generator: torch.Generator) -> torch.Tensor:
    """Latents (B, C, H, W) with Gaussian noise, of a standard deviation between 0 and `strongest` for each picture."""
    level = strongest * torch.rand((len(z), 1, 1, 1), generator=generator, device=z.device)
    return z + (level * torch.randn(z.shape, generator=generator, device=z.device)).to(z)


@torch.no_grad()
def redraw(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) as the autoencoder draws them from slightly noisy latents, as those of a sampler are."""
    z = with_noise(vae.encode(x.to(dtype)).latent_dist.mode(), 0.3 / vae.config.scaling_factor, generator)
    return vae.decode(z).sample.float().clamp(-1, 1)


def train_joint(folder: Path, pictures: Pictures, device, dtype) -> AutoencoderKL:
    """Encoder and decoder together; sets the latents' scaling factor (1 / their standard deviation, as in
    latent diffusion, section 4.3.2).
    """
    torch.manual_seed(hash_seed("autoencoder weights"))
    vae = new_autoencoder()
    with torch.no_grad():  # the width of the posterior, as the encoder reports it
        vae.quant_conv.weight[16:].zero_()
        vae.quant_conv.bias[16:].fill_(2 * math.log(POSTERIOR_STD))

    def loss_fn(work, average, step, generator):
        x = pictures.batch(torch.randint(len(pictures), (JOINT.batch,), generator=generator, device=device), device)
        z = work.encode(x.to(dtype)).latent_dist.mode()
        image = work.decode(z + POSTERIOR_STD * torch.randn(z.shape, generator=generator, device=device).to(z)).sample
        loss = reconstruction_loss(image, x) + MEAN_WEIGHT * z.float().square().mean()
        return loss, {"psnr": psnr(image.detach().float(), x).mean()}

    fit("autoencoder", folder, vae, loss_fn, JOINT, device, dtype)
    with torch.inference_mode():
        z = torch.cat(
            [vae.encode(pictures.batch(range(i, i + 64), device)).latent_dist.mode() for i in range(0, 1024, 64)]
        )
    vae.register_to_config(scaling_factor=float(1.0 / z.std()))
    return vae


def train_decoder(
    folder: Path, pictures: Pictures, vae: AutoencoderKL, device, dtype, start: dict | None = None
) -> AutoencoderKL:
    """The decoder alone, on the frozen encoder's latents with a little noise."""
    begin_with(vae.decoder, start)
    budget = DECODER_CONTINUED if start else DECODER
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    spread = 1.0 / vae.config.scaling_factor

    def loss_fn(work, average, step, generator):
        x = pictures.batch(torch.randint(len(pictures), (budget.batch,), generator=generator, device=device), device)
        with torch.no_grad():
            z = with_noise(work.encode(x.to(dtype)).latent_dist.mode(), LATENT_NOISE * spread, generator)
        image = work.decode(z).sample
        return reconstruction_loss(image, x), {"psnr": psnr(image.detach().float(), x).mean()}

    fit("decoder", folder, vae, loss_fn, budget, device, dtype)
    vae.requires_grad_(True)
    return vae
