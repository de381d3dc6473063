"""The delta `mapper`: a word whose meaning depends on the denoising step and on the layer that reads it (Alaluf et al.
2023, NeTI).

Settings: word, the new one; start, the word of one token whose row gives the norm; seed, of the encoding's frequencies;
norm, of what (`NORMS`); truncate, how many of the hidden units are used, 0 = all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ibkit.adapt import tokens
from ibkit.device import generator
from ibkit.errors import ModelError
from ibkit.model.attention import cross_attention_layers
from ibkit.model.mapper import MappedText, Mapper
from ibkit.model.text_to_image import TextToImage


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """A fresh mapper, drawn from `stream`; a ModelError where the model has one, or cannot learn the word
    (`tokens.add_word`).
    """
    if model.mapped is not None:
        raise ModelError(f"the model has a word with a mapper already, and {name!r} would be a second: use one.")
    row = tokens.add_word(model, name, settings["word"], settings["start"]).detach()
    n_layers = len(cross_attention_layers(model.unet))
    frequencies = generator(settings["seed"], "neti frequencies")
    mapper = Mapper(
        n_layers, row.shape[1], float(row.norm()), frequencies, stream, settings["norm"], settings["truncate"]
    )
    [word] = model.token_ids(settings["word"])
    model.mapped = MappedText(mapper.to(model.device), word)


def parameters(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """The mapper's weights."""
    assert model.mapped is not None
    return dict(model.mapped.mapper.named_parameters())


without = tokens.without  # not possible either


def export(model: TextToImage, name: str, folder: Path) -> None:
    """Write `mapper.safetensors` with its frequencies; diffusers has no loader for such a word."""
    from safetensors.torch import save_file

    assert model.mapped is not None
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.mapped.mapper.state_dict().items()}
    save_file(state, folder / "mapper.safetensors")
