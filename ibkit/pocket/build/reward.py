"""The pocket reward model: ImageReward's architecture, trained on preferences as ImageReward was (Xu et al. 2023, eq.
1), with hard negatives.

A preference is: for this text, this picture rather than that one. The pair differs in one thing that the text says: the
activity with subject and place kept, the place, the accessory or the colour; or the worse picture is of another scene
altogether. Every scene with an activity also meets its own subject at rest, because that is what a personalized model
draws instead, and a picture half-way between the two, mixed in the autoencoder's latents, because that is what a policy
draws while it learns: better than rest, worse than the activity. Some pictures come out of the autoencoder with noisy
latents, as those of a policy do.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ibkit.pocket.build.clip import degrade, normalise
from ibkit.pocket.build.common import Budget, fit, hash_seed
from ibkit.pocket.build.data import GROUP, Pictures, contradicts
from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS
from ibkit.pocket.draw import render
from ibkit.pocket.world import ACTIVITIES, NO_ACTIVITY, caption
from ibkit.scorers.image_reward import ImageRewardModel, RewardConfig

BUDGET = Budget(steps=1900, batch=96)


def new_reward_model(tokenizer, n_layers: int) -> ImageRewardModel:
    return ImageRewardModel(
        RewardConfig(
            image_px=64,
            patch_px=8,
            vision_width=96,
            vision_mlp=384,
            vision_layers=n_layers,
            vision_heads=4,
            vocab_size=len(tokenizer),
            tokenizer_size=len(tokenizer),
            text_width=96,
            text_mlp=384,
            text_layers=n_layers - 1,
            text_heads=4,
            text_positions=CONTEXT_TOKENS,
            head_widths=(96, 32, 16),
            head_dropout=(0.0, 0.0),
            max_tokens=CONTEXT_TOKENS,
            mean=0.0,
            std=1.0,
        )
    )


def score_pairs(model: ImageRewardModel, patches: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Raw rewards (P,) of P pairs from encoded pictures (P, tokens, V): many texts can share one pass through
    the vision tower.
    """
    tokens = model.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
    return model.head(tokens[:, 0]).squeeze(-1)


