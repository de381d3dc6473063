"""Pictures for the build: groups of four scenes that differ in one thing each, so that every batch holds its
own hard negatives.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ibkit.pocket.draw import render
from ibkit.pocket.world import (
    ACCESSORIES,
    ACTIVITIES,
    COLOURS,
    DEMO_SUBJECTS,
    HELD_OUT,
    NO_ACCESSORY,
    NO_ACTIVITY,
    PLACES,
    RARE_SUBJECT,
    Scene,
    accessories_of,
    activities_of,
    sample_scene,
)

GROUP = 4  # scenes a group: a base, another activity, another place or accessory, another individual


def scene_group(seed: int, index: int) -> list[Scene]:
    """A base scene and three that differ from it in one respect each; a pure function of (seed, index)."""
    rng = random.Random(f"{seed}/{index}")
    base = sample_scene(rng)
    subject = base.subject
    other_activity = replace(
        base, activity=rng.choice([a for a in activities_of(subject.class_noun, with_none=True) if a != base.activity])
    )
    worn = [a for a in accessories_of(subject.class_noun) if a != base.accessory]
    if worn and rng.random() < 0.4:
        other_setting = replace(base, accessory=rng.choice(worn))
    else:
        other_setting = replace(base, place=rng.choice([p for p in PLACES if p != base.place]))
    body = rng.choice([c for c in COLOURS if c not in (subject.body, subject.second)])
    other_one = replace(base, subject=replace(subject, body=body))
    return [base, other_activity, other_setting, other_one]


def _render_groups(job: tuple[int, int, int]) -> np.ndarray:
    seed, first, last = job
    return np.stack([np.asarray(render(s)) for i in range(first, last) for s in scene_group(seed, i)])


class Pictures:
    """`n_groups * 4` rendered scenes: `images` uint8 (N, 64, 64, 3), `scenes` (N,). Cached in `folder` once drawn."""

    def __init__(self, folder: Path, name: str, seed: int, n_groups: int):
        path = folder / f"{name}-{seed}-{n_groups}.npy"
        self.scenes = [s for i in range(n_groups) for s in scene_group(seed, i)]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [(seed, i, min(i + 250, n_groups)) for i in range(0, n_groups, 250)]
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                images = np.concatenate(list(pool.map(_render_groups, jobs)))
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, images)
            temporary.replace(path)
        self.images = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices, device: torch.device) -> torch.Tensor:
        """Pictures as float (B, 3, 64, 64) in [-1, 1]."""
        return to_range(self.images[np.asarray(indices)], device)

    def seen(self) -> np.ndarray:
        """Indices that the diffusion model may train on: no held-out pair, none of the subjects that users
        personalize.
        """
        reserved = {*DEMO_SUBJECTS.values(), RARE_SUBJECT}
        return np.array(
            [
                i
                for i, s in enumerate(self.scenes)
                if (s.subject.class_noun, s.activity) not in HELD_OUT and s.subject not in reserved
            ]
        )


def to_range(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Pictures of bytes (B, H, W, 3) as float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def contradicts(text: str, scene: Scene, other: Scene) -> bool:
    """Whether `text`, a caption of `scene`, says something that is not so in `other`, a scene of the same group."""

    def says(ways: tuple[str, ...]) -> bool:
        return any(way in text for way in ways)

    return (
        (other.activity != scene.activity and scene.activity != NO_ACTIVITY and says(ACTIVITIES[scene.activity][1]))
        or (other.place != scene.place and says(PLACES[scene.place]))
        or (
            other.accessory != scene.accessory
            and scene.accessory != NO_ACCESSORY
            and says(ACCESSORIES[scene.accessory])
        )
        or (other.subject.body != scene.subject.body and f"{scene.subject.body} {scene.subject.class_noun}" in text)
    )


def facts(scene: Scene) -> dict[str, str]:
    """The answers to the judge's questions about a scene."""
    return {
        "class": scene.subject.class_noun,
        "activity": scene.activity,
        "place": scene.place,
        "accessory": scene.accessory,
    }
