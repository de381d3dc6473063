"""Pictures for the build: groups of scenes that differ in one thing each, so that every batch holds its own hard
negatives.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ibkit.pocket.draw import render
from ibkit.pocket.words import caption
from ibkit.pocket.world import (
    ACCESSORIES,
    ACTIVITIES,
    COLOURS,
    DEMO_SUBJECTS,
    HELD_OUT,
    NO_ACCESSORY,
    NO_ACTIVITY,
    PARTS,
    PLACES,
    RARE_SUBJECT,
    Scene,
    accessories_of,
    activities_of,
    doing,
    mixtures_of,
    sample_mixture,
    sample_scene,
)

GROUP = 4  # scenes a group: a base, another activity, another place or accessory, another individual
MIXED_GROUP = 8  # those four; the base at rest, its things alone, its pose alone, and two activities mixed


def scene_group(seed: int, index: int) -> list[Scene]:
    """A base scene and three that differ from it in one respect each; a pure function of (seed, index)."""
    return _scene_group(random.Random(f"{seed}/{index}"))


def _scene_group(rng: random.Random) -> list[Scene]:
    base = sample_scene(rng)
    subject = base.subject
    others = [a for a in activities_of(subject.class_noun, with_none=True) if a != base.activity]
    other_activity = replace(base, **doing(rng.choice(others)))
    worn = [a for a in accessories_of(subject.class_noun) if a != base.accessory]
    if worn and rng.random() < 0.4:
        other_setting = replace(base, accessory=rng.choice(worn))
    else:
        other_setting = replace(base, place=rng.choice([p for p in PLACES if p != base.place]))
    body = rng.choice([c for c in COLOURS if c not in (subject.body, subject.second)])
    other_one = replace(base, subject=replace(subject, body=body))
    return [base, other_activity, other_setting, other_one]


def mixed_group(seed: int, index: int) -> list[Scene]:
    """`scene_group` and four scenes of its subject in which pose and things are apart; a pure function of its
    arguments.

    Where the base has no such part (popcorn has no pose), another mixture of the same subject takes the place.
    """
    rng = random.Random(f"{seed}/{index}")
    group = _scene_group(rng)
    base = group[0]
    whole = len(PARTS.get(base.activity, ())) == 2

    def mixture() -> dict[str, str]:
        scene = sample_mixture(rng, base.subject)
        return {"pose": scene.pose, "things": scene.things}

    rest = mixture() if base.activity == NO_ACTIVITY else doing(NO_ACTIVITY)
    things = {"pose": NO_ACTIVITY} if whole else mixture()
    pose = {"things": NO_ACTIVITY} if whole else mixture()
    pairs = mixtures_of(base.subject.class_noun)["another pose"]
    related = [pair for pair in pairs if base.activity in pair]
    other = dict(zip(("pose", "things"), rng.choice(related), strict=True)) if whole else mixture()
    return group + [replace(base, **facts) for facts in (rest, things, pose, other)]


def in_processes(work: Callable[[Sequence], np.ndarray], items: Sequence, size: int) -> np.ndarray:
    """`work` on pieces of `size` items, on all cores; the results one after the other, in order."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(work, [items[i : i + size] for i in range(0, len(items), size)])))


def _render(scenes: Sequence[Scene]) -> np.ndarray:
    return np.stack([np.asarray(render(scene)) for scene in scenes])


class Pictures:
    """Rendered groups of scenes: `images` uint8 (N, 64, 64, 3), `scenes` (N,). Cached in `folder` once drawn.

    Args:
        group: (seed, index) -> the scenes of a group, `size` of them.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        seed: int,
        n_groups: int,
        group: Callable[[int, int], list[Scene]] = scene_group,
        size: int = GROUP,
    ):
        path = folder / f"{name}-{seed}-{n_groups}.npy"
        self.folder, self.name, self.seed, self.n_groups, self.size = folder, name, seed, n_groups, size
        self.scenes = [scene for i in range(n_groups) for scene in group(seed, i)]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            images = in_processes(_render, self.scenes, 1000)
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, images)
            temporary.replace(path)
        self.images = np.load(path, mmap_mode="r")
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices, device: torch.device) -> torch.Tensor:
        """Pictures as float (B, 3, 64, 64) in [-1, 1]. A GPU keeps a copy of all of them: 12 kB each."""
        if device.type == "cpu":
            return to_range(self.images[np.asarray(indices)], device)
        if device not in self._on_device:
            self._on_device[device] = torch.from_numpy(np.asarray(self.images)).to(device)
        chosen = self._on_device[device][torch.as_tensor(indices, device=device)]
        return chosen.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)

    def groups(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Numbers of `n` random groups, and so on the generator's device (n,)."""
        return torch.randint(self.n_groups, (n,), generator=generator, device=generator.device)

    def members(self, groups: torch.Tensor) -> torch.Tensor:
        """Indices of the pictures of groups (n,) -> (n, size)."""
        return groups[:, None] * self.size + torch.arange(self.size, device=groups.device)

    @cached_property
    def seen(self) -> np.ndarray:
        """Indices that the diffusion model may train on: whole activities or rest, no held-out pair, none of the
        subjects that users personalize.
        """
        reserved = {*DEMO_SUBJECTS.values(), RARE_SUBJECT}
        return np.array(
            [
                i
                for i, s in enumerate(self.scenes)
                if i % self.size < GROUP
                and (s.subject.class_noun, s.activity) not in HELD_OUT
                and s.subject not in reserved
            ]
        )