def train(
    folder: Path,
    pictures: Pictures,
    tokenizer,
    vae,
    device,
    dtype,
    budget: Budget = BUDGET,
    name: str = "image_reward",
    hard_negatives: bool = True,
) -> ImageRewardModel:
    """Train on groups of four scenes; without `hard_negatives` the worse picture is always of another scene,
    which makes, with half the layers, the weak reward of the hacking lesson.
    """
    torch.manual_seed(hash_seed("reward weights"))
    model = new_reward_model(tokenizer, 4 if hard_negatives else 2)
    vae = vae.to(device=device, dtype=dtype).requires_grad_(False)

    def loss_fn(work, average, step, generator):
        groups = torch.randint(len(pictures) // GROUP, (budget.batch // GROUP,), generator=generator)
        indices = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten().tolist()
        rng = random.Random(hash_seed("reward captions", step))
        texts = [caption(pictures.scenes[i], rng) for i in indices]
        scenes = [pictures.scenes[i] for i in indices]
        x = pictures.batch(indices, device)
        active = [i for i in range(0, len(scenes), GROUP) if scenes[i].activity != NO_ACTIVITY]
        if hard_negatives:
            scenes += [replace(scenes[i], activity=NO_ACTIVITY) for i in active]
            rest = np.stack([np.asarray(render(s)) for s in scenes[len(indices) :]])
            x = torch.cat([x, torch.from_numpy(rest).to(device).permute(0, 3, 1, 2) / 127.5 - 1])
        part = slice(step % 3, None, 3)
        with torch.no_grad():
            z = vae.encode(x[part].to(dtype)).latent_dist.mode()
            level = 0.3 / vae.config.scaling_factor * torch.rand((len(z), 1, 1, 1), generator=generator)
            x[part] = (
                vae.decode(z + (level * torch.randn(z.shape, generator=generator)).to(z)).sample.float().clamp(-1, 1)
            )
            if hard_negatives:
                doing, resting = (vae.encode(h.to(dtype)).latent_dist.mode() for h in (x[active], x[len(indices) :]))
                share = (0.2 + 0.6 * torch.rand((len(active), 1, 1, 1), generator=generator)).to(doing)
                half_done = vae.decode(share * doing + (1 - share) * resting).sample.float().clamp(-1, 1)
                x = torch.cat([x, half_done])
        pairs = []  # (text, better picture, worse picture)
        for i, text in enumerate(texts):
            first = i - i % GROUP
            if hard_negatives:
                pairs += [(i, i, j) for j in range(first, first + GROUP) if contradicts(text, scenes[i], scenes[j])]
                if first in active:
                    rest = len(indices) + active.index(first)
                    if contradicts(text, scenes[i], scenes[rest]):
                        pairs.append((i, i, rest))
                        if i == first:
                            half = rest + len(active)
                            pairs += [(i, i, half), (i, half, rest)]
            other = first + GROUP * rng.randrange(1, len(groups)) + rng.randrange(GROUP)
            pairs.append((i, i, other % len(texts)))
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt"
        ).to(device)
        asked = {(i, j): k for k, (i, j) in enumerate(dict.fromkeys((i, j) for i, b, w in pairs for j in (b, w)))}
        text_of, image_of = torch.tensor(list(asked), device=device).unbind(1)
        patches = work.vision(normalise(degrade(x, generator)).to(dtype)).last_hidden_state
        scores = score_pairs(
            work, patches[image_of], tokens["input_ids"][text_of], tokens["attention_mask"][text_of]
        ).float()
        better = scores[[asked[i, b] for i, b, w in pairs]]
        worse = scores[[asked[i, w] for i, b, w in pairs]]
        loss = -F.logsigmoid(better - worse).mean() + 1e-3 * scores.square().mean()
        return loss, {"right": (better > worse).float().mean().item()}

    fit(name, folder, model, loss_fn, budget, device, dtype)
    return standardise(model, tokenizer, pictures, device)


@torch.inference_mode()
def standardise(model: ImageRewardModel, tokenizer, pictures: Pictures, device) -> ImageRewardModel:
    """Set mean and std so that right captions of 512 renders score 0 ± 1, as ImageReward is standardised on its
    own data.
    """
    rng = random.Random(hash_seed("reward standardisation"))
    texts = [caption(s, rng) for s in pictures.scenes[:512]]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt").to(
        device
    )
    raw = torch.cat(
        [
            model(
                normalise(pictures.batch(range(i, i + 64), device)),
                tokens["input_ids"][i : i + 64],
                tokens["attention_mask"][i : i + 64],
            )
            for i in range(0, 512, 64)
        ]
    )
    model.config = replace(model.config, mean=float(raw.mean()), std=float(raw.std()))
    return model


@torch.inference_mode()
def ranks_activity(model: ImageRewardModel, tokenizer, pictures: Pictures, device, limit: int) -> tuple[int, int]:
    """(right, asked): the picture of the named activity over the same subject in the same place doing something
    else, text `a {class} {activity}`.
    """
    right = asked = 0
    for first in range(0, len(pictures), GROUP):
        scene = pictures.scenes[first]
        if scene.activity == NO_ACTIVITY or asked == limit:
            continue
        text = f"a {scene.subject.class_noun} {ACTIVITIES[scene.activity][1][0]}"
        tokens = tokenizer([text] * 2, padding="max_length", max_length=CONTEXT_TOKENS, return_tensors="pt").to(device)
        scores = model(
            normalise(pictures.batch([first, first + 1], device)), tokens["input_ids"], tokens["attention_mask"]
        )
        right += bool(scores[0] > scores[1])
        asked += 1
    return right, asked
