"""Scorers with a gradient: which they are, and how pixels reach their networks."""

from collections.abc import Sequence

import torch

from ibkit.scorers.base import SCORERS, Scorer


def has_gradient(name: str) -> bool:
    """Whether a scorer offers `differentiable`."""
    return SCORERS.find(name).differentiable is not Scorer.differentiable


def without_gradient(name: str) -> str:
    """What to say of one that does not."""
    able = ", ".join(filter(has_gradient, SCORERS))
    return (
        f"{name} has no gradient with respect to a picture here: choose one of {able} as the reward, or a method that "
        "needs none, such as ddpo."
    )


def differentiable_pixel_values(
    pixels: torch.Tensor, resize_px: int, crop_px: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """`to_pixel_values` of pixels (B, 3, H, W) in [0, 1], with their gradient."""
    from torchvision.transforms import InterpolationMode, functional

    resized = functional.resize(pixels, [resize_px], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    square = functional.center_crop(resized, [crop_px])
    return (square - square.new_tensor(mean).view(3, 1, 1)) / square.new_tensor(std).view(3, 1, 1)