def to_range(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Pictures of bytes (B, H, W, 3) as float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def says(text: str, ways: Sequence[str]) -> bool:
    return any(way in text for way in ways)


def grades(text: str, scene: Scene, other: Scene) -> tuple[float, ...]:
    """How far `other`, a scene of the same group, agrees with `text`, a caption of `scene`: a number an aspect.

    Activity, place, accessory and colour; 1 where it agrees or the text does not say. Of an activity with two parts,
    one alone is worth half.
    """
    activity, parts = scene.activity, PARTS.get(scene.activity, ())
    named = activity != NO_ACTIVITY and says(text, ACTIVITIES[activity][1])
    colour = f"{scene.subject.body} {scene.subject.class_noun}"
    return (
        sum(getattr(other, part) == activity for part in parts) / len(parts) if named else 1.0,
        float(other.place == scene.place or not says(text, PLACES[scene.place])),
        float(
            other.accessory == scene.accessory
            or scene.accessory == NO_ACCESSORY
            or not says(text, ACCESSORIES[scene.accessory])
        ),
        float(other.subject.body == scene.subject.body or colour not in text),
    )


def is_better(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first agrees with a text at least as far in every aspect, and further in one; both of `grades`."""
    return all(a >= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def partial_caption(scene: Scene, rng: random.Random, whose: bool = False) -> str:
    """A caption that leaves whole parts out, the subject among them unless `whose`: "playing tennis in the park".

    What is never said together can then still be learnt apart.
    """
    parts = [rng.choice((f"a {scene.subject.class_noun}", f"a {scene.subject.body} {scene.subject.class_noun}"))]
    if scene.accessory != NO_ACCESSORY:
        parts.append(rng.choice(ACCESSORIES[scene.accessory]))
    if scene.activity != NO_ACTIVITY:
        parts.append(rng.choice(ACTIVITIES[scene.activity][1]))
    parts.append(rng.choice(PLACES[scene.place]))
    kept = [part for i, part in enumerate(parts) if (whose and i == 0) or rng.random() < 0.5]
    return " ".join(kept or [rng.choice(parts)]).replace("a orange", "an orange")


def base_caption(scene: Scene, rng: random.Random) -> str:
    """What the diffusion model reads: a caption, a partial one, or the plain prompt of an evaluation."""
    draw = rng.random()
    if draw < 0.3:
        return partial_caption(scene, rng)
    if draw < 0.4 and scene.activity != NO_ACTIVITY and scene.accessory == NO_ACCESSORY:
        return f"a {scene.subject.class_noun} {ACTIVITIES[scene.activity][1][0]}"
    return caption(scene, rng)


def naming_caption(scene: Scene, rng: random.Random) -> str:
    """What the diffusion model reads at the end of its training: always with the class."""
    draw = rng.random()
    if draw < 0.2:
        return partial_caption(scene, rng, whose=True)
    if draw < 0.5 and scene.activity != NO_ACTIVITY and scene.accessory == NO_ACCESSORY:
        return f"a {scene.subject.class_noun} {ACTIVITIES[scene.activity][1][0]}"
    return caption(scene, rng)


def token_table(
    pictures: Pictures, tokenizer, write: Callable[[Scene, random.Random], str], n_variants: int
) -> torch.Tensor:
    """Token ids of `n_variants` captions of every picture, (N, n_variants, tokens) int16; drawn once, on all cores."""
    work = partial(_tokens, tokenizer, write, n_variants, pictures.seed)
    return torch.from_numpy(in_processes(work, list(enumerate(pictures.scenes)), 4000))


def _tokens(tokenizer, write, n_variants: int, seed: int, numbered: Sequence[tuple[int, Scene]]) -> np.ndarray:
    rng = random.Random(f"{write.__name__} {seed} {numbered[0][0]}")
    texts = [write(scene, rng) for _, scene in numbered for _ in range(n_variants)]
    return encode(tokenizer, texts).numpy().astype(np.int16).reshape(len(numbered), n_variants, -1)


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (B, CONTEXT_TOKENS), padded and cut."""
    from ibkit.pocket.build.tokenizer import CONTEXT_TOKENS

    kwargs = {"padding": "max_length", "truncation": True, "max_length": CONTEXT_TOKENS, "return_tensors": "pt"}
    return tokenizer(texts, **kwargs)["input_ids"]


def facts(scene: Scene) -> dict[str, str]:
    """The answers to the judge's questions about a scene."""
    return {
        "class": scene.subject.class_noun,
        "pose": scene.pose,
        "things": scene.things,
        "place": scene.place,
        "accessory": scene.accessory,
    }
