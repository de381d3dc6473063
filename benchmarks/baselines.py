"""A training step of each baseline beside a plain loop, and what NeTI's mapper costs in sampling; on this machine.

    python -m benchmarks.baselines                       # the pocket model, the presets' batches
    python -m benchmarks.baselines --threads 1 --methods neti

The plain loop does what the authors' scripts do: photos are opened, mirrored and encoded anew at each step, and so are
class pictures and prompts, NeTI's one step at a time; attention is PyTorch's fused kernel, AdamW its default. It draws
the same photos, captions, timesteps and noise as the kit, so both must have equal losses; others end in exit status 1.
NeTI's nested dropout is off in both: what it draws depends on how the rows are batched. The two take turns, and so does
the floor: the U-Net's passes of these steps alone, forward and back to a text that is given, which no step can do
without.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import ImageOps

from ibkit.adapt import Adapted, attach, freeze
from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.data.templates import TEMPLATES
from ibkit.device import describe_device, generator, keep_memory, pick_device
from ibkit.methods.custom_diffusion import masked_loss
from ibkit.methods.engine.photos import add_noise
from ibkit.methods.records import METHODS, Job
from ibkit.methods.textual_inversion import start_word
from ibkit.model.loading import load_model
from ibkit.model.mapper import N_UNITS, Mapper
from ibkit.model.sample import sample, sample_latents
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import POCKET

BASELINES = ("textual_inversion", "custom_diffusion", "neti")
TARGET, TOLERANCE = 1.5, 1e-3  # times as fast; relative difference of losses, which sum in another order
SAMPLING = 1.15  # times as long


def kind_of(method: str, job: Job, config: Any) -> tuple[str, dict[str, Any]]:
    """Kind and settings of a method's delta."""
    word = {"word": job.subject.identifier, "start": start_word(job.subject, "")}
    return {
        "textual_inversion": lambda: ("tokens", word | {"n_vectors": config.n_vectors}),
        "custom_diffusion": lambda: ("cross_kv", {"words": {word["word"]: word["word"].strip("<>")}}),
        "neti": lambda: ("mapper", word | {"seed": job.seed, "norm": config.norm, "truncate": config.truncate}),
    }[method]()


