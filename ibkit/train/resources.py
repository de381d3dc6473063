"""What a training may do to fit on a GPU, or to run faster there; what is learned changes by rounding only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ibkit.device import park
from ibkit.errors import ParameterError
from ibkit.fields import field

if TYPE_CHECKING:
    from ibkit.model.text_to_image import TextToImage


@dataclass(frozen=True)
class Resources:
    """Each is off unless asked for. `ibkit plan` says which of the first four a GPU needs; `ibkit run` sets them."""

    offload: bool = field(
        False, "text encoder, autoencoder and scorers wait in the machine's memory until they are used", "ours"
    )
    frozen_bf16: bool = field(
        False, "keep the U-Net's frozen layers in bf16, as autocast reads them; what is trained stays fp32", "ours"
    )
    checkpointing: bool = field(
        False, "gradient checkpointing: a quarter to a third more operations, and little is kept", "ours"
    )
    adam_8bit: bool = field(False, "AdamW with moments of 8 bits, by bitsandbytes", "ours")
    channels_last: bool = field(False, "convolutions with the channels innermost; speed only", "ours")
    compile: bool = field(False, "compile the U-Net with torch.compile; speed only, after minutes of compiling", "ours")

    @property
    def origin(self) -> dict[str, str]:
        """What a checkpoint can only be continued with; see `train.loop`."""
        return {"optimizer": "8-bit AdamW"} if self.adam_8bit else {}

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's two moments of a weight."""
        return 2 if self.adam_8bit else 8

    def prepare(self, model: TextToImage) -> None:
        """Apply to a model whose delta is attached: what has a gradient now is what is trained. A ParameterError for
        frozen_bf16 where the U-Net does not compute in bf16.
        """
        if self.offload:
            park(*(part for part in (model.vae, model.text_encoder) if not _is_trained(part)))
        if self.frozen_bf16:
            if model.autocast is not torch.bfloat16:
                raise ParameterError(
                    f"resources.frozen_bf16 needs a U-Net that computes in bf16, and on {model.device} it computes in "
                    "fp32: leave it off."
                )
            for layer in model.unet.modules():
                # the layers whose weights autocast rounds to bf16 at every use, so storing them so changes no bit
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                    if not _is_trained(layer):
                        layer.to(torch.bfloat16)
        if self.checkpointing:
            model.unet.enable_gradient_checkpointing()
        if self.channels_last:
            model.unet.to(memory_format=torch.channels_last)
        if self.compile:
            model.unet.compile()

    def adamw(self, weights: Iterable[torch.nn.Parameter], **options) -> torch.optim.Optimizer:
        """AdamW with options of `torch.optim.AdamW`; adam_8bit without bitsandbytes is a ParameterError."""
        if not self.adam_8bit:
            return torch.optim.AdamW(weights, **options)
        require_bitsandbytes()
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, **{name: value for name, value in options.items() if name != "fused"})


def _is_trained(module: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def has_bitsandbytes() -> bool:
    """Whether it is installed."""
    return find_spec("bitsandbytes") is not None


def require_bitsandbytes() -> None:
    """Raise ParameterError unless it is installed."""
    if not has_bitsandbytes():
        raise ParameterError(
            "resources.adam_8bit needs the package bitsandbytes: pip install 'ibkit[low-memory]', or leave it off."
        )
