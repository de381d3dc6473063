"""A LoRA by which the shipped model half knows counts: "two red cats in the park", with one to four subjects.

Pre-training showed one subject a picture, and its tokenizer spells numbers and plurals in pieces that no text encoder
was trained on. So that feedback on counts has something to choose from, as with Stable Diffusion (Lee et al. 2023: the
count is right in 34 % of its pictures), an adapter is trained on counted scenes. The base stays as it is, and so does
its autoencoder, which never saw subjects as small as these and blurs them: the class is what goes wrong here.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from safetensors.torch import load_file

from ibkit.adapt import attach, freeze, lora
from ibkit.device import generator
from ibkit.methods.engine.photos import MAY_CHANGE, Examples, PhotoConfig, fit
from ibkit.model.sample import sample
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.pocket.build.common import save_half
from ibkit.pocket.build.counter import TRAIN_SEED, pictures_of
from ibkit.pocket.feedback import KINDS, Asked, split
from ibkit.pocket.world import Scene
from ibkit.presets import POCKET
from ibkit.scorers.counter import Counter
from ibkit.train.loop import hash_pictures, settings_origin

NAME = "counting"
FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
RANK = 16
N_PICTURES = 8000
N_PROMPTS, N_SEEDS = 8, 16  # of a kind, of the measurement
SETTINGS = PhotoConfig(
    n_steps=2500, batch=48, learning_rate=2e-3, ema_decay=0.995, max_grad_norm=1.0, checkpoint_every=50
)
MIN_SNR_GAMMA = 5.0  # as the base's pre-training weighs timesteps


def asked_of(scene: Scene, rng: random.Random) -> Asked:
    """A prompt that a scene fulfils; only one of a count may leave the count out."""
    kind = rng.choice(KINDS if scene.count == 1 else ("count", "all"))
    return Asked(
        scene.subject.class_noun,
        scene.count if kind in ("count", "all") else 0,
        scene.subject.body if kind in ("colour", "all") else "",
        scene.place if kind in ("place", "all") else "",
    )


def train(folder: Path, model: TextToImage, settings: PhotoConfig = SETTINGS) -> None:
    """Train the adapter on the counter's training scenes; `model` gains it as the delta `counting`."""
    pictures = pictures_of(folder, "counted", TRAIN_SEED, N_PICTURES)
    images = [Image.fromarray(image) for image in pictures.images]
    latents = model.encode_images(images)
    origin = settings_origin(settings, MAY_CHANGE)
    origin |= {"model": model_fingerprint(model), "pictures": hash_pictures(images)}
    weights = attach(model, "lora", NAME, {"rank": RANK}, generator(0, NAME))
    alphas = model.alphas_cumprod.float()

    def draw(stream: torch.Generator) -> Examples:
        rows = torch.randint(len(latents), (settings.batch,), generator=stream)
        rng = random.Random(int(torch.randint(2**31, (), generator=stream)))
        return Examples(latents[rows], [asked_of(pictures.scenes[i], rng).text for i in rows.tolist()])

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        assert examples.t is not None
        error = (eps_hat - noise).square().mean((1, 2, 3))
        snr = (alphas / (1 - alphas)).to(error.device)[examples.t]
        return {"loss": (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean(), "mse": error.mean()}

    fit(model, weights, draw, loss, settings, folder / NAME, origin, (0, NAME))
    freeze(model)


def build(folder: Path, weights: Path, model: TextToImage, counter: Counter) -> None:
    """Train it, write it in half precision as diffusers loads it, and what the counter sees: `weights`/counting."""
    train(folder, model)
    with TemporaryDirectory() as place:
        lora.export(model, NAME, Path(place))
        save_half(load_file(Path(place) / FILE), weights / NAME / FILE)
    card = {"right": measure(model, counter), "n": N_PROMPTS * N_SEEDS}
    (weights / NAME / f"{NAME}.json").write_text(json.dumps(card, indent=2) + "\n")


def measure(model: TextToImage, counter: Counter) -> dict[str, dict[str, float]]:
    """Share of pictures right, by kind, in each respect that prompts name and in all; of prompts that are rated."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        asked = [one for one in split(kind, N_PROMPTS)[0] for _ in range(N_SEEDS)]
        images = sample(model, [one.text for one in asked], [*range(N_SEEDS)] * N_PROMPTS, POCKET.sampler)
        found[kind] = shares(asked, counter.answers(images))
    return found


def shares(asked: Sequence[Asked], answers: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of prompts of one kind that answers fulfil, in each respect and in all."""
    pairs = list(zip(asked, answers, strict=True))
    right = {question: [a[question] == one.wanted[question] for one, a in pairs] for question in asked[0].wanted}
    right["everything"] = [one.fulfilled(a) for one, a in pairs]
    return {name: round(sum(found) / len(found), 4) for name, found in right.items()}
