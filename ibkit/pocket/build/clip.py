"""Pocket CLIP (open_clip, contrastive): text fidelity (CLIP-T) and CLIP-I.

A batch consists of groups of four scenes that differ in one thing each, so the model has to tell the activity from the
place.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torchvision.transforms import functional as transforms

from ibkit.pocket.build.common import Budget, fit, hash_seed, save_half
from ibkit.pocket.build.data import GROUP, Pictures, encode
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.words import caption
from ibkit.pocket.world import NO_ACTIVITY, activities_of

BUDGET = Budget(steps=600, batch=128)
WIDTH, LAYERS, HEADS, PATCH_PX = 128, 3, 4, 8


def model_config(vocab_size: int) -> dict:
    """open_clip's `model_cfg` of the pocket CLIP."""
    vision = {"image_size": 64, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH_PX}
    text = {"context_length": CONTEXT_TOKENS, "vocab_size": vocab_size, "width": WIDTH, "heads": HEADS}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text | {"layers": LAYERS}}


def normalise(
    images: torch.Tensor, mean: Sequence[float] = OPENAI_DATASET_MEAN, std: Sequence[float] = OPENAI_DATASET_STD
) -> torch.Tensor:
    """Pictures in [-1, 1] to a network's normalised input, CLIP's by default."""
    return transforms.normalize((images + 1) / 2, mean, std)


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise and blur of random strength for pictures (B, 3, H, W) in [-1, 1]: a network trained on degraded renders
    works on decoded pictures too.
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
def zero_shot_activity(model: CLIP, tokenizer, pictures: Pictures, limit: int, device) -> tuple[int, int]:
    """(right, asked): does the closest text "a {class} {activity}", over the activities of the class, name the one of
    the picture? Asked for the first `limit` pictures that show an activity.
    """
    asked = [(i, scene) for i, scene in enumerate(pictures.scenes) if scene.activity != NO_ACTIVITY][:limit]
    right = 0
    for i, scene in asked:
        names = activities_of(scene.subject.class_noun)
        ids = encode(tokenizer, [f"a {scene.subject.class_noun} {name}" for name in names])
        text = F.normalize(model.encode_text(ids.to(device)), dim=-1)
        image = F.normalize(model.encode_image(normalise(pictures.batch([i], device))), dim=-1)
        right += names[int((image @ text.T).argmax())] == scene.activity
    return right, len(asked)


def save(model: CLIP, tokenizer, folder: Path) -> None:
    """Write an open_clip folder: open_clip_config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_half(model.state_dict(), folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
