"""Attach a delta to a model by kind and name, read and write its weights, and look below it.

The parameters that `attach` returns are the whole state of a delta: what is trained, checkpointed, averaged and saved.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ibkit.adapt import cross_kv, lora, mapper, tokens, unet
from ibkit.errors import ModelError
from ibkit.model.text_to_image import Attached, TextToImage


class Kind(Protocol):
    """What a module of this package offers for its kind of delta."""

    def attach(self, model: TextToImage, name: str, settings: Mapping[str, Any], stream: torch.Generator) -> None:
        """Put a fresh delta on the model; `stream` draws what is random in it."""

    def parameters(self, model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
        """Its weights by a name that does not depend on the delta's."""

    def without(self, model: TextToImage, name: str) -> Any:
        """A context in which the model is what lies below and beside the delta."""

    def export(self, model: TextToImage, name: str, folder: Path) -> None:
        """Write the delta alone, as diffusers and peft load it onto a base model."""


KINDS: dict[str, Kind] = {
    "unet": unet, "lora": lora, "tokens": tokens, "cross_kv": cross_kv, "mapper": mapper,
}  # fmt: skip

FOLDED = {"unet": unet.fold, "tokens": tokens.fold, "cross_kv": cross_kv.fold}  # kinds that a plain pipeline can hold


def attach(
    model: TextToImage, kind: str, name: str, settings: Mapping[str, Any], stream: torch.Generator
) -> dict[str, torch.nn.Parameter]:
    """Freeze the model, put a delta on top, and return its trainable parameters by name, fp32.

    Deltas below stay active and frozen: a LoRA adapter of a first stage still works while a second one trains.

    Args:
        name: of the delta, such as "ddpo"; one model has no two of a name.
        settings: of the kind, such as {"rank": 4}.

    Raises:
        ModelError: the model has a delta of that name, or cannot take one of this kind.
    """
    if name in model.deltas:
        raise ModelError(f"the model has a delta {name!r} already: give the second one another name.")
    freeze(model)
    KINDS[kind].attach(model, name, settings, stream)
    model.deltas[name] = Attached(kind, dict(settings))
    parameters = parameters_of(model, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def freeze(model: TextToImage) -> None:
    """Train nothing of the model."""
    for part in model.parts().values():
        part.requires_grad_(False)


def parameters_of(model: TextToImage, name: str) -> dict[str, torch.nn.Parameter]:
    """A delta's weights by name."""
    return KINDS[model.deltas[name].kind].parameters(model, name)


def without(model: TextToImage, name: str) -> AbstractContextManager[None]:
    """Inside, the model is what lies below the delta: the reference of a KL divergence. It is trainable again after."""
    return KINDS[model.deltas[name].kind].without(model, name)


def state(model: TextToImage, name: str) -> dict[str, torch.Tensor]:
    """A delta's weights by name, on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in parameters_of(model, name).items()}


def load_state(model: TextToImage, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a delta's weights back; other names or shapes, or values that are not finite, are a ModelError."""
    parameters = parameters_of(model, name)
    if parameters.keys() != tensors.keys():
        raise ModelError(
            f"the file of {name!r} has {len(tensors)} weights and the model {len(parameters)}, or other names: it "
            "belongs to another model, kind or rank."
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            if parameter.shape != tensors[key].shape:
                raise ModelError(
                    f"{key} of {name!r} is {tuple(tensors[key].shape)} in the file and {tuple(parameter.shape)} in the "
                    "model: another rank or model."
                )
            if not bool(tensors[key].isfinite().all()):
                raise ModelError(f"{key} of {name!r} has values that are not finite: its training went astray.")
            parameter.copy_(tensors[key])
    model.forget_text()
