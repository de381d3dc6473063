"""Class images for prior preservation, made by the base model itself and cached by a key of everything that
made them.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ibkit.data.photos import png
from ibkit.device import generator
from ibkit.model.sample import Sampler, sample_latents
from ibkit.model.text_to_image import TextToImage, default_batch, model_fingerprint
from ibkit.runs import cached, hash_json


def class_images(
    model: TextToImage,
    prompt: str,
    n: int,
    sampler: Sampler,
    cache: Path,
    seed: int,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """`n` pictures of the class prompt by the base model (DreamBooth, section 3.3: 200); an ArtifactError where the
    cache cannot be written.

    The folder of the cache is named by the hash of all that makes them: model weights, prompt, sampler, seed, number,
    and the device type and precision of the arithmetic. A batch of which a file is missing, damaged or not the one
    written is drawn again as a whole, so a repaired cache equals a new one. A second process waits for the first.

    Args:
        seed: the run's; the noise of a picture depends on it and on the picture's number.
        on_image: called after each batch drawn with (pictures there are, pictures wanted).
    """
    made_by = {
        "model": model_fingerprint(model),
        "prompt": prompt,
        "sampler": str(sampler),
        "seed": seed,
        "px": model.image_px,
        "n": n,  # decides the size of the last batch, and that the last bit of its pictures
        "device": model.device.type,
        "dtype": str(model.autocast or torch.float32),
    }
    folder, size = cache / hash_json(made_by)[:16], default_batch(model.image_px)
    batches = [range(first, min(first + size, n)) for first in range(0, n, size)]
    files = cached(
        folder,
        [[f"{i:04d}.png" for i in batch] for batch in batches],
        lambda number: _draw(model, prompt, sampler, seed, batches[number]),
        (lambda done: on_image(done, n)) if on_image else None,
    )
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def _draw(model: TextToImage, prompt: str, sampler: Sampler, seed: int, indices: range) -> list[bytes]:
    """One batch as PNG files."""
    seeds = [int(torch.randint(2**31, (), generator=generator(seed, "class image", i))) for i in indices]
    latents = sample_latents(model, [prompt] * len(seeds), seeds, sampler, len(seeds))
    return [png(picture) for picture in model.decode(latents)]
