"""What trainings of a policy share: an epoch's prompts, its pictures and their scores, and which policy is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ibkit.data.prompts import Prompt
from ibkit.device import generator
from ibkit.errors import ParameterError, TrainingError
from ibkit.methods.engine.objectives import Parts, Rewards
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model.ddim import Schedule
from ibkit.model.text_to_image import TextToImage
from ibkit.train.guard import Guard
from ibkit.train.kept import Average, Copy, memory_advice
from ibkit.train.processes import Processes

if TYPE_CHECKING:
    from ibkit.methods.ddpo import DDPOConfig
    from ibkit.methods.dpok import DPOKConfig


def epoch_prompts(prompts: Sequence[Prompt], n: int, seed: int, epoch: int) -> list[Prompt]:
    """`n` prompts of an epoch: every prompt equally often, the remainder drawn at random."""
    order = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
    return [prompts[order[i % len(prompts)]] for i in range(n)]


def check_policy(schedule: Schedule, config: DDPOConfig | DPOKConfig, processes: Processes) -> None:
    """Refuse what cannot be trained.

    Raises:
        ParameterError: fewer images an epoch than processes, or a trained step that is deterministic.
    """
    if config.images_per_epoch < processes.count:
        raise ParameterError(
            f"{config.images_per_epoch} images an epoch cannot be shared by {processes.count} processes: use fewer."
        )
    if not bool((schedule.std[: config.n_trained_steps(len(schedule))] > 0).all()):
        raise ParameterError(
            f"a denoising step that is to be trained has standard deviation 0 (sampler: {config.sampler}), so its "
            "log-probability is not defined: train with an eta above 0, such as 1."
        )


@contextmanager
def own_share(processes: Processes, micro_batch: int) -> Iterator[None]:
    """Inside, a process works on its share; where it fails, for lack of memory too, all processes say why."""
    advice = f"lower micro_batch (now {micro_batch}) or set resources.offload, which only cost time"
    with processes.agree(), memory_advice(advice):
        yield


def collect(
    model: TextToImage,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    schedule: Schedule,
    guidance: float,
    micro_batch: int,
    seed: int,
    epoch: int,
    processes: Processes,
) -> tuple[Trajectories, list[Image.Image], torch.Tensor, Parts]:
    """An epoch's trajectories, images, scores (rewards, B) and their parts: each process makes its share and gets
    everybody's. Every picture has a random stream of its own.

    Raises:
        TrainingError: a reward that is not finite.
    """
    chunks = torch.arange(len(prompts)).split(processes.chunk(len(prompts), micro_batch))
    streams = [generator(seed, "rollout", epoch, i) for i in range(len(prompts))]
    mine = []
    with own_share(processes, micro_batch):
        for members in processes.deal(chunks):
            asked, own = [prompts[i] for i in members], [streams[i] for i in members]
            made = rollout(model, [p.text for p in asked], schedule, guidance, own, len(asked))
            images = model.decode(made.latents[-1])
            mine.append((made.latents, made.log_probs, images, *rewards.score(images, asked)))
    latents, log_probs, pictures, scores, parts = zip(*processes.gather(mine), strict=True)
    trajectories = Trajectories(
        torch.cat(latents, 1).to(model.device),
        torch.cat(log_probs, 1).to(model.device),
        [p.text for p in prompts],
    )
    together = {name: torch.cat([chunk[name] for chunk in parts]) for name in parts[0]}
    scores = torch.cat(scores, 1)
    if not bool(torch.isfinite(scores).all()):
        which, bad = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise TrainingError(
            f"epoch {epoch}: the reward of image {bad} ({prompts[bad].text!r}) is {scores[which, bad].item()}; look at "
            "the image and at the reward function."
        )
    return trajectories, [image for chunk in pictures for image in chunk], scores, together


def keep_best(
    guard: Guard | None, history: list[dict[str, float]], best: Copy, judged: Sequence[torch.Tensor], average: Average
) -> None:
    """Let the guard look at the newest row, and keep the policy that drew its pictures where it is the best so far.

    Args:
        judged: the weights that drew the pictures the monitor saw.
        average: its result is kept while there is no frontier, the newest policy being the best.
    """
    if guard is None:
        return
    row = history[-1]
    row |= guard.look(history)
    if guard.best(history) == len(history) - 1:
        best.take(judged if "frontier" in row else average.result())
