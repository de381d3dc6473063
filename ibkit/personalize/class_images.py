"""Class images for prior preservation, made by the base model itself and cached by a key of everything that
made them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ibkit.data.photos import read_rgb
from ibkit.device import generator
from ibkit.models import TextToImage, default_batch, model_fingerprint
from ibkit.runs import hash_json
from ibkit.sample import Sampler, sample_latents


def class_images(
    model: TextToImage,
    prompt: str,
    n: int,
    sampler: Sampler,
    cache: Path,
    seed: int = 0,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """`n` pictures of the class prompt by the base model (DreamBooth, section 3.3: 200).

    They are cached in a folder named by the hash of model weights, prompt, sampler and seed, so a changed prompt or
    model never meets old pictures. An interrupted run leaves whole pictures only and goes on after them.

    Args:
        on_image: called with (pictures there are, pictures wanted).
    """
    folder = (
        cache
        / hash_json(
            {
                "model": model_fingerprint(model),
                "prompt": prompt,
                "sampler": str(sampler),
                "seed": seed,
                "px": model.image_px,
            }
        )[:16]
    )
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(n) if not (folder / f"{i:04d}.png").exists()]
    batch = default_batch(model.image_px)
    for first in range(0, len(missing), batch):
        indices = missing[first : first + batch]
        seeds = [int(torch.randint(2**31, (), generator=generator(seed, "class image", i))) for i in indices]
        pictures = model.decode(sample_latents(model, [prompt] * len(indices), seeds, sampler, batch))
        for i, picture in zip(indices, pictures, strict=True):
            temporary = folder / f".{i:04d}.tmp"
            picture.save(temporary, format="PNG")
            temporary.replace(folder / f"{i:04d}.png")
        if on_image:
            on_image(n - len(missing) + first + len(indices), n)
    return [read_rgb(folder / f"{i:04d}.png") for i in range(n)]
