"""Pocket CLIP (open_clip, contrastive): text fidelity (CLIP-T) and CLIP-I.

Batches are made of groups of four scenes that differ in one thing each, so telling the activity apart from the place
is not optional.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from ibkit.pocket.build.common import Budget, fit, hash_seed, save_half
from ibkit.pocket.build.data import GROUP, Pictures, encode
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.words import caption
from ibkit.pocket.world import ACTIVITIES, NO_ACTIVITY

BUDGET = Budget(steps=600, batch=128)
WIDTH, LAYERS, HEADS, PATCH_PX = 128, 3, 4, 8


def model_config(vocab_size: int) -> dict:
    """open_clip's `model_cfg` of the pocket CLIP."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 64,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "patch_size": PATCH_PX,
        },
        "text_cfg": {
            "context_length": CONTEXT_TOKENS,
            "vocab_size": vocab_size,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    }


def normalise(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] pictures to CLIP's normalised input."""
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD, device=images.device).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise and blur of random strength, so that what is learnt on renders holds on decoded pictures too; (B,
    3, H, W) in [-1, 1].
    """
    b = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    draw = {"generator": generator, "device": images.device}
    mix, noise = torch.rand((b, 1, 1, 1), **draw) * 0.8, torch.randn(images.shape, **draw)
    level = torch.rand((b, 1, 1, 1), **draw) * 0.12
    return (images + mix * (soft - images) + level * noise).clamp(-1, 1)


def train(folder: Path, pictures: Pictures, tokenizer, device, dtype) -> CLIP:
    model = CLIP(**model_config(len(tokenizer)))

    def loss_fn(work, average, step, generator):
        indices = pictures.members(pictures.groups(BUDGET.batch // GROUP, generator)).flatten().cpu()
        rng = random.Random(hash_seed("clip captions", step))
        texts = [caption(pictures.scenes[i], rng) for i in indices]
        ids = encode(tokenizer, texts).to(device)
        x = normalise(degrade(pictures.batch(indices, device), generator)).to(dtype)
        image = F.normalize(work.encode_image(x).float(), dim=-1)
        text = F.normalize(work.encode_text(ids).float(), dim=-1)
        logits = work.logit_scale.float().exp().clamp(max=100) * image @ text.T
        # Captions leave things unsaid, so two pictures of a batch can share a caption: those are no negatives.
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device)
        logits = logits.masked_fill(same & ~torch.eye(len(texts), dtype=torch.bool, device=device), -1e4)
        labels = torch.arange(len(texts), device=device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return loss, {"top1": (logits.argmax(1) == labels).float().mean()}

    return fit("clip", folder, model, loss_fn, BUDGET, device, dtype)


@torch.inference_mode()
def zero_shot_activity(model: CLIP, tokenizer, pictures: Pictures, indices, device) -> tuple[int, int]:
    """(right, asked): activity named by the closest of `a {class} {phrase}` over the activities of the
    picture's class.
    """
    from ibkit.pocket.world import activities_of

    right = 0
    for i in indices:
        scene = pictures.scenes[i]
        names = activities_of(scene.subject.class_noun)
        ids = tokenizer(
            [f"a {scene.subject.class_noun} {ACTIVITIES[a][1][0]}" for a in names],
            padding="max_length",
            max_length=CONTEXT_TOKENS,
            return_tensors="pt",
        )["input_ids"]
        text = F.normalize(model.encode_text(ids.to(device)), dim=-1)
        image = F.normalize(model.encode_image(normalise(pictures.batch([i], device))), dim=-1)
        right += names[int((image @ text.T).argmax())] == scene.activity
    return right, len(indices)


def with_activity(pictures: Pictures, limit: int) -> list[int]:
    return [i for i, s in enumerate(pictures.scenes) if s.activity != NO_ACTIVITY][:limit]


def save(model: CLIP, tokenizer, folder: Path) -> None:
    """Write an open_clip folder: open_clip_config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": model_config(len(tokenizer)),
        "preprocess_cfg": {
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_half(model.state_dict(), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
