"""What has to be seen once on a GPU, beside the engine's speed: `python -m benchmarks.sd15 --all` runs it.

Stable Diffusion v1.5's parts have random weights here, so nothing is downloaded and no picture means anything. Each
check prints a line; one that fails says so, and the others still run.

| check | what is compared |
|---|---|
| parity | ε̂ and a guided sample with those of diffusers' pipeline of the same parts |
| first ratio | the ratio before the first update with the tolerance that is derived for it |
| steps | seconds and peak memory of a training step of every method, the memory with what `ibkit plan` counts |
| scoring | pocket scorers in batches beside one by one (`benchmarks.scoring`) |
| processes | with two GPUs, a training by two processes with that by one |
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

import torch

from benchmarks import sd15
from ibkit.adapt import attach
from ibkit.device import generator
from ibkit.job.memory import A_WORD, NEW_WORD, WORD_KINDS, step
from ibkit.methods.engine.ratio import ratio_tolerance
from ibkit.methods.records import METHODS
from ibkit.model.sample import Sampler, sample_latents
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import SD15

PROMPT = "a cat playing soccer"
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}  # of ε̂ and of a sample, whose values are about 1; bf16 has 2⁻⁸
COUNTED_WITHIN = 0.25  # of what is measured
GIB = 2**30


@dataclass(frozen=True)
class Found:
    """A check's result: whether it holds, and a sentence."""

    holds: bool
    sentence: str


def parity(model: TextToImage) -> Found:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=model.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    sampler, device = Sampler(4, 7.5, 0.0), model.device
    x = torch.randn(1, *model.latent_shape, generator=generator(5, "sample")).to(device)
    options = {"num_inference_steps": 4, "guidance_scale": 7.5, "eta": 0.0, "output_type": "latent"}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=model.autocast is not None):
        text = model.encode_text([PROMPT])
        noise = model.unet(x, torch.tensor([500], device=device), encoder_hidden_states=text).sample.float()
        side = model.image_px
        theirs = pipeline(PROMPT, latents=x, height=side, width=side, **options).images.float()
    ours = model.predict_noise(x, torch.tensor([500], device=device), [PROMPT])
    off = [(ours - noise).abs().max().item()]
    sampled = sample_latents(model, [PROMPT], [5], sampler).to(device)
    off.append(((sampled - theirs).abs().max() / theirs.abs().max()).item())
    sentence = f"ε̂ differs by {off[0]:.1e}, a guided sample by {off[1]:.1e} of its largest value"
    return Found(max(off) <= TOLERANCE[device.type], sentence)


def first_ratio(model: TextToImage) -> Found:
    """Of a gradient step of the engine, which refuses a ratio beyond the tolerance."""
    model, trainable = sd15.with_adapter(model, "plain")
    config = sd15.config_of(2)
    row = sd15.learn(model, trainable, config, sd15.roll(model, config))
    allowed = ratio_tolerance(model, config.sampler.schedule(model), config)
    return Found(True, f"|ratio - 1| is {row['ratio_first']:.1e} at most, {allowed.min().item():.1e} are allowed")


def training_step(model: TextToImage, method: str) -> Found:
    """Of a method with its settings at this scale, with 4 rows at most."""
    record, settings, on_gpu = METHODS[method], SD15.settings(method), model.device.type == "cuda"
    kind, of_kind = record.delta(settings)
    rows = min(record.work(settings).graph_rows, 4)
    model = model.copy()
    weights = list(attach(model, kind, "timed", A_WORD | dict(of_kind), generator(0, "timed")).values())
    optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)
    x, t = torch.randn(rows, *model.latent_shape, device=model.device), torch.arange(rows, device=model.device)
    prompts = [f"a {NEW_WORD}" if kind in WORD_KINDS else PROMPT] * rows
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
        below = torch.cuda.memory_allocated(model.device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        model.predict_noise(x, t, prompts).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    sentence = f"{rows} rows, {1 / min(seconds):.2f} steps/s"
    if not on_gpu:
        return Found(True, sentence)
    counted = step(kind, of_kind, rows)
    expected = (counted.nbytes + 8 * counted.trained) / GIB
    measured = (torch.cuda.max_memory_allocated(model.device) - below) / GIB
    sentence += f", {measured:.2f} GiB beside the weights, {expected:.2f} counted"
    return Found(abs(expected - measured) <= COUNTED_WITHIN * measured, sentence)


def command(*words: str) -> Found:
    """Another command of this project; its last lines are the sentence."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    return Found(done.returncode == 0, " | ".join((done.stdout + done.stderr).strip().splitlines()[-6:]))


def two_processes() -> Found:
    """The adapter of a training by two processes beside that of one, at the pocket scale."""
    settings = ["n_epochs=2", "images_per_epoch=8", "sampler.n_steps=4"]
    words = [word for setting in settings for word in ("--set", f"ddpo.{setting}")]
    words += ["--set", "lora_dreambooth.n_steps=2", "-p", "03_evaluate.n_images=1", "--device", "cuda"]
    with TemporaryDirectory(prefix="processes-") as name:
        label = name.rpartition("/")[2]
        return command("ibkit", "run", "--name", label, "--processes", "2", *words)


def checks(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Name and check, in order; see the table above."""
    model = sd15.random_parts(device, tiny)
    yield "parity", lambda: parity(model)
    yield "first ratio", lambda: first_ratio(model)
    for method in METHODS:
        yield f"step of {method}", partial(training_step, model, method)
    yield "scoring", lambda: command("benchmarks.scoring", "--quick", "--device", str(device))
    if torch.cuda.device_count() > 1:
        yield "two processes", two_processes


def run(found: Iterator[tuple[str, Callable[[], Found]]]) -> list[dict]:
    """Make all checks; a row for each."""
    rows = []
    for name, check in found:
        started = time.perf_counter()
        try:
            result = check()
        except Exception as error:  # the machine is lent for minutes: the next check still runs, and the status is 1
            result = Found(False, f"{type(error).__name__}: {error}")
        took = time.perf_counter() - started
        rows.append({"check": name, "holds": result.holds, "seconds": took, "found": result.sentence})
        print(f"{'ok  ' if result.holds else 'FAIL'} {name:<28} {took:6.1f} s  {result.sentence}", flush=True)
    return rows
