"""A Stable Diffusion 1.x checkpoint in one .safetensors file, as it was published and as most people's models are kept.

Such a file has weights alone. diffusers' own `from_single_file` fetches configs and tokenizer from the hub; here they
are below, and the tokenizer, which is CLIP's, comes with open_clip: no network is needed.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError

from ibkit.errors import ModelError
from ibkit.model.loading import require_whole

# Stable Diffusion 1.x; the rest are defaults of diffusers and transformers.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SD15_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SD15_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def read(path: Path) -> tuple:
    """U-Net, autoencoder, text encoder, tokenizer and scheduler; weights in fp32, whatever the file has. A ModelError
    where it is damaged, or not a whole checkpoint of SD 1.x.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as ldm
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        checkpoint = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}): download it again.") from error
    if (kind := ldm.infer_diffusers_model_type(checkpoint)) != "v1":
        raise ModelError(
            f"{path} is a checkpoint of the type {kind}, and of single files only Stable Diffusion 1.x is read: take "
            "the model in diffusers format."
        )
    with init_empty_weights():
        unet, vae = UNet2DConditionModel(**SD15_UNET), AutoencoderKL(**SD15_VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    text = ldm.convert_ldm_clip_checkpoint(checkpoint)
    if not hasattr(text_encoder, "text_model"):  # transformers 5.6 took this level of names away
        text = {name.removeprefix("text_model."): weight for name, weight in text.items()}
    text = {name: weight for name, weight in text.items() if not name.endswith("position_ids")}
    for part, module, weights in (
        ("unet", unet, ldm.convert_ldm_unet_checkpoint(checkpoint, unet.config)),
        ("vae", vae, ldm.convert_ldm_vae_checkpoint(checkpoint, vae.config)),
        ("text encoder", text_encoder, text),
    ):
        shapes = {name: weight.shape for name, weight in module.state_dict().items()}
        reshaped = {name for name, weight in weights.items() if weight.shape != shapes.get(name, weight.shape)}
        fitting = {name: w.to(torch.float32, copy=True) for name, w in weights.items() if name not in reshaped}
        report = module.load_state_dict(fitting, strict=False, assign=True)
        missing = [name for name in report.missing_keys if name not in reshaped]
        require_whole(module, f"the {part} in {path}", missing, report.unexpected_keys, sorted(reshaped))
    return unet, vae, text_encoder, clip_tokenizer(), DDIMScheduler(**SD15_SCHEDULE)


def clip_tokenizer():
    """CLIP's tokenizer from open_clip's copy of its vocabulary, as `transformers.CLIPTokenizer`."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {marks.get(word, word): i for word, i in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(theirs.bpe_ranks), model_max_length=77)
