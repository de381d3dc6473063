"""A text-to-image model small enough to train inside a test: the pocket model's parts, 54 thousand weights of
U-Net, 16 px pictures.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ibkit.model.text_to_image import TextToImage, use_quick_attention

TEXT_WIDTH = 16


def tiny_model(tokenizer, seed: int = 0) -> TextToImage:
    """Random weights that depend on `seed` alone; 4x8x8 latents, 16 px pictures, Stable Diffusion's noise schedule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 24),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.9,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=32,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    for part in (unet, vae, text_encoder):
        part.eval().requires_grad_(False)
    use_quick_attention(unet, torch.device("cpu"))  # as a loaded model has it
    return TextToImage("tiny", unet, vae, text_encoder, tokenizer, scheduler(), torch.device("cpu"))


def scheduler(**changes) -> DDIMScheduler:
    """Stable Diffusion's DDIM scheduler."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings | changes)


def only_checkpoint(folder: Path) -> Path:
    """The newest checkpoint below a training folder."""
    return sorted((folder / "checkpoints").glob("step-*"))[-1]
