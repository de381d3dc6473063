"""DDPO: policy-gradient fine-tuning of a diffusion model (Black et al. 2023), as InstructBooth uses it (section 2.2).

| here | paper |
|---|---|
| `ratio` | p_θ(x_{t-1}|x_t,c) / p_θold(x_{t-1}|x_t,c), importance sampling (DDPO_IS, section 4.3) |
| `advantage` | r(x_0, c) normalised per prompt, as DDPO's reference code does; of two objectives: `engine.objectives` |
| `policy_loss` | PPO's clipped objective (Schulman et al. 2017, eq. 7) |

An epoch: sample `images_per_epoch` trajectories, score the images, then take gradient steps, each on a random `batch`
of the trajectories and their timesteps. Only a LoRA adapter is trained; weights, latents, log-probabilities are fp32.

Shapes: B images of an epoch, T denoising steps, M (image, step) pairs of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from ibkit.data.prompts import Prompt
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError, TrainingError
from ibkit.methods.engine.objectives import Objectives, Reward, RewardSpec
from ibkit.methods.engine.ratio import approx_kl, check_first_ratio, gradient_cut, ratio_tolerance
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model.ddim import Schedule, log_prob, step_mean
from ibkit.model.sample import Sampler
from ibkit.model.text_to_image import TextToImage, load_model, model_fingerprint
from ibkit.runs import Checkpoints, hash_json
from ibkit.train.guard import Guard
from ibkit.train.kept import load_optimizer_tensors, memory_advice, optimizer_tensors, part
from ibkit.train.processes import Processes

# (images, prompts) -> numbers to watch; never part of the objective
Monitor = Callable[[list[Image.Image], list[Prompt]], dict[str, float]]
# settings that may change when a training goes on: how long, and what only costs memory
MAY_CHANGE = ("n_epochs", "checkpoint_every", "micro_batch")


@dataclass(frozen=True)
class DDPOConfig:
    """Settings of the RL stage; the defaults are InstructBooth's (appendix C), or where it is silent the reference
    code's (kvablack/ddpo-pytorch).

    Attributes:
        n_epochs: InstructBooth does not give it.
        images_per_epoch: 16 (InstructBooth).
        batch: trajectories of a gradient step, a random 8 of the 16 (InstructBooth).
        sampler: 50 steps, guidance 7.5 (InstructBooth); η = 1 (DDPO).
        clip_range: 1e-4 (InstructBooth).
        advantage_clip: 5 (DDPO's code).
        learning_rate: 2e-5; betas: (0.9, 0.99); weight_decay: 0.01 (InstructBooth).
        max_grad_norm: 1 (DDPO's code).
        trained_share: of the denoising steps, the first, which are the noisiest; 1 trains all (DDPO). The rest is
            sampled as well. `model.ddim.step_weight` says why the last ones can drown all others.
        subsample: share of the trained steps that a gradient step draws for each image, anew each time; 1 takes all
            (DDPO). The gradient keeps its expectation (it is a mean over pairs) and costs less.
        kl_weight: β of the KL divergence from the personalized policy, added to the loss of every pair (DPOK, Fan et
            al. 2023, eq. 8); 0 leaves it out (DDPO).
        ema_decay: of an exponential moving average of the adapter over gradient steps, which is the result of the
            training; sampling keeps to the policy itself. 0 = the result is the last policy (DDPO).
        lora_rank: not given by InstructBooth; 4 in DDPO's code.
        micro_batch: images of a rollout, or (image, step) pairs of a gradient step, in a forward pass: memory and speed
            only, gradients are accumulated.
        combine: text and subject into advantages, where there is a subject reward: "synergy" normalises each per prompt
            and adds a term for pictures that are good in both (Customized-GRPO); "sum" and "harmonic" (RPO) make one
            reward of the two first.
        synergy: γ of that term; 0 leaves it out.
        time_aware: whether the text's weight follows the denoising step (Customized-GRPO); else it is `text_weight`.
        text_weight: of the sum, of the harmonic mean (RPO's 1 - λ), and without `time_aware`.
        stats_buffer, stats_min_count: of `PromptStats`; 16 and 16 in DDPO's code; a buffer of 0 makes advantages
            group-relative, and `stats_min_count` without meaning.
        checkpoint_every: epochs between checkpoints.
    """

    n_epochs: int = 100
    images_per_epoch: int = 16
    batch: int = 8
    sampler: Sampler = Sampler(50, 7.5, 1.0)
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    trained_share: float = 1.0
    subsample: float = 1.0
    kl_weight: float = 0.0
    ema_decay: float = 0.0
    lora_rank: int = 4
    micro_batch: int = 4
    combine: str = "synergy"
    synergy: float = 0.4
    time_aware: bool = True
    text_weight: float = 0.5
    stats_buffer: int = 16
    stats_min_count: int = 16
    checkpoint_every: int = 5

    def n_trained_steps(self, n_steps: int) -> int:
        """How many of `n_steps` denoising steps are trained, at least one."""
        return max(1, round(self.trained_share * n_steps))


def policy_loss(
    new_log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped importance-sampling loss and the ratio, each (M,).

    loss = max(-A r, -A clip(r, 1 - ε, 1 + ε)), r = exp(log p - log p_old) (PPO eq. 7 with the sign of a loss).
    """
    ratio = torch.exp(new_log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def gaussian_kl(mean: torch.Tensor, reference: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, s²) ‖ N(reference, s²)) = (mean - reference)² / 2s², averaged over C, H, W as `log_prob` is.

    Args:
        mean, reference: (M, C, H, W).
        std: (M,), positive.

    Returns:
        (M,) nats per latent value.
    """
    s = std.view(-1, 1, 1, 1)
    return ((mean - reference) ** 2 / (2 * s**2)).mean(dim=(1, 2, 3))


def epoch_prompts(prompts: Sequence[Prompt], n: int, seed: int, epoch: int) -> list[Prompt]:
    """`n` prompts of an epoch: every prompt equally often, the remainder drawn at random."""
    order = torch.randperm(len(prompts), generator=generator(seed, "prompts", epoch)).tolist()
    return [prompts[order[i % len(prompts)]] for i in range(n)]


def train(
    model: TextToImage,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: DDPOConfig,
    folder: Path,
    seed: int = 0,
    monitor: Monitor | None = None,
    guard: Guard | None = None,
    on_epoch: Callable[[dict[str, float], TextToImage], None] | None = None,
    processes: Processes | None = None,
    subject_reward: Reward | None = None,
) -> list[dict[str, float]]:
    """Fine-tune `model` in place (it gains a LoRA adapter) and return one row of numbers an epoch.

    Args:
        prompts: of both kinds for InstructBooth's trick, see `training_prompts`.
        reward: scores the pictures; an `Objective` may be clipped at its level. Where training continues the caller
            must give the same one, and the same guard: unlike the settings they are not compared.
        folder: for checkpoints; training continues from the newest one there, on the same random streams.
        monitor: watches the epoch's images (subject fidelity, the judge); never part of the objective.
        guard: warns, may end the training early, and then the result is the best policy it saw; see `train.guard`.
        on_epoch: called after each epoch with its row and the model (progress, sample grids), before the epoch's
            checkpoint is written: at least once for every epoch, again for those that an interruption made it repeat.
        processes: that train together, each in a call of its own with the same arguments; only the first watches
            (monitor, on_epoch) and writes. See `train.processes.start` and `help_train`.
        subject_reward: a second objective, of the pictures whose prompt has the identifier; None as in InstructBooth.

    Returns:
        Rows with epoch, reward, reward_identifier and reward_class (where there is such a prompt), reward_subject (of
        identifier prompts), above_level and above_level_subject (share of pictures, where a level is known), the
        monitor's numbers, the guard's (frontier, alarm), zero_spread (see `Objectives.row`), ratio_first (largest
        |ratio - 1| of the first gradient step, before its update), clip_high and clip_low (share of pairs whose
        gradient is cut, see `gradient_cut`), approx_kl, log_prob, log_prob_t000 ... (mean of each step), grad_norm,
        loss, kl (with `kl_weight`), seconds. clip_high, clip_low and approx_kl are means over an epoch's gradient steps
        but the first: its ratios are 1, and in an epoch of two steps it would halve them.

    Raises:
        TrainingError: ratios that are not 1 before an epoch's first update (see `ratio_tolerance`), a reward, loss or
            gradient that is not finite, a reward function that fails, memory that does not suffice, or another process
            that ended; the last checkpoint stays.
        ArtifactError: the checkpoints in `folder` are of another training.
        ParameterError: fewer images an epoch than processes, a sampler whose trained steps are deterministic, or a
            clip at a level that is not known.
    """
    processes = processes or Processes()
    if config.images_per_epoch < processes.count:
        raise ParameterError(
            f"{config.images_per_epoch} images an epoch cannot be shared by {processes.count} processes: use fewer."
        )
    origin = {k: hash_json(v) for k, v in asdict(config).items() if k not in MAY_CHANGE}
    objectives = Objectives(reward, subject_reward, config)
    for objective in objectives.given.values():
        objective.levels(prompts)  # a clip at a level that nobody knows is refused before anything is drawn
    origin |= {"model": model_fingerprint(model), "prompts": hash_json([p.text for p in prompts]), "seed": str(seed)}
    origin["rewards"] = hash_json(objectives.facts)
    schedule = config.sampler.schedule(model)
    if not bool((schedule.std[: config.n_trained_steps(len(schedule))] > 0).all()):
        raise ParameterError(
            f"a denoising step that is to be trained has standard deviation 0 (sampler: {config.sampler}), so its "
            "log-probability is not defined: train with an eta above 0, such as 1."
        )
    trainable = model.add_lora(config.lora_rank, generator(seed, "lora"))
    names = list(model.lora_state())
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    average = [p.detach().clone() for p in trainable]
    best = average
    history: list[dict[str, float]] = []
    checkpoints = Checkpoints(folder / "checkpoints")
    if (found := processes.share(checkpoints.latest() if processes.first else None)) is not None:
        _, tensors, state = found
        if other := [k for k in origin if state["origin"].get(k) != origin[k]]:
            raise ArtifactError(
                f"the checkpoints in {checkpoints.folder} are of a training with another {', another '.join(other)}: "
                "go on with what it was started with, or train in another folder."
            )
        model.load_lora_state(part(tensors, "lora"))
        average, best = ([part(tensors, name)[k].to(model.device) for k in names] for name in ("average", "best"))
        load_optimizer_tensors(optimizer, tensors)
        objectives.load(state["stats"])
        history = state["history"]

    ended = len(history) >= config.n_epochs or bool(guard and guard.gives_up(history))
    while not ended:
        epoch = len(history)
        started = time.perf_counter()
        chosen = epoch_prompts(prompts, config.images_per_epoch, seed, epoch)
        streams = [generator(seed, "rollout", epoch, i) for i in range(len(chosen))]
        trajectories, images, scores = collect(model, chosen, objectives, schedule, config, streams, processes)
        if not bool(torch.isfinite(scores).all()):
            which, bad = (~torch.isfinite(scores)).nonzero()[0].tolist()
            raise TrainingError(
                f"epoch {epoch}: the reward of image {bad} ({chosen[bad].text!r}) is "
                f"{scores[which, bad].item()}; look at the image and at the reward function."
            )
        advantages = objectives.advantages(chosen, scores, len(schedule))
        row = {"epoch": epoch} | objectives.row(chosen, scores)
        row |= processes.share(monitor(images, chosen) if monitor else {})
        row |= {"log_prob": trajectories.log_probs.mean().item()}
        row |= {
            f"log_prob_t{int(t):03d}": v
            for t, v in zip(schedule.timesteps, trajectories.log_probs.mean(1).tolist(), strict=True)
        }
        stream = generator(seed, "update", epoch)
        judged = [p.detach().clone() for p in trainable]  # the policy that drew what the monitor saw, not the average
        row |= update(
            model, optimizer, trainable, average, trajectories, advantages, schedule, config, stream, processes
        )
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        if guard:
            row |= guard.look(history)
            if guard.best(history) == epoch:  # while there is no frontier, the newest policy
                best = judged if "frontier" in row else [v.clone() for v in average]
        ended = epoch + 1 == config.n_epochs or bool(guard and guard.gives_up(history))
        if on_epoch:
            on_epoch(row, model)
        if processes.first and ((epoch + 1) % config.checkpoint_every == 0 or ended):
            tensors = {f"lora.{k}": v for k, v in model.lora_state().items()} | optimizer_tensors(optimizer)
            for name, adapter in (("average", average), ("best", best)):
                tensors |= {f"{name}.{k}": v.cpu() for k, v in zip(names, adapter, strict=True)}
            checkpoints.save(epoch + 1, tensors, {"origin": origin, "stats": objectives.state(), "history": history})
    with torch.no_grad():
        for parameter, value in zip(trainable, best if guard and guard.patience else average, strict=True):
            parameter.copy_(value)
    model.unet.requires_grad_(False)
    return history


def best_policy(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter of the best frontier, for `load_lora_state`, from a training's newest checkpoint; see `train.guard`.

    It is there without `patience` too, where the training itself returns its last policy.

    Raises:
        ArtifactError: no checkpoint.
    """
    found = Checkpoints(folder / "checkpoints").latest()
    if found is None:
        raise ArtifactError(f"{folder} has no checkpoint of a training: run it first.")
    return part(found[1], "best")


@contextmanager
def _own_share(processes: Processes, config: DDPOConfig) -> Iterator[None]:
    """Inside, a process works on its share; where it fails, for lack of memory too, all processes say why."""
    advice = f"lower micro_batch (now {config.micro_batch}), which changes nothing but memory and speed"
    with processes.agree(), memory_advice(advice):
        yield


def collect(
    model: TextToImage,
    prompts: Sequence[Prompt],
    objectives: Objectives,
    schedule: Schedule,
    config: DDPOConfig,
    streams: Sequence[torch.Generator],
    processes: Processes,
) -> tuple[Trajectories, list[Image.Image], torch.Tensor]:
    """An epoch's trajectories, images and scores (objectives, B): each process makes its share and gets everybody's."""
    chunks = torch.arange(len(prompts)).split(processes.chunk(len(prompts), config.micro_batch))
    mine = []
    with _own_share(processes, config):
        for members in processes.deal(chunks):
            asked, own = [prompts[i] for i in members], [streams[i] for i in members]
            made = rollout(model, [p.text for p in asked], schedule, config.sampler.guidance, own, len(asked))
            images = model.decode(made.latents[-1])
            mine.append((made.latents, made.log_probs, images, objectives.score(images, asked)))
    latents, log_probs, images, scores = zip(*processes.gather(mine), strict=True)
    trajectories = Trajectories(
        torch.cat(latents, 1).to(model.device),
        torch.cat(log_probs, 1).to(model.device),
        [p.text for p in prompts],
    )
    return trajectories, [image for part in images for image in part], torch.cat(scores, 1)


def update(
    model,
    optimizer,
    trainable,
    average,
    trajectories: Trajectories,
    advantages: torch.Tensor,
    schedule: Schedule,
    config: DDPOConfig,
    stream: torch.Generator,
    processes: Processes,
) -> dict[str, float]:
    """The gradient steps of an epoch: trajectories in random order, `batch` of them to a step.

    Args:
        advantages: of each image and denoising step (B, T); a step has its own however the steps are drawn.
    """
    n_steps = config.n_trained_steps(len(schedule))
    n_drawn = max(1, round(config.subsample * n_steps))
    advantages = advantages.to(model.device)
    order = torch.randperm(len(advantages), generator=stream)
    tolerance = ratio_tolerance(model, schedule, config)
    measured, norms, ratio_first = [], [], 0.0
    for members in order.split(config.batch):
        steps = torch.stack([torch.randperm(n_steps, generator=stream)[:n_drawn] for _ in members])
        pairs = torch.stack([members.repeat_interleave(n_drawn), steps.flatten()], 1)
        with _own_share(processes, config):
            for micro in processes.deal(pairs.split(processes.chunk(len(pairs), config.micro_batch))):
                image, step = micro.to(model.device).unbind(1)
                advantage = advantages[image, step]
                loss, ratio, kl = pair_loss(model, trajectories, image, step, advantage, schedule, config)
                if not bool(torch.isfinite(loss).all()):
                    raise TrainingError(
                        f"the policy loss is not finite (ratio {ratio.min().item():.3g} "
                        f"to {ratio.max().item():.3g}): lower the learning rate."
                    )
                if not norms:
                    ratio_first = max(ratio_first, check_first_ratio(ratio.detach(), step, schedule, tolerance))
                ((loss + config.kl_weight * kl).sum() / len(pairs)).backward()
                gradient_step = torch.full_like(advantage, len(norms))
                measured.append(torch.stack([loss.detach(), kl.detach(), ratio.detach(), advantage, gradient_step]))
        processes.add_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise TrainingError("the gradient is not finite: lower the learning rate.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for mean, parameter in zip(average, trainable, strict=True):
            mean.lerp_(parameter.detach(), 1 - config.ema_decay)
        norms.append(norm.item())
    everybodys = [of_chunk for share in processes.gather([measured]) for of_chunk in share]
    loss, kl, ratio, advantage, gradient_step = torch.cat(everybodys, 1).cpu().double()
    moved = gradient_step > 0 if len(norms) > 1 else gradient_step == 0
    high, low = gradient_cut(ratio[moved], advantage[moved], config.clip_range)
    row = {
        "ratio_first": processes.share(ratio_first),
        "clip_high": high.double().mean().item(),
        "clip_low": low.double().mean().item(),
        "approx_kl": approx_kl(ratio[moved]).item(),
        "grad_norm": sum(norms) / len(norms),
        "loss": loss.mean().item(),
    }
    return row | ({"kl": kl.mean().item()} if config.kl_weight else {})


def help_train(
    processes: Processes,
    device: torch.device,
    model: str,
    prompts: Sequence[Prompt],
    reward: RewardSpec,
    subject_reward: RewardSpec | None,
    weights: str,
    references: Sequence[Image.Image],
    config: DDPOConfig,
    folder: Path,
    seed: int,
    guard: Guard | None,
) -> None:
    """Be one of the processes that help the first, whose `train` has the same arguments; for `train.processes.start`.

    Args:
        model: as `load_model` takes it.
        weights: of the scorers, as `make_scorer` takes them; references: the subject's photos.
    """
    text, subject = (spec and spec.load(weights, device, references) for spec in (reward, subject_reward))
    network = load_model(model, device=device)
    train(network, prompts, text, config, folder, seed, guard=guard, processes=processes, subject_reward=subject)


def pair_loss(
    model: TextToImage,
    trajectories: Trajectories,
    image: torch.Tensor,
    step: torch.Tensor,
    advantage: torch.Tensor,
    schedule: Schedule,
    config: DDPOConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, ratio and KL from the personalized policy, each (M,), of pairs (image, step), with the guidance that the
    rollout used. Without `kl_weight` the divergence is not computed and 0.
    """
    x_t, x_prev = trajectories.latents[step, image], trajectories.latents[step + 1, image]
    std = schedule.std[step]

    prompts = [trajectories.prompts[i] for i in image.tolist()]

    def policy_mean() -> torch.Tensor:
        eps_hat = model.guided_noise(x_t, schedule.timesteps[step], prompts, config.sampler.guidance)
        return step_mean(x_t, eps_hat, schedule.alpha_bar[step], schedule.alpha_bar_prev[step], std)

    mean = policy_mean()
    new = log_prob(x_prev, mean, std)
    kl = torch.zeros_like(new)
    if config.kl_weight:
        with torch.no_grad(), model.without_lora():
            personalized = policy_mean()
        kl = gaussian_kl(mean, personalized, std)
    return *policy_loss(new, trajectories.log_probs[step, image], advantage, config.clip_range), kl
