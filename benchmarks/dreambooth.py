"""A DreamBooth step of this kit beside the step of diffusers' `train_dreambooth.py`, on one model and machine.

    python -m benchmarks.dreambooth                      # the pocket model, 1 + 1 pictures a step, as the paper has it
    python -m benchmarks.dreambooth --batch 4 --threads 1

The recipe's step is written out below from its script: pictures are opened, transformed and encoded anew at each step,
the prompts too, attention is PyTorch's fused kernel, AdamW its default. It draws the same pictures, timesteps and noise
as this kit does, and takes the mean of the posterior where the script samples it, so that both must have equal losses;
others end in exit status 1. The two take turns. A ratio short of the target is said so, and is no failure: machines are
noisy.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from PIL.ImageOps import exif_transpose
from torchvision import transforms

from ibkit.data.subject import demo_subject, world_photos
from ibkit.device import describe_device, generator, keep_memory, pick_device
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.model.loading import load_model
from ibkit.model.sample import sample
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import POCKET

PROMPT, CLASS_PROMPT = "a sks cat", "a cat"
TARGET, TOLERANCE = 1.5, 1e-3  # times as fast; relative difference of losses, which sum in another order


def recipe(model: TextToImage, photos: list[Path], classes: list[Path], config: DreamBoothConfig) -> list[float]:
    """Train `model` in place as the script does; returns each step's loss."""
    accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision="no")
    model.unet.set_attn_processor(AttnProcessor2_0())
    model.unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        model.unet.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    unet, optimizer = accelerator.prepare(model.unet, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scheduler = DDPMScheduler.from_config(model.scheduler.config)
    side = model.image_px
    transform = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    ids = model.tokenizer(
        [PROMPT] * config.batch + [CLASS_PROMPT] * config.batch,
        padding="max_length", max_length=model.tokenizer.model_max_length, return_tensors="pt",
    )["input_ids"].to(model.device)  # fmt: skip
    losses = []
    for number in range(config.n_steps):
        stream = generator(0, "dreambooth", number)
        chosen = [photos[i] for i in torch.randint(len(photos), (config.batch,), generator=stream)]
        chosen += [classes[i] for i in torch.randint(len(classes), (config.batch,), generator=stream)]
        t = torch.randint(len(model.alphas_cumprod), (2 * config.batch,), generator=stream).to(model.device)
        pictures = [exif_transpose(Image.open(path)).convert("RGB") for path in chosen]
        pixels = torch.stack([transform(picture) for picture in pictures]).to(model.device)
        with torch.no_grad():
            latents = model.vae.encode(pixels).latent_dist.mode() * model.vae.config.scaling_factor
            text = model.text_encoder(ids).last_hidden_state
        noise = torch.randn(latents.shape, generator=stream).to(model.device)
        eps_hat = unet(scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text).sample
        eps_hat, eps_hat_prior = eps_hat.chunk(2)
        target, target_prior = noise.chunk(2)
        loss = F.mse_loss(eps_hat, target) + config.prior_weight * F.mse_loss(eps_hat_prior, target_prior)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ours(model: TextToImage, photos: list[Path], classes: list[Path], config: DreamBoothConfig) -> list[float]:
    """Train `model` in place as the kit does; returns each step's loss."""
    opened, drawn = ([Image.open(path).convert("RGB") for path in paths] for paths in (photos, classes))
    with TemporaryDirectory() as folder:
        rows = dreambooth.train(model, opened, PROMPT, CLASS_PROMPT, drawn, config, Path(folder))
    return [row["loss"] for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--batch", type=int, default=1, help="photos in a step, and as many class pictures")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 = PyTorch's choice")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_memory()
    device = pick_device(arguments.device)
    config = replace(DreamBoothConfig(), batch=arguments.batch, n_steps=arguments.steps, checkpoint_every=10**6)
    start = replace(load_model(arguments.model, device=device), autocast=None)
    seconds: dict[str, list[float]] = {"recipe": [], "ours": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        photos = [picture.resize((start.image_px,) * 2) for picture in world_photos(demo_subject("cat"))]
        pictures = {"photo": photos, "class": sample(start, [CLASS_PROMPT] * 16, list(range(16)), POCKET.sampler)}
        paths = {kind: [folder / f"{kind}-{i}.png" for i in range(len(many))] for kind, many in pictures.items()}
        for kind, many in pictures.items():
            for path, picture in zip(paths[kind], many, strict=True):
                picture.save(path)
        for _ in range(arguments.repeats):
            for way, train in (("recipe", recipe), ("ours", ours)):
                model, started = start.copy(), time.perf_counter()
                losses = torch.tensor(train(model, paths["photo"], paths["class"], config))
                seconds[way].append(time.perf_counter() - started)
                if way == "recipe":
                    expected = losses
            difference = ((losses - expected).abs() / expected).max().item()
    ratio = median(seconds["recipe"]) / median(seconds["ours"])
    rates = {way: arguments.steps / median(took) for way, took in seconds.items()}
    print(f"{arguments.model}, {arguments.batch} + {arguments.batch} pictures a step, {describe_device(device)}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    short = "" if ratio >= TARGET else f", short of the target {TARGET:g}"
    print(f"recipe {rates['recipe']:.1f} and this kit {rates['ours']:.1f} steps/s, ratio {ratio:.2f}{short}; "
          f"losses differ by {difference:.1e}")  # fmt: skip
    if not difference <= TOLERANCE:
        print(f"error: losses differ by more than {TOLERANCE:g}: the two do not train alike.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
