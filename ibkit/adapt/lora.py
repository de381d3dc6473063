"""The delta `lora`: low-rank adapters beside the U-Net's attention projections (Hu et al. 2021), by peft.

Settings: rank; or, of an adapter made elsewhere, `ranks`: the rank of each module that it adapts, by the module's name.
The scale is 1 (peft's alpha is the rank).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ibkit.errors import ModelError
from ibkit.model.text_to_image import Attached, TextToImage

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
NO_LORA = ("dora_scale", "lora_magnitude", "lora_mid", "hada_", "lokr_", "oft_")  # in names of other adapters' weights


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """An adapter that starts as the identity: A is drawn from `stream`, B is zero."""
    from peft import LoraConfig

    ranks = settings.get("ranks", {})
    rank = settings["rank"] if not ranks else max(ranks.values())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(ranks or TARGETS), init_lora_weights="gaussian",
        rank_pattern=ranks, alpha_pattern=ranks,
    )  # fmt: skip
    below = _names(model)
    with warnings.catch_warnings():  # peft warns of a second adapter, which is what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        model.unet.add_adapter(config, adapter_name=name)
    _switch_on(model, [*below, name], trained="")  # peft would leave the newest alone active
    for key, parameter in parameters(model, name).items():
        if "lora_A" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=stream) / rank)


def attach_file(model: TextToImage, name: str, path: Path) -> None:
    """Put an adapter made elsewhere on the model, frozen: a .safetensors file as diffusers or kohya's scripts write it.

    diffusers reads it; its scale (alpha / rank) is then multiplied into B, so that ours is 1. One that is
    damaged, not a LoRA of this U-Net, or changes more than that is a ModelError.
    """
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            broken = [key for key in keys if not bool(file.get_tensor(key).isfinite().all())]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a .safetensors file, or is damaged ({error}): download it again.") from error
    if strange := [key for key in keys if any(mark in key for mark in NO_LORA)]:
        raise ModelError(f"{path} holds an adapter of another kind than LoRA ({strange[0]}): give a plain LoRA.")
    if keys and all(key.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for key in keys):
        raise ModelError(
            f"{path} is a file of a run of this kit: `ibkit export RUN FOLDER` writes the adapter of a run as other "
            "tools read it; give that file."
        )
    if broken:
        raise ModelError(
            f"{path} has {len(broken)} weights that are not finite (first {broken[0]}): its training went astray, give "
            "another file."
        )
    if text := [key for key in keys if key.startswith(("text_encoder", "lora_te"))]:
        raise ModelError(
            f"{path} adapts the text encoder too ({len(text)} weights, first {text[0]}), which stays as it is here: "
            "give a LoRA of the U-Net alone, or merge this one into the model with diffusers (load_lora_weights, "
            "fuse_lora, unload_lora_weights, save_pretrained) and give that folder as the model."
        )
    adapted, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        path.parent, weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    try:
        model.unet.load_lora_adapter(
            adapted, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name=name
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path} does not fit the U-Net of {model.name!r}: it is a LoRA of another model.") from error
    ranks = {}
    for module_name, module in model.unet.named_modules():
        if name in getattr(module, "lora_B", {}):
            ranks[module_name] = module.r[name]
            module.lora_B[name].weight.data.mul_(module.scaling[name])
            module.scaling[name] = 1.0
    if not ranks or 2 * len(ranks) != len(adapted):
        raise ModelError(
            f"of the {len(adapted)} weights in {path}, {2 * len(ranks)} belong to the U-Net of {model.name!r}: it is a "
            "LoRA of another model, or in a format that diffusers does not load."
        )
    model.deltas[name] = Attached("lora", {"ranks": ranks})
    _switch_on(model, _names(model), trained="")


def parameters(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """Its A and B of each projection."""
    mark = f".{name}."
    return {n.replace(mark, "."): p for n, p in model.unet.named_parameters() if ".lora_" in n and mark in n}


@contextmanager
def without(model: TextToImage, name: str) -> Iterator[None]:
    """Inside, only the other adapters are active."""
    names = _names(model)
    _switch_on(model, [other for other in names if other != name], trained="")
    try:
        yield
    finally:
        _switch_on(model, names, trained=name)


def export(model: TextToImage, name: str, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, for diffusers' `load_lora_weights`."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet, adapter_name=name))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)


def _names(model: TextToImage) -> list[str]:
    return [name for name, attached in model.deltas.items() if attached.kind == "lora"]


def _switch_on(model: TextToImage, names: list[str], trained: str) -> None:
    """Make these adapters the active ones, of which at most one is trained."""
    if not names:
        model.unet.disable_adapters()
        return
    model.unet.enable_adapters()
    model.unet.set_adapter(names)  # makes all of them trainable
    for name in names:
        for parameter in parameters(model, name).values():
            parameter.requires_grad_(name == trained)
