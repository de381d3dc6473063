"""What trainings of a policy share: an epoch's prompts, its pictures and their scores, its gradient steps, and which
policy is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ibkit.adapt import freeze
from ibkit.data.prompts import Prompt
from ibkit.device import generator
from ibkit.errors import ParameterError, TrainingError
from ibkit.methods.engine.objectives import Parts, Rewards
from ibkit.methods.engine.ratio import check_first_ratio, ratio_tolerance
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model.ddim import Schedule
from ibkit.model.text_to_image import TextToImage
from ibkit.train.guard import Guard
from ibkit.train.kept import Average, Copy, Kept, Optimizer, Weights, memory_advice
from ibkit.train.loop import Row, loop
from ibkit.train.processes import Processes

if TYPE_CHECKING:
    from ibkit.methods.ddpo import DDPOConfig
    from ibkit.methods.dpok import DPOKConfig

# settings that may differ on resume: length, and those that affect memory only
MAY_CHANGE = ("n_epochs", "checkpoint_every", "micro_batch", "resources")
# loss, ratio, KL and advantage of pairs, each (M,), and whether the policy before this epoch's updates drew them
Measured = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def epoch_prompts(prompts: Sequence[Prompt], n: int, seed: int, epoch: int) -> list[Prompt]:
    """`n` prompts of an epoch: every prompt equally often, the remainder drawn at random."""
    order = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
    return [prompts[order[i % len(prompts)]] for i in range(n)]


def check_policy(schedule: Schedule, config: DDPOConfig | DPOKConfig, processes: Processes) -> None:
    """Refuse (ParameterError) fewer images an epoch than processes, and a trained step that is deterministic."""
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
    config: DDPOConfig | DPOKConfig,
    seed: int,
    epoch: int,
    processes: Processes,
) -> tuple[Trajectories, list[Image.Image], torch.Tensor, Parts]:
    """An epoch's trajectories, images, scores (rewards, B) and their parts: each process makes its share and gets
    everybody's. Every picture has a random stream of its own. A reward that is not finite is a TrainingError.
    """
    chunks = torch.arange(len(prompts)).split(processes.chunk(len(prompts), config.micro_batch))
    streams = [generator(seed, "rollout", epoch, i) for i in range(len(prompts))]
    mine = []
    with own_share(processes, config.micro_batch):
        for members in processes.deal(chunks):
            asked, own = [prompts[i] for i in members], [streams[i] for i in members]
            made = rollout(model, [p.text for p in asked], schedule, config.sampler.guidance, own, len(asked))
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


def gradient_steps(
    draws: Iterable[torch.Tensor],
    measure: Callable[[torch.Tensor, torch.Tensor], Measured],
    model: TextToImage,
    optimizer: torch.optim.Optimizer,
    average: Average,
    schedule: Schedule,
    config: DDPOConfig | DPOKConfig,
    processes: Processes,
) -> tuple[torch.Tensor, list[float], float]:
    """Take a gradient step on each draw of pairs, shared by the processes.

    Args:
        draws: image and denoising step of the pairs of a step, (n, 2).
        measure: image and step of a micro-batch, each (M,) on the CPU -> `Measured`.

    Returns:
        Of all pairs loss, ratio, KL, advantage, whether they were fresh, and the number of their gradient step, (6, n)
        fp64; the norm of each step's gradient; and the largest |ratio - 1| of fresh pairs before the first update.

    Raises:
        TrainingError: ratios that are not 1 before the first update (see `ratio_tolerance`), a loss or gradient that is
            not finite, or memory that does not suffice.
    """
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    tolerance = ratio_tolerance(model, schedule, config)
    measured: list[torch.Tensor] = []
    norms: list[float] = []
    ratio_first = 0.0
    for pairs in draws:
        with own_share(processes, config.micro_batch):
            for micro in processes.deal(pairs.split(processes.chunk(len(pairs), config.micro_batch))):
                image, step = micro.unbind(1)
                loss, ratio, kl, advantage, fresh = measure(image, step)
                if not bool(torch.isfinite(loss).all()):
                    raise TrainingError(
                        f"the policy loss is not finite (ratio {ratio.min().item():.3g} "
                        f"to {ratio.max().item():.3g}): lower the learning rate."
                    )
                if not norms and fresh.any():
                    of, at = ratio.detach()[fresh.to(ratio.device)], step[fresh].to(ratio.device)
                    ratio_first = max(ratio_first, check_first_ratio(of, at, schedule, tolerance))
                ((loss + config.kl_weight * kl).sum() / len(pairs)).backward()
                columns = loss, ratio, kl, advantage, fresh, torch.full_like(loss, len(norms))
                measured.append(torch.stack([column.detach().to(loss) for column in columns]))
        processes.add_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise TrainingError("the gradient is not finite: lower the learning rate.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.follow()
        norms.append(norm.item())
    everybodys = [of_chunk for share in processes.gather([measured]) for of_chunk in share]
    return torch.cat(everybodys, 1).cpu().double(), norms, processes.share(ratio_first)


def fit(
    model: TextToImage,
    weights: Mapping[str, torch.nn.Parameter],
    step: Callable[[int, torch.optim.Optimizer, Average], Row],
    config: Any,
    folder: Path,
    origin: Mapping[str, str],
    guard: Guard | None = None,
    on_epoch: Callable[[Row, TextToImage], None] | None = None,
    *,
    more: Mapping[str, Kept] = MappingProxyType({}),
    processes: Processes | None = None,
    **options: Any,
) -> list[Row]:
    """Tune `weights`, which are on the model, and leave the result there, frozen: the last policy, or its average, or
    where the guard has patience the best one.

    Args:
        step: makes an epoch's pictures and takes its gradient steps with the optimizer, which the average follows.
        config: of the method; its number of epochs, optimizer, average, checkpoints and resources.
        folder, guard, on_epoch, processes: see `ddpo.train`; origin: see `train.loop`.
        more: state of the method beside policy, average, best policy and optimizer, for checkpoints.
        options: of AdamW, beside the config's.
    """
    config.resources.prepare(model)
    optimizer = config.resources.adamw(
        weights.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, **options
    )
    average, best = Average(weights, config.ema_decay), Copy(weights)
    kept: dict[str, Kept] = {"policy": Weights(weights), "average": average, "best": best, **more}
    kept["optimizer"] = Optimizer(optimizer, config.resources.moment_bytes)
    judged = best.values

    def judged_step(epoch: int) -> Row:
        nonlocal judged
        judged = best.now()  # the policy that draws what the monitor sees, not the average
        return step(epoch, optimizer, average)

    def on_row(history: list[Row]) -> None:
        """Let the guard look, and keep the policy that drew the pictures where it is the best so far; while there is no
        frontier, the newest result.
        """
        row = history[-1]
        if guard:
            row |= guard.look(history)
            if guard.best(history) == len(history) - 1:
                best.take(judged if "frontier" in row else average.result())
        if on_epoch:
            on_epoch(row, model)

    history = loop(
        judged_step, config.n_epochs, kept, folder, config.checkpoint_every, origin,
        on_row=on_row, stop=lambda history: bool(guard and guard.gives_up(history)), processes=processes,
    )  # fmt: skip
    (best if guard and guard.patience else average).put_on()
    freeze(model)
    return history
