"""The diffusion model, a `UNet2DConditionModel` on 8x8x16 latents, trained together with its CLIP text encoder.

Noise prediction on Stable Diffusion's own schedule (Rombach et al. 2022; Ho et al. 2020, eq. 14), weighted by min-SNR
(Hang et al. 2023, eq. 9), with captions dropped at random for classifier-free guidance. It never sees the held-out
(class, activity) pairs, the individuals that notebooks personalize, or the identifiers. Some captions leave whole parts
out, so that the model learns an activity apart from the class too.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ibkit.model.text_to_image import use_quick_attention
from ibkit.pocket.build.common import Budget, begin_with, cached, fit, hash_seed
from ibkit.pocket.build.data import Pictures, encode, token_table
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.words import vocabulary
from ibkit.pocket.world import IDENTIFIERS, Scene
from ibkit.runs import hash_json
from ibkit.scorers.base import batches

BUDGET = Budget(steps=6000, batch=1024, ema=0.998)
CONTINUED = Budget(steps=825, batch=1024, lr=1.5e-3, muon_lr=0.015, ema=0.998)  # from earlier weights
FINISH = Budget(steps=1200, batch=64, lr=5e-4, muon_lr=0.004, ema=0.995)  # on captions that always name the class
CAPTION_DROP = 0.1
CAPTIONS = 6  # of a picture
MIN_SNR_GAMMA = 5.0
TEXT_WIDTH = 128


class TextToLatent(nn.Module):
    """U-Net and text encoder as one trainable module: (noisy latents, timesteps, token ids) -> predicted noise."""

    def __init__(self, tokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_TOKENS,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                projection_dim=TEXT_WIDTH,
                attn_implementation="eager",  # for 24 tokens the fused kernel is the slower one on a CPU
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            layers_per_block=1,
            block_out_channels=(80, 144),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=(2, 4),  # number of heads, for historical reasons (diffusers)
            norm_num_groups=16,
        )

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, t, self.text_encoder(ids).last_hidden_state).sample


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule; no clipping of x0 (latents are not pixels) and an end at t = 0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.inference_mode()
def encode_all(folder: Path, pictures: Pictures, vae: AutoencoderKL, device, dtype) -> torch.Tensor:
    """Scaled posterior means of all pictures, (N, 16, 8, 8) fp32; cached, keyed by the encoder's weights."""

    def make() -> np.ndarray:
        encoder = vae.to(device=device, dtype=dtype)
        parts = []
        for indices in batches(range(len(pictures)), 128 if device.type == "cpu" else 2048):
            parts.append(encoder.encode(pictures.batch(indices, device).to(dtype)).latent_dist.mode().float().cpu())
        return torch.cat(parts).numpy() * vae.config.scaling_factor

    key = hash_json([float(p.double().sum()) for p in vae.encoder.parameters()])[:12]
    return torch.from_numpy(np.array(cached(folder / f"latents-{len(pictures)}-{key}.npy", make)))


def train(
    folder: Path,
    pictures: Pictures,
    latents: torch.Tensor,
    tokenizer,
    device,
    dtype,
    name: str,
    budget: Budget,
    write: Callable[[Scene, random.Random], str],
    start: dict | None = None,
) -> TextToLatent:
    """Train U-Net and text encoder on captions by `write`, from the weights of `start` where there are any."""
    torch.manual_seed(hash_seed("unet weights"))
    model = TextToLatent(tokenizer)
    begin_with(model, start)
    use_quick_attention(model.unet, device)
    tokens = token_table(pictures, tokenizer, write, CAPTIONS).to(device)
    alphas = new_scheduler().alphas_cumprod.to(device)
    seen, latents = torch.from_numpy(pictures.seen).to(device), latents.to(device)
    nothing = encode(tokenizer, [""]).to(device)

    def loss_fn(work, average, step, generator):
        draw = {"generator": generator, "device": device}
        indices = seen[torch.randint(len(seen), (budget.batch,), **draw)]
        ids = tokens[indices, torch.randint(CAPTIONS, (budget.batch,), **draw)].long()
        ids = torch.where(torch.rand((budget.batch, 1), **draw) < CAPTION_DROP, nothing, ids)
        x0 = latents[indices]
        t = torch.randint(1000, (budget.batch,), **draw)
        noise = torch.randn(x0.shape, **draw)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        eps_hat = work(noisy.to(dtype), t, ids)
        snr = alphas[t] / (1 - alphas[t])
        error = (eps_hat.float() - noise).square().mean((1, 2, 3))
        return (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean(), {"mse": error.mean()}

    fit(name, folder, model, loss_fn, budget, device, dtype)
    name_identifiers(model.text_encoder, tokenizer)
    return model


@torch.no_grad()
def name_identifiers(text_encoder: CLIPTextModel, tokenizer) -> None:
    """Give the identifiers random embeddings with the mean norm of the words'.

    No caption uses them, so training leaves them at their small initial values. A prompt with the identifier would be
    encoded like one without it, and personalization would have nothing to start from.
    """
    table = text_encoder.get_input_embeddings().weight
    token = {word: tokenizer(word)["input_ids"][1] for word in vocabulary()}  # one token each, after the start mark
    size = table[[token[w] for w in token if w not in IDENTIFIERS]].norm(dim=1).mean()
    for name in IDENTIFIERS:
        stream = torch.Generator().manual_seed(hash_seed("identifier", name))
        direction = torch.randn(table.shape[1], generator=stream).to(table)
        table[token[name]] = direction / direction.norm() * size


def save_pipeline(model: TextToLatent, vae: AutoencoderKL, tokenizer, folder: Path) -> None:
    """Write a diffusers `StableDiffusionPipeline` folder in fp16."""
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(vae, model.text_encoder, tokenizer, model.unet, new_scheduler(), **without)
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers would load the text encoder in fp16, the type of its file, and diffusers the rest in fp32
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
