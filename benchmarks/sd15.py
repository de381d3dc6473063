"""The RL engine at Stable Diffusion v1.5's shape with random weights: speed, memory, and share of the GPU's bf16 speed.

    python -m benchmarks.sd15                        # a GPU, some minutes; no weights are needed
    python -m benchmarks.sd15 --all                  # and parity, ratios, every method's step: `benchmarks.sd15_all`
    python -m benchmarks.sd15 --tiny --batches 1     # anywhere: the same code on a small U-Net, to see that it runs

Rollout and gradient steps are the engine's own, on latents of 512x512 pictures, with LoRA and guidance 7.5, bf16 on a
GPU and fp32 latents and log-probabilities. A few denoising steps are timed and counted as 50. Each batch size is tried
plain and with each of `train.resources`. The memory of training stands beside the one that `ibkit plan` counts.
Operations are counted by PyTorch and set against a large bf16 matrix product of the same GPU. Decoding and reward are
not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ibkit.adapt import attach
from ibkit.device import describe_device, generator, pick_device
from ibkit.job.memory import step
from ibkit.methods import ddpo
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model import single_file
from ibkit.model.sample import Sampler
from ibkit.model.text_to_image import TextToImage, use_quick_attention
from ibkit.presets import SD15
from ibkit.train.kept import Average
from ibkit.train.processes import Processes
from ibkit.train.resources import Resources

SETTINGS = SD15.settings("ddpo")
TIMED_STEPS = 4  # denoising steps of a timed rollout
REPEATS = 3
VARIANTS = {
    "plain": Resources(),
    "checkpointing": Resources(checkpointing=True),
    "frozen_bf16": Resources(frozen_bf16=True),
    "channels_last": Resources(channels_last=True),
    "compiled": Resources(compile=True),
}
PROMPT = "a picture"


def random_parts(device: torch.device, tiny: bool) -> TextToImage:
    """Stable Diffusion v1.5 with random weights, bf16 on a GPU as the kit runs it; `tiny`: the same kinds, small."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, vae, text = single_file.SD15_UNET, single_file.SD15_VAE, single_file.SD15_TEXT
    if tiny:
        unet = unet | {"sample_size": 8, "block_out_channels": (32, 32, 64, 64)}
        vae = vae | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 64}
        text = text | {"num_hidden_layers": 2}
    torch.manual_seed(0)
    with device:
        parts = UNet2DConditionModel(**unet), AutoencoderKL(**vae), CLIPTextModel(CLIPTextConfig(**text))
    for part in parts:
        part.eval().requires_grad_(False)
    words, schedule = single_file.clip_tokenizer(), DDIMScheduler(**single_file.SD15_SCHEDULE)
    use_quick_attention(parts[0], device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return TextToImage("random", *parts, words, schedule, device, autocast)


def with_adapter(model: TextToImage, variant: str) -> tuple[TextToImage, list[torch.nn.Parameter]]:
    """A copy of the model with what the RL stage trains, and those weights."""
    model = model.copy()
    trainable = list(attach(model, "lora", "ddpo", {"rank": SETTINGS.lora_rank}, generator(0, "lora")).values())
    VARIANTS[variant].prepare(model)
    return model, trainable


def config_of(batch: int) -> ddpo.DDPOConfig:
    """The preset with `batch` pictures, one gradient step an epoch, and so few denoising steps as are timed."""
    sampler = Sampler(TIMED_STEPS, SETTINGS.sampler.guidance, 1.0)
    return replace(SETTINGS, images_per_epoch=batch, batch=batch, micro_batch=batch, sampler=sampler)


def roll(model: TextToImage, config: ddpo.DDPOConfig) -> Trajectories:
    n, sampler = config.images_per_epoch, config.sampler
    streams = [generator(0, "rollout", i) for i in range(n)]
    return rollout(model, [PROMPT] * n, sampler.schedule(model), sampler.guidance, streams, n)


def learn(model: TextToImage, trainable: list, config: ddpo.DDPOConfig, trajectories: Trajectories) -> dict[str, float]:
    optimizer = torch.optim.AdamW(trainable, lr=0.0)  # timed again and again: each time before the first update
    average = Average({}, 0.0)
    schedule, stream = config.sampler.schedule(model), generator(0, "update")
    advantages = torch.linspace(-1, 1, config.images_per_epoch + 1)[1:, None].expand(-1, len(schedule))
    return ddpo.update(model, optimizer, average, trajectories, advantages, schedule, config, stream, Processes())


def seconds_and_gib(work: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Median seconds of a few calls after one that warms up, and the peak memory of them all."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None


def ceiling(device: torch.device, size: int) -> float:
    """Operations a second of a product of two square matrices in the dtype that the U-Net computes in."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * size**3 / seconds_and_gib(lambda: a @ a, device)[0]


def operations(model: TextToImage) -> tuple[float, float]:
    """Floating-point operations of a row: forward, and forward and backward to the adapter."""
    from torch.utils.flop_counter import FlopCounterMode

    model.encode_text([PROMPT])  # kept, so that the U-Net's operations alone are counted
    x, t = torch.zeros(1, *model.latent_shape, device=model.device), torch.full((1,), 500, device=model.device)
    counted = []
    for gradient in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            out = model.predict_noise(x, t, [PROMPT])
            if gradient:
                out.sum().backward()
        counted.append(counter.get_total_flops())
    return counted[0], counted[1]


def measure(device: torch.device, tiny: bool, batches: list[int], variants: list[str]) -> dict:
    start = random_parts(device, tiny)
    flop_forward, flop_trained = operations(with_adapter(start, "plain")[0])
    best = ceiling(device, 512 if tiny else 8192)
    rows = []
    for variant in variants:
        model, trainable = with_adapter(start, variant)
        for batch in batches:
            config = config_of(batch)
            row = {"variant": variant, "batch": batch}
            try:
                seconds, row["rollout_gib"] = seconds_and_gib(lambda: roll(model, config), device)  # noqa: B023
                row |= rates("rollout", batch, seconds, flop_forward / best)
                made = roll(model, config)
                seconds, row["train_gib"] = seconds_and_gib(lambda: learn(model, trainable, config, made), device)  # noqa: B023
                if row["train_gib"]:
                    used = VARIANTS[variant]
                    counted = step(
                        "lora", {"rank": SETTINGS.lora_rank}, 2 * batch, used.checkpointing, used.frozen_bf16
                    )
                    row["counted_gib"] = (counted.weights + counted.nbytes) / 2**30
                row |= rates("train", batch, seconds, flop_trained / best)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            rows.append(row)
            print(line(row), flush=True)
    result = {"device": describe_device(device), "tiny": tiny, "ceiling_tflops": best / 1e12}
    result |= {"gflop_forward": flop_forward / 1e9, "gflop_trained": flop_trained / 1e9, "rows": rows}
    for phase in ("rollout", "train"):
        result[f"{phase}_share"] = max((row[f"{phase}_share"] for row in rows if f"{phase}_share" in row), default=None)
    return result


def rates(phase: str, batch: int, seconds: float, ideal_row_seconds: float) -> dict[str, float]:
    """Pictures a second at 50 steps, and the share of the ceiling; guidance makes two rows of a picture's step."""
    per_step = seconds / (batch * TIMED_STEPS)
    return {
        f"{phase}_images_per_second": 1 / (per_step * SETTINGS.sampler.n_steps),
        f"{phase}_share": 2 * ideal_row_seconds / per_step,
    }


def line(row: dict) -> str:
    text = f"{row['variant']:<14} batch {row['batch']:>2}"
    for phase in ("rollout", "train"):
        if f"{phase}_share" in row:
            gib, share = row[f"{phase}_gib"], row[f"{phase}_share"]
            text += f"  {phase} {row[f'{phase}_images_per_second']:.3f} images/s, {share:.0%} of the ceiling"
            text += "" if gib is None else f", {gib:.1f} GiB"
    text += f" ({row['counted_gib']:.1f} counted)" if "counted_gib" in row else ""
    return text + (f"  {row['note']}" if "note" in row else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that this device can")
    parser.add_argument("--quick", action="store_true", help="batches 2 and 8, plain and with checkpointing")
    parser.add_argument("--all", action="store_true", help="--quick, and then what else is to be seen on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a small U-Net on any machine; its numbers mean nothing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if device.type != "cuda" and not arguments.tiny:
        parser.error("Stable Diffusion's shape needs a GPU; --tiny runs the same code on a small U-Net anywhere")
    able = [name for name, resources in VARIANTS.items() if device.type == "cuda" or not resources.frozen_bf16]
    batches, variants = (
        ([2, 8], able[:2]) if arguments.quick or arguments.all else (arguments.batches, arguments.variants or able)
    )
    result = measure(device, arguments.tiny, batches, variants)
    shares = ", ".join(f"{phase} {result[f'{phase}_share'] or 0:.0%}" for phase in ("rollout", "train"))
    print(f"{result['device']}: ceiling {result['ceiling_tflops']:.1f} TFLOP/s; best shares of it: {shares}")
    print(
        f"GFLOP a row: {result['gflop_forward']:.0f} forward, {result['gflop_trained']:.0f} with the adapter's gradient"
    )
    if arguments.all:
        from benchmarks import sd15_all

        result["checks"] = sd15_all.run(sd15_all.checks(device, arguments.tiny))
    if arguments.json:
        print(json.dumps(result))
    return int(not all(row["holds"] for row in result.get("checks", [])))


if __name__ == "__main__":
    raise SystemExit(main())
