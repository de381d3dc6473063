"""Class images for prior preservation, made by the base model itself and cached by a key of everything that
made them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ibkit.device import generator
from ibkit.model.sample import Sampler, sample_latents
from ibkit.model.text_to_image import TextToImage, default_batch, model_fingerprint
from ibkit.runs import alone_in, hash_json, read_json, write_atomically
from ibkit.runs.files import TEMPORARY_SUFFIX

INDEX = "index.json"  # file name -> SHA-256 of its bytes


def class_images(
    model: TextToImage,
    prompt: str,
    n: int,
    sampler: Sampler,
    cache: Path,
    seed: int,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """`n` pictures of the class prompt by the base model (DreamBooth, section 3.3: 200).

    The folder of the cache is named by the hash of all that makes them: model weights, prompt, sampler, seed, number,
    and the device type and precision of the arithmetic. A batch of which a file is missing, damaged or not the one
    written is drawn again as a whole, so a repaired cache equals a new one. A second process waits for the first.

    Args:
        seed: the run's; the noise of a picture depends on it and on the picture's number.
        on_image: called after each batch drawn with (pictures there are, pictures wanted).

    Raises:
        ArtifactError: the cache cannot be written.
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
    folder, batch = cache / hash_json(made_by)[:16], default_batch(model.image_px)
    files = []
    with alone_in(folder):
        for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        index = _read_index(folder)
        for first in range(0, n, batch):
            indices = range(first, min(first + batch, n))
            kept = [_read_unaltered(folder / f"{i:04d}.png", index) for i in indices]
            found = [data for data in kept if data is not None]
            if len(found) < len(kept):
                found = _draw(model, prompt, sampler, seed, indices)
                for i, data in zip(indices, found, strict=True):
                    _write(folder / f"{i:04d}.png", data)
                    index[f"{i:04d}.png"] = hashlib.sha256(data).hexdigest()
                _write(folder / INDEX, json.dumps(index, indent=1).encode())
                if on_image:
                    on_image(first + len(indices), n)
            files += found
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def _draw(model: TextToImage, prompt: str, sampler: Sampler, seed: int, indices: range) -> list[bytes]:
    """One batch as PNG files."""
    seeds = [int(torch.randint(2**31, (), generator=generator(seed, "class image", i))) for i in indices]
    files = []
    for picture in model.decode(sample_latents(model, [prompt] * len(seeds), seeds, sampler, len(seeds))):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))


def _read_index(folder: Path) -> dict[str, str]:
    """The hashes noted; none where the index is missing or unreadable, so that everything is drawn again."""
    try:
        index = read_json(folder / INDEX)
    except (FileNotFoundError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _read_unaltered(path: Path, index: dict[str, str]) -> bytes | None:
    """A file's bytes, or None unless they are those noted."""
    data = path.read_bytes() if path.is_file() else b""
    return data if hashlib.sha256(data).hexdigest() == index.get(path.name) else None
