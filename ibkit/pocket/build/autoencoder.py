"""Stage 1: the autoencoder, 64x64x3 pixels to 8x8x16 latents (diffusers `AutoencoderKL`).

It bounds subject fidelity: no method can keep colours and patterns that it loses. After joint training the encoder is
frozen, so that the diffusion model can start. The decoder trains on, with slightly noisy latents, because a sampler's
are never as clean as the encoder's.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ibkit.pocket.build.common import Budget, begin_with, fit, hash_seed, load_float, save_half
from ibkit.pocket.build.data import Pictures, to_range

JOINT = Budget(steps=4000, batch=256, lr=1e-3, muon_lr=0.01, weight_decay=0.0, ema=0.995)
DECODER = Budget(steps=9000, batch=128, lr=1e-3, muon_lr=0.01, weight_decay=0.0, ema=0.998)
DECODER_CONTINUED = replace(DECODER, steps=2254)  # from earlier weights
# The posterior is a narrow Gaussian of fixed width: a learnt width starts at 1 and hides the latents for hundreds of
# steps.
POSTERIOR_STD = 0.05
MEAN_WEIGHT = 1e-4  # of the KL term that pulls the mean towards 0: it sets the scale for the fixed width
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


def save(vae: AutoencoderKL, path: Path) -> None:
    """Store weights and scaling factor in one file."""
    factor = torch.tensor(vae.config.scaling_factor, dtype=torch.float64)
    save_half(vae.state_dict(), path, scaling_factor=factor)


def load(path: Path) -> AutoencoderKL:
    """Read what `save` wrote."""
    vae, state = new_autoencoder(), load_float(path)
    vae.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
    vae.load_state_dict(state)
    return vae


def reconstruction_loss(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute plus squared error, fp32: the first keeps edges crisp, the second is what PSNR counts."""
    difference = image.float() - target
    return difference.abs().mean() + 4.0 * difference.square().mean()


def psnr(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio per picture (B,), dB; pictures in [-1, 1]."""
    error = (image.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error)


def with_noise(z: torch.Tensor, strongest: float, generator: torch.Generator) -> torch.Tensor:
    """Latents (B, C, H, W) with Gaussian noise, its standard deviation drawn from 0 to `strongest` for each picture."""
    level = strongest * torch.rand((len(z), 1, 1, 1), generator=generator, device=z.device)
    return z + (level * torch.randn(z.shape, generator=generator, device=z.device)).to(z)


@torch.no_grad()
def redraw(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) reconstructed from latents with noise such as a sampler leaves."""
    z = with_noise(vae.encode(x.to(dtype)).latent_dist.mode(), 0.3 / vae.config.scaling_factor, generator)
    return vae.decode(z).sample.float().clamp(-1, 1)


@torch.inference_mode()
def rebuilt(images: np.ndarray, vae: AutoencoderKL, device: torch.device, size: int = 128) -> np.ndarray:
    """The autoencoder's reconstructions of pictures, both uint8 (N, 64, 64, 3), in batches of `size`."""
    parts = []
    for i in range(0, len(images), size):
        x = to_range(images[i : i + size], device).to(next(vae.parameters()))
        pixels = (vae.decode(vae.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1) + 1) * 127.5
        parts.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def train_joint(folder: Path, pictures: Pictures, device, dtype) -> AutoencoderKL:
    """Train encoder and decoder together, and set the latents' scaling factor: 1 / their standard deviation (Rombach et
    al. 2022, section 4.3.2).
    """
    torch.manual_seed(hash_seed("autoencoder weights"))
    vae = new_autoencoder()
    with torch.no_grad():  # make the encoder report the fixed width
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
        batches = (pictures.batch(range(i, i + 64), device) for i in range(0, 1024, 64))
        z = torch.cat([vae.encode(x).latent_dist.mode() for x in batches])
    vae.register_to_config(scaling_factor=float(1.0 / z.std()))
    return vae


def train_decoder(
    folder: Path, pictures: Pictures, vae: AutoencoderKL, device, dtype, start: dict | None = None
) -> AutoencoderKL:
    """Train the decoder alone, on the frozen encoder's latents with a little noise."""
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
