"""The delta `unet`: every weight of the U-Net, as DreamBooth trains them. Below it, only adapters may lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ibkit.errors import ModelError
from ibkit.model.text_to_image import TextToImage


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """Nothing is added: the base's own weights are what is trained, in place; an adapter stays beside them."""
    if below := [other for other, delta in model.deltas.items() if delta.kind != "lora"]:
        raise ModelError(f"{name!r} trains the whole U-Net and cannot stand on {', '.join(below)}: make it the first.")


def parameters(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """The U-Net's own weights, whatever has been put on it since."""
    own = {n: p for n, p in model.unet.named_parameters() if ".lora_" not in n and not n.endswith(".delta")}
    return {n.replace(".base_layer", ""): p for n, p in own.items()}


def without(model: TextToImage, name: str) -> NoReturn:
    """Not possible: the base's weights were overwritten, and a second U-Net is not kept."""
    raise ModelError(f"what lies below {name!r} is not in memory: load the base model beside it.")


def fold(model: TextToImage, name: str) -> None:
    """Nothing: it is the U-Net."""


def export(model: TextToImage, name: str, folder: Path) -> None:
    """Nothing of its own: the pipeline that `Adapted.export` writes has this U-Net."""
