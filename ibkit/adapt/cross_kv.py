"""The delta `cross_kv`: what the U-Net's cross-attentions make of text, and the words that name the subjects, as Custom
Diffusion trains them (Kumari et al. 2022).

Settings: words, a table of new word -> the word whose row it begins as a copy of.

Every `attn2` layer keeps its key and value matrices W_0 and gains differences Δ, so that K = (W_0 + Δ) c. For the start
mark (position 0) keys and values pass no gradient, as in the reference code.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ibkit.adapt import tokens
from ibkit.errors import ModelError
from ibkit.model.attention import cross_attention_layers
from ibkit.model.text_to_image import TextToImage

PROJECTIONS = ("to_k", "to_v")


class ChangedLinear(torch.nn.Linear):
    """A projection of text with a difference on its matrix, (out, in); text is (B, L, in)."""

    def __init__(self, below: torch.nn.Linear, name: str):
        super().__init__(below.in_features, below.out_features, bias=below.bias is not None, device="meta")
        self.weight, self.bias, self.name = below.weight, below.bias, name
        self.delta = torch.nn.Parameter(torch.zeros_like(below.weight))
        self.on = True

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return super().forward(text)
        projected = F.linear(text, self.weight + self.delta, self.bias)
        if not self.delta.requires_grad:
            return projected
        return torch.cat([projected[:, :1].detach(), projected[:, 1:]], dim=1)


def attach(model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
    """Differences of zero, and new words; a ModelError where another method's changes stand on the same matrices."""
    if others := [n for n, attached in model.deltas.items() if attached.kind in ("cross_kv", "lora")]:
        raise ModelError(
            f"{name!r} changes the cross-attentions that {others[0]!r} has changed: put it on the base model; "
            "`ibkit.methods.custom_diffusion.merge` makes one of two."
        )
    for i, (word, start) in enumerate(settings["words"].items()):
        tokens.add_word(model, _word_name(name, i), word, start)
    for _, layer in cross_attention_layers(model.unet):
        for projection in PROJECTIONS:
            setattr(layer, projection, ChangedLinear(getattr(layer, projection), name))


def _word_name(name: str, i: int) -> str:
    return f"{name}/{i}"


def changed(model: TextToImage, name: str) -> dict[str, ChangedLinear]:
    """The projections of a delta by their name in the U-Net, in the order in which a pass runs the layers."""
    return {
        f"{place}.{projection}": module
        for place, layer in cross_attention_layers(model.unet)
        for projection in PROJECTIONS
        # a LoRA on top wraps it
        if isinstance(
            module := getattr(getattr(layer, projection), "base_layer", getattr(layer, projection)), ChangedLinear
        )
        and module.name == name
    }


def parameters(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """Differences by the projection's name, and the words' rows."""
    words = model.deltas[name].settings["words"]
    rows = {f"word {word}": tokens.rows_of(model, _word_name(name, i)) for i, word in enumerate(words)}
    return {f"{place}.delta": module.delta for place, module in changed(model, name).items()} | rows


@contextmanager
def without(model: TextToImage, name: str) -> Iterator[None]:
    """Inside, the cross-attentions are those below; the words stay."""
    modules = list(changed(model, name).values())
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


def fold(model: TextToImage, name: str) -> None:
    """Make the projections ordinary ones, and the words ordinary rows."""
    for place, module in changed(model, name).items():
        plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = torch.nn.Parameter((module.weight + module.delta).detach()), module.bias
        layer, _, projection = place.rpartition(".")
        setattr(model.unet.get_submodule(layer), projection, plain)
    tokens.fold(model, name)


def export(model: TextToImage, name: str, folder: Path) -> None:
    """Write `pytorch_custom_diffusion_weights.safetensors`, whole matrices for diffusers' `unet.load_attn_procs`, and a
    folder of each word below it, for `load_textual_inversion`.

    diffusers 0.42 ignores the matrices without a word unless it is told the pipeline (`_pipeline=pipeline`).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # diffusers wants an entry for every attention layer, and takes an empty one for those that are as they were
    tensors = {place: torch.empty(0) for place in model.unet.attn_processors if ".attn2." not in place}
    for place, module in changed(model, name).items():
        layer, _, projection = place.rpartition(".")
        key = f"{layer}.processor.{projection}_custom_diffusion.weight"
        tensors[key] = (module.weight + module.delta).detach().cpu().contiguous()
    save_file(tensors, folder / "pytorch_custom_diffusion_weights.safetensors")
    for i, word in enumerate(model.deltas[name].settings["words"]):
        tokens.export_rows(word, tokens.rows_of(model, _word_name(name, i)), folder / word.strip("<>"))
