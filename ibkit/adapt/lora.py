"""The delta `lora`: low-rank adapters beside the U-Net's attention projections (Hu et al. 2021), by peft.

Settings: rank. The scale is 1 (peft's alpha is the rank).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ibkit.model.text_to_image import TextToImage

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """An adapter that starts as the identity: A is drawn from `stream`, B is zero."""
    from peft import LoraConfig

    rank = settings["rank"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian")
    below = _names(model)
    with warnings.catch_warnings():  # peft warns of a second adapter, which is what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        model.unet.add_adapter(config, adapter_name=name)
    _switch_on(model, [*below, name], trained="")  # peft would leave the newest alone active
    for key, parameter in parameters(model, name).items():
        if "lora_A" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=stream) / rank)


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
