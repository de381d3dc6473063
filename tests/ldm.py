"""Stable Diffusion's first file format, which most people's models have: names of diffusers' weights turned back.

The names are those of CompVis' code; diffusers' `convert_diffusers_to_original_stable_diffusion.py` lists them.
"""

import re

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name):
    """Of a U-Net with four levels and two layers a level."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET:
        return f"{UNET[stem]}.{kind}"
    block, i, what, j, rest = re.fullmatch(r"(\w+?)(?:_blocks?)\.?(\d*)\.(\w+)\.(\d)\.(.*)", name).groups()
    level, layer = int(i or 0), int(j)
    if what == "resnets":
        rest = re.sub("^[a-z_0-9]+", lambda found: RESNET[found.group()], rest)
    if block == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * layer}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    number = 3 * level + layer + (block == "down")
    return f"{'input' if block == 'down' else 'output'}_blocks.{number}.{int(what == 'attentions')}.{rest}"


def vae_name(name):
    """Of an autoencoder with four levels."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for theirs, ours in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{ours}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", name)


def checkpoint(unet, vae, text_encoder):
    """The weights of the three parts in one dict."""
    found = {f"model.diffusion_model.{unet_name(name)}": weight for name, weight in unet.state_dict().items()}
    for name, weight in vae.state_dict().items():
        convolution = ".attentions." in name and name.endswith("weight") and "group_norm" not in name
        found[f"first_stage_model.{vae_name(name)}"] = weight[:, :, None, None] if convolution else weight
    for name, weight in text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    return {name: weight.contiguous() for name, weight in found.items()}