def plain(model: TextToImage, method: str, job: Job, config: Any) -> list[float]:
    """Train `model` in place, step by step, nothing kept from one to the next; returns each step's loss."""
    kind, settings = kind_of(method, job, config)
    weights = attach(model, kind, job.name, settings, generator(job.seed, job.name))
    model.unet.set_attn_processor(AttnProcessor2_0())
    optimizer = torch.optim.AdamW(
        weights.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    alphas, losses = model.alphas_cumprod.float().to(model.device), []
    if model.mapped is not None:
        mapped = model.mapped
        mapped.texts = lambda model, pairs: {pair: mapped._encode(model, [pair])[0] for pair in pairs}
    for number in range(config.n_steps):
        stream = generator(job.seed, job.name, number)
        which = torch.randint(len(job.photos), (config.batch,), generator=stream).tolist()
        flipped = (torch.rand(config.batch, generator=stream) < config.flip).tolist()
        pictures = [ImageOps.mirror(job.photos[i]) if f else job.photos[i] for i, f in zip(which, flipped, strict=True)]
        if method == "custom_diffusion":
            said = [f"photo of {job.subject.instance_prompt}"] * config.batch + [
                job.subject.class_prompt
            ] * config.batch
            pictures += [
                job.class_pictures[i] for i in torch.randint(len(job.class_pictures), (config.batch,), generator=stream)
            ]
        else:
            captions = TEMPLATES[config.templates]
            chosen = torch.randint(len(captions), (config.batch,), generator=stream).tolist()
            said = [captions[i].format(job.subject.identifier) for i in chosen]
        z_0 = model.encode_images(pictures)
        t = torch.randint(len(alphas), (len(z_0),), generator=stream).to(model.device)
        noise = torch.randn(z_0.shape, generator=stream).to(model.device)
        model.forget_text()
        eps_hat = model.predict_noise(add_noise(z_0, noise, alphas[t]), t, said)
        if method == "custom_diffusion":
            everywhere = torch.ones(config.batch, 1, *z_0.shape[-2:], device=model.device)
            loss = masked_loss(eps_hat, noise, everywhere, config.instance_weight, config.prior_weight)["loss"]
        else:
            loss = (eps_hat - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def passes(model: TextToImage, rows: int, n_steps: int) -> None:
    """The U-Net's passes of `n_steps` steps of `rows` latents, forward and back to one text for all."""
    text = model.encode_text(["a cat"] * rows)
    text.requires_grad_(True)
    z_t = torch.randn(rows, *model.latent_shape, generator=generator(0, "floor")).to(model.device)
    t = torch.full((rows,), 500, device=model.device)
    for _ in range(n_steps):
        model.unet(z_t, t, encoder_hidden_states=text).sample.square().mean().backward()


def ours(model: TextToImage, method: str, job: Job, config: Any) -> list[float]:
    """Train `model` in place as the kit does; returns each step's loss."""
    with TemporaryDirectory() as folder:
        rows = METHODS[method].train(model, replace(job, folder=Path(folder)), config)
    return [row["loss"] for row in rows]


def sampling_ratio(model: TextToImage, repeats: int, n: int = 30) -> float:
    """Seconds of `n` pictures of one prompt with a mapped word, which is new to it, over those without; the median."""
    mapped, ratios = model.copy(), []
    word = {"word": "<sks>", "start": "cat", "seed": 0, "norm": "whole", "truncate": 0}
    attach(mapped, "mapper", "neti", word, generator(0))
    freeze(mapped)
    for _ in range(repeats):
        seconds = []
        for each, prompt in ((model, "a cat playing soccer"), (mapped, "a <sks> playing soccer")):
            each.forget_text()
            started = time.perf_counter()
            sample_latents(each, [prompt] * n, list(range(n)), POCKET.sampler)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 = PyTorch's choice")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_memory()
    device = pick_device(arguments.device)
    model, world = load_model("pocket", device=device), demo_subject("cat")
    print(f"{describe_device(device)}, {arguments.repeats} times {arguments.steps} steps")
    differ, Mapper.kept_units = False, lambda self, layer: torch.ones(len(layer), N_UNITS, dtype=torch.bool)
    for method in arguments.methods:
        who = METHODS[method].names(PersonalizedSubject("cat", "cat", "sks", "", "pocket", "", world))
        config = POCKET.settings(method, {"n_steps": arguments.steps, "ema_decay": 0.0})
        classes = (
            sample(model, ["a cat"] * 8, list(range(8)), POCKET.class_sampler)
            if METHODS[method].class_pictures(config)
            else []
        )
        job = Job(Adapted.of(model), who, world_photos(world), method, 0, Path(), classes)
        rows = config.batch * (2 if classes else 1)
        ratios, floors = [], []
        for _ in range(arguments.repeats):
            took, losses = {}, {}
            for train in (plain, ours):
                started = time.perf_counter()
                losses[train] = train(model.copy(), method, job, config)
                took[train] = time.perf_counter() - started
            ratios.append(took[plain] / took[ours])
            bare, started = model.copy(), time.perf_counter()
            passes(bare, rows, arguments.steps)
            floors.append(took[plain] / (time.perf_counter() - started))
            worst = max(abs(a - b) / a for a, b in zip(losses[plain], losses[ours], strict=True))
            differ |= worst > TOLERANCE
        print(
            f"{method}: {median(ratios):.2f} times as fast as the plain loop (target {TARGET}), the passes alone "
            f"{median(floors):.2f}; losses differ by {worst:.1e}"
        )
    if "neti" in arguments.methods:
        ratio = sampling_ratio(model, arguments.repeats)
        print(f"sampling with NeTI's mapper: {ratio:.2f} times as long (target at most {SAMPLING})")
    return int(differ)


if __name__ == "__main__":
    raise SystemExit(main())
