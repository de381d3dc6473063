"""The kit's RL engine beside a plain loop and beside the floor, on the pocket model: seconds, ratios, memory, equality.

    python benchmarks/rl.py            # a few minutes on two CPU cores
    python benchmarks/rl.py --quick    # under a minute, fewer pictures and repeats

The plain loop is what implementations of DDPO are described to do: one micro-batch and one timestep at a time, the text
encoded anew for every pass, pictures decoded and rewarded one by one. Both draw the same noise and take the same
gradient steps from the same weights; the largest difference of the adapters after an epoch is printed. It is not zero,
because sums are taken in another order and Adam divides a gradient by its own size. A last run ("fewer") trains on the
share of the steps that the preset draws; its results are others, so it is set apart.

The floor is the time of the bare U-Net passes that an epoch cannot do without (guided forward per picture and step;
guided forward and backward per trained pair), at the best batch size, without an adapter's extra layers in the rollout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ibkit.adapt import attach
from ibkit.data.prompts import training_prompts
from ibkit.device import describe_device, generator, keep_memory, pick_device
from ibkit.methods import ddpo
from ibkit.methods.engine.advantages import PromptStats
from ibkit.methods.engine.objectives import scorer_reward
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model.ddim import log_prob, step_mean
from ibkit.model.loading import load_model
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import POCKET
from ibkit.scorers import make_scorer
from ibkit.train.kept import Average
from ibkit.train.processes import Processes

SETTINGS = POCKET.settings("ddpo")
MICRO_BATCHES = (2, 8)  # of the plain loop: a memory-bound user's, and the paper's batch
FLOOR_BATCHES = (32, 64, 96)  # rows of a U-Net pass
FLOOR_PASSES = 4


class Epoch:
    """What both loops are given: model with a fresh adapter, prompts, settings, reward."""

    def __init__(self, n_images: int, device: torch.device, model: TextToImage, reward, micro_batch: int, share: float):
        self.model, self.reward, self.device = model.copy(), reward, device
        self.config = replace(SETTINGS, images_per_epoch=n_images, batch=n_images // 2, subsample=share)
        self.trainable = list(
            attach(self.model, "lora", "ddpo", {"rank": self.config.lora_rank}, generator(0, "lora")).values()
        )
        with torch.no_grad():  # an adapter that does something, or its first gradients are exactly zero
            for i, p in enumerate(self.trainable):
                p.add_(0.01 * torch.randn(p.shape, generator=generator(0, "adapter", i)).to(device))
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, betas=self.config.betas, weight_decay=0.01)
        self.schedule = self.config.sampler.schedule(self.model)
        kinds = training_prompts(["playing soccer", "dancing"], "cat", "sks")
        self.prompts = [kinds[i % len(kinds)] for i in range(n_images)]
        self.streams = [generator(0, "rollout", i) for i in range(n_images)]
        self.stats = PromptStats(min_count=2)
        self.warm_up(micro_batch)

    def warm_up(self, micro_batch: int) -> None:
        """Touch what every pass but the first finds ready: an epoch is one of many."""
        prompts = [p.text for p in self.prompts[:micro_batch]]
        x = torch.zeros((len(prompts), *self.model.latent_shape), device=self.device)
        self.model.predict_noise(x, torch.full((len(prompts),), 500, device=self.device), prompts).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        return self.stats.advantages(self.prompts, rewards).clamp(-5, 5)


def timed(seconds: dict[str, float], name: str, work):
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - started
    return result


def ours(epoch: Epoch) -> dict[str, float]:
    """An epoch as `ibkit.methods.ddpo.train` does it; seconds by phase."""
    seconds: dict[str, float] = {}
    config, model = epoch.config, epoch.model
    trajectories = timed(
        seconds,
        "rollout",
        lambda: rollout(
            model,
            [p.text for p in epoch.prompts],
            epoch.schedule,
            config.sampler.guidance,
            epoch.streams,
            config.micro_batch,
        ),
    )
    rewards, _ = timed(seconds, "reward", lambda: epoch.reward(model.decode(trajectories.latents[-1]), epoch.prompts))
    average = Average({}, 0.0)
    timed(
        seconds,
        "train",
        lambda: ddpo.update(
            model,
            epoch.optimizer,
            average,
            trajectories,
            epoch.advantages(rewards)[:, None].expand(-1, len(epoch.schedule)),
            epoch.schedule,
            config,
            generator(0, "update"),
            Processes(),
        ),
    )
    return seconds


def plain(epoch: Epoch, micro_batch: int) -> dict[str, float]:
    """The same epoch, one micro-batch and one timestep at a time."""
    seconds: dict[str, float] = {}
    config, model, schedule = epoch.config, epoch.model, epoch.schedule
    guidance = config.sampler.guidance

    def texts(members) -> list[str]:
        model._embeddings.clear()  # the engine keeps a text's embedding, the plain loop does not
        return [epoch.prompts[i].text for i in members]

    def sample_some(members):
        def noise() -> torch.Tensor:
            drawn = [torch.randn(model.latent_shape, generator=epoch.streams[i]) for i in members]
            return torch.stack(drawn).to(epoch.device)

        x = noise()
        latents, log_probs = [x], []
        with torch.no_grad():
            for i in range(len(schedule)):
                t = schedule.timesteps[i].expand(len(x))
                eps_hat = model.guided_noise(x, t, texts(members), guidance)
                mean = step_mean(x, eps_hat, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], schedule.std[i])
                x = mean + schedule.std[i] * noise()
                log_probs.append(log_prob(x, mean, schedule.std[i]))
                latents.append(x)
        return torch.stack(latents), torch.stack(log_probs)

    def roll() -> Trajectories:
        groups = torch.arange(len(epoch.prompts)).split(micro_batch)
        parts = [sample_some(g.tolist()) for g in groups]
        return Trajectories(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), [])

    def score() -> torch.Tensor:
        one_by_one = [
            epoch.reward(model.decode(trajectories.latents[-1, i : i + 1]), [epoch.prompts[i]])[0]
            for i in range(len(epoch.prompts))
        ]
        return torch.cat(one_by_one)

    def update() -> None:
        stream = generator(0, "update")
        n_steps = config.n_trained_steps(len(schedule))
        scaled = advantages.to(epoch.device)
        for members in torch.randperm(len(advantages), generator=stream).split(config.batch):
            for _ in members:  # the engine draws its steps' order from the same stream
                torch.randperm(n_steps, generator=stream)
            for some in members.split(micro_batch):
                for step in range(n_steps):
                    x_t, x_prev = trajectories.latents[step, some], trajectories.latents[step + 1, some]
                    t = schedule.timesteps[step].expand(len(some))
                    eps_hat = model.guided_noise(x_t, t, texts(some.tolist()), guidance)
                    std = schedule.std[step]
                    mean = step_mean(x_t, eps_hat, schedule.alpha_bar[step], schedule.alpha_bar_prev[step], std)
                    new = log_prob(x_prev, mean, std)
                    loss, _ = ddpo.policy_loss(new, trajectories.log_probs[step, some], scaled[some], config.clip_range)
                    (loss.sum() / (len(members) * n_steps)).backward()
            torch.nn.utils.clip_grad_norm_(epoch.trainable, config.max_grad_norm)
            epoch.optimizer.step()
            epoch.optimizer.zero_grad(set_to_none=True)

    trajectories = timed(seconds, "rollout", roll)
    rewards = timed(seconds, "reward", score)
    advantages = epoch.advantages(rewards)
    timed(seconds, "train", update)
    return seconds


def floor(model: TextToImage, config: ddpo.DDPOConfig) -> dict[str, float]:
    """Seconds that the bare passes of an epoch take, each at its best batch size."""
    per_row = {}
    for name, grad in (("rollout", False), ("train", True)):
        bare = model.copy()
        if grad:
            attach(bare, "lora", "ddpo", {"rank": config.lora_rank}, generator(0, "lora"))
        of_rows = []
        for rows in FLOOR_BATCHES:
            x = torch.randn((rows, *model.latent_shape), generator=generator(0, "floor")).to(model.device)
            t = torch.full((rows,), 500, device=model.device)
            seconds = []
            for _ in range(FLOOR_PASSES):
                started = time.perf_counter()
                with torch.set_grad_enabled(grad):
                    out = bare.predict_noise(x, t, ["a cat"] * rows)
                    if grad:
                        out.square().mean().backward()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            of_rows.append(statistics.median(seconds[1:]) / rows)  # the first warms up
        per_row[name] = min(of_rows)
    n, steps = config.images_per_epoch, config.sampler.n_steps
    rows_each = 2 if config.sampler.guidance != 1 else 1
    return {
        "rollout": per_row["rollout"] * n * steps * rows_each,
        "train": per_row["train"] * n * config.n_trained_steps(steps) * rows_each,
    }


def one_epoch(kind: str, n_images: int, device: torch.device, model: TextToImage, reward) -> tuple[dict, list]:
    """Seconds by phase, and the adapter afterwards, of "ours", "fewer" (ours on the preset's share of the steps), or
    "plain2" (the plain loop at micro-batch 2).
    """
    is_plain = kind.startswith("plain")
    micro_batch = int(kind.removeprefix("plain")) if is_plain else SETTINGS.micro_batch
    epoch = Epoch(n_images, device, model, reward, micro_batch, SETTINGS.subsample if kind == "fewer" else 1.0)
    seconds = plain(epoch, micro_batch) if is_plain else ours(epoch)
    seconds["epoch"] = sum(seconds.values())
    return seconds, [p.detach().cpu() for p in epoch.trainable]


def peak_memory_mib(kinds: list[str], n_images: int, device: torch.device) -> dict[str, float]:
    """Peak memory of a process of its own that does one epoch, for each kind of loop.

    They run side by side, with one thread each: three that share the cores would wait for one another.
    """
    command = [sys.executable, __file__, "--images", str(n_images), "--device", str(device), "--memory-of"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {
        kind: subprocess.Popen([*command, kind], stdout=subprocess.PIPE, text=True, env=environment) for kind in kinds
    }
    said = {kind: process.communicate()[0] for kind, process in running.items()}
    if failed := [kind for kind, process in running.items() if process.returncode]:
        raise SystemExit(f"the memory of {', '.join(failed)} could not be measured: see the error above")
    return {kind: float(text.split()[-1]) for kind, text in said.items()}


def own_peak_mib(device: torch.device) -> float:
    """Peak memory of this process: on a GPU what PyTorch allocated, else what was resident (`getrusage` would also
    count the parent's, from before the exec).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(n_images: int, repeats: int, device: torch.device) -> dict:
    model = load_model("pocket", device=device)
    reward = scorer_reward(make_scorer("image_reward", "pocket", device))
    kinds = ["ours", *(f"plain{m}" for m in MICRO_BATCHES), "fewer"]
    runs: dict[str, list[dict]] = {kind: [] for kind in kinds}
    adapters = {}
    one_epoch("ours", 4, device, model, reward)  # warms up
    config = replace(SETTINGS, images_per_epoch=n_images)
    floors = []
    for _ in range(repeats):
        for kind in kinds:  # alternating, so that a busy moment hits all
            seconds, adapters[kind] = one_epoch(kind, n_images, device, model, reward)
            runs[kind].append(seconds)
        floors.append(floor(model, config))
    medians = {k: {p: statistics.median(r[p] for r in rows) for p in rows[0]} for k, rows in runs.items()}
    bare = {phase: statistics.median(seconds[phase] for seconds in floors) for phase in floors[0]}
    memory = peak_memory_mib(kinds[:-1], n_images, device)
    mine = medians["ours"]
    result = {"device": describe_device(device), "images": n_images, "seconds": medians, "floor_seconds": bare}
    result |= {"images_per_second": n_images / mine["epoch"], "peak_mib": memory}
    for micro, suffix in zip(MICRO_BATCHES, ("", "_micro8"), strict=True):
        other = medians[f"plain{micro}"]
        result |= {f"{p}_ratio{suffix}": other[p] / mine[p] for p in ("epoch", "rollout", "train")}
        result[f"memory_ratio{suffix}"] = memory["ours"] / memory[f"plain{micro}"]
        pairs = zip(adapters["ours"], adapters[f"plain{micro}"], strict=True)
        result[f"max_abs_diff{suffix}"] = max((a - b).abs().max().item() for a, b in pairs)
    result["floor_ratio"] = mine["epoch"] / sum(bare.values())
    result["subsample_epoch_ratio"] = mine["epoch"] / medians["fewer"]["epoch"]
    return result


def show(result: dict) -> None:
    print(f"{result['device']}, {result['images']} pictures an epoch, all {SETTINGS.trained_share:.0%} of the steps")
    print(f"{'seconds (median)':<18}{'rollout':>10}{'reward':>10}{'train':>10}{'epoch':>10}{'peak MiB':>10}")
    for kind, s in result["seconds"].items():
        numbers = "".join(f"{s[p]:>10.2f}" for p in ("rollout", "reward", "train", "epoch"))
        print(f"{kind:<18}{numbers}" + (f"{result['peak_mib'][kind]:>10.0f}" if kind in result["peak_mib"] else ""))
    bare = result["floor_seconds"]
    print(f"{'floor':<18}{bare['rollout']:>10.2f}{'':>10}{bare['train']:>10.2f}{sum(bare.values()):>10.2f}")
    for suffix, name in (("", "micro-batch 2"), ("_micro8", "micro-batch 8")):
        ratios = ", ".join(f"{p} {result[f'{p}_ratio{suffix}']:.2f}x" for p in ("epoch", "rollout", "train"))
        print(
            f"plain loop at {name} over ours: {ratios}; memory ours over plain {result[f'memory_ratio{suffix}']:.2f}; "
            f"largest difference of the adapters {result[f'max_abs_diff{suffix}']:.1e}"
        )
    print(f"ours over the floor: {result['floor_ratio']:.2f}; {result['images_per_second']:.1f} pictures a second")
    print(
        f"apart from equal results: on the preset's {SETTINGS.subsample:.0%} of the steps, drawn anew each time, an "
        f"epoch is {result['subsample_epoch_ratio']:.2f}x as fast (same expected gradient, tests/test_ddpo.py)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 pictures, one repeat")
    parser.add_argument("--images", type=int, default=48, help="pictures an epoch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    if arguments.memory_of:
        model, scorer = load_model("pocket", device=device), make_scorer("image_reward", "pocket", device)
        one_epoch(arguments.memory_of, arguments.images, device, model, scorer_reward(scorer))
        print(own_peak_mib(device))
        return 0
    result = measure(*((4, 1) if arguments.quick else (arguments.images, arguments.repeats)), device)
    show(result)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
