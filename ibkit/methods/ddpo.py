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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ibkit.adapt import attach, without
from ibkit.data.prompts import Prompt
from ibkit.device import generator, working
from ibkit.fields import field
from ibkit.methods.engine.objectives import COMBINATIONS, Objectives, Reward
from ibkit.methods.engine.policy import MAY_CHANGE, Measured, check_policy, collect, epoch_prompts, fit, gradient_steps
from ibkit.methods.engine.ratio import approx_kl, gradient_cut
from ibkit.methods.engine.rollout import Trajectories
from ibkit.methods.records import Method, Monitor, Work
from ibkit.model.ddim import Schedule, log_prob, step_mean
from ibkit.model.sample import Sampler
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.guard import Guard
from ibkit.train.kept import Average, Facts
from ibkit.train.loop import kept_of, settings_origin
from ibkit.train.processes import Processes
from ibkit.train.resources import Resources


@dataclass(frozen=True)
class DDPOConfig:
    """Settings; the defaults are InstructBooth's (appendix C), or where it is silent those of the reference code
    (kvablack/ddpo-pytorch).

    Two of them need more words. `trained_share`: the steps left out are sampled as well; `model.ddim.step_weight` says
    why the last ones can drown all others. `subsample`: the gradient keeps its expectation (it is a mean over pairs)
    and costs less.
    """

    n_epochs: int = field(100, "epochs", "InstructBooth is silent", low=1, high=1_000_000)
    images_per_epoch: int = field(16, "pictures drawn in an epoch", "InstructBooth", low=1, high=1_000_000)
    batch: int = field(8, "trajectories of a gradient step", "InstructBooth: 8 of the 16", low=1)
    sampler: Sampler = Sampler()
    clip_range: float = field(1e-4, "PPO clips the probability ratio there", "InstructBooth", low=0.0, high=1.0)
    advantage_clip: float = field(5.0, "largest advantage", "DDPO's code", low=0.0)
    learning_rate: float = field(2e-5, "of AdamW, constant", "InstructBooth", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.99), "of AdamW", "InstructBooth", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "InstructBooth", low=0.0, high=1.0)
    max_grad_norm: float = field(1.0, "gradients are clipped to this norm", "DDPO's code", low=0.0)
    trained_share: float = field(1.0, "of the denoising steps, the first; 1 = all", "DDPO: all", low=0.0, high=1.0)
    subsample: float = field(
        1.0, "of the trained steps, drawn anew for each picture and gradient step", "DDPO: all", low=0.0, high=1.0
    )
    kl_weight: float = field(
        0.0, "β of the KL divergence from the personalized policy, added to every pair's loss (DPOK, eq. 8)",
        "DDPO: without", low=0.0, high=1e6,
    )  # fmt: skip
    ema_decay: float = field(
        0.0, "moving average of the adapter, which is the result; sampling keeps to the policy; 0 = the last policy",
        "DDPO: none", low=0.0, high=0.9999,
    )  # fmt: skip
    lora_rank: int = field(4, "rank of the adapter", "DDPO's code; InstructBooth is silent", low=1, high=1024)
    micro_batch: int = field(
        4, "pictures of a rollout, or pairs (picture, step), in a forward pass; memory and speed only", "ours", low=1
    )
    combine: str = field(
        "synergy", "text and subject into one advantage; sum and harmonic (RPO) make one reward of the two first",
        "Customized-GRPO", choices=COMBINATIONS,
    )  # fmt: skip
    synergy: float = field(0.4, "γ of the term for pictures good in both; 0 = without", "Customized-GRPO", low=0.0)
    time_aware: bool = field(True, "the text's weight follows the denoising step; else text_weight", "Customized-GRPO")
    text_weight: float = field(
        0.5, "of the sum, of the harmonic mean (RPO's 1 - λ), and without time_aware", "RPO", low=0.0, high=1.0
    )
    spread_floor: float = field(
        0.0, "least σ of a clipped objective, as a share of that of true pictures; 0 = none", "ours", low=0.0
    )
    stats_buffer: int = field(
        16, "rewards of a prompt that make its mean; 0 = those of the epoch", "DDPO's code", low=0
    )
    stats_min_count: int = field(16, "fewer, and all prompts of the kind make the mean", "DDPO's code", low=1)
    checkpoint_every: int = field(5, "epochs between checkpoints", "ours", low=1)
    resources: Resources = Resources()

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
    """KL(N(mean, s²) ‖ N(reference, s²)) = (mean - reference)² / 2s², (M,) nats per latent value, as `log_prob` has
    them.

    Args:
        mean, reference: (M, C, H, W).
        std: (M,), positive.
    """
    s = std.view(-1, 1, 1, 1)
    return ((mean - reference) ** 2 / (2 * s**2)).mean(dim=(1, 2, 3))


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
    name: str = "ddpo",
) -> list[dict[str, float]]:
    """Fine-tune `model` in place (it gains a LoRA adapter `name`) and return one row of numbers an epoch.

    Args:
        prompts: of both kinds for InstructBooth's trick, see `training_prompts`.
        reward: scores the pictures; an `Objective` may be clipped at its level. Where training continues the caller
            must give the same one, and the same guard: unlike the settings they are not compared.
        folder: for checkpoints; training continues from the newest one there, on the same random streams.
        monitor: watches the epoch's images (subject fidelity, the judge); never part of the objective.
        guard: warns, may end the training early, and then the result is the best policy it saw; see `train.guard`.
        on_epoch: called after each epoch with its row and the model (progress, sample grids); see `loop`'s `on_row`.
        processes: that train together, each in a call of its own with the same arguments; only the first watches
            (monitor, on_epoch) and writes. See `train.processes.start` and `records.help_train`.
        subject_reward: a second objective, of the pictures whose prompt has the identifier; None as in InstructBooth.
        name: of the adapter on the model, see `ibkit.adapt`.

    Returns:
        Rows with epoch, reward, reward_identifier and reward_class (where there is such a prompt), reward_subject (of
        identifier prompts), the rewards' parts (text_NAME, subject_NAME), above_level and above_level_subject (share of
        pictures, where a level is known), the monitor's numbers, the guard's (frontier, alarm), zero_spread (see
        `Rewards.row`), ratio_first (largest |ratio - 1| of the first gradient step, before its update), clip_high and
        clip_low (share of pairs whose gradient is cut, see `gradient_cut`), approx_kl, log_prob, log_prob_t000 ...
        (mean of each step), grad_norm, pictures (drawn), gradient_steps, loss, kl (with `kl_weight`), seconds.
        clip_high, clip_low and approx_kl are means over an epoch's gradient steps but the first: its ratios are 1, and
        in an epoch of two steps it would halve them.

    Raises:
        TrainingError: ratios that are not 1 before an epoch's first update (see `ratio_tolerance`), a reward, loss or
            gradient that is not finite, a reward function that fails, memory that does not suffice, or another process
            that ended; the last checkpoint stays.
        ArtifactError: the checkpoints in `folder` are of another training.
        ParameterError: fewer images an epoch than processes, a sampler whose trained steps are deterministic, or a
            clip at a level that is not known.
    """
    processes = processes or Processes()
    origin = settings_origin(config, MAY_CHANGE)
    objectives = Objectives(reward, subject_reward, config)
    for objective in objectives.given.values():
        objective.levels(prompts)  # a clip at a level that nobody knows is refused before anything is drawn
    origin |= {"model": model_fingerprint(model), "prompts": hash_json([p.text for p in prompts]), "seed": str(seed)}
    origin["rewards"] = hash_json(objectives.facts)
    origin |= config.resources.origin
    schedule = config.sampler.schedule(model)
    check_policy(schedule, config, processes)
    adapter = attach(model, "lora", name, {"rank": config.lora_rank}, generator(seed, "lora"))

    def step(epoch: int, optimizer: torch.optim.Optimizer, average: Average) -> dict[str, float]:
        chosen = epoch_prompts(prompts, config.images_per_epoch, seed, epoch)
        trajectories, images, scores, parts = collect(
            model, chosen, objectives, schedule, config, seed, epoch, processes
        )
        advantages = objectives.advantages(chosen, scores, len(schedule))
        row = {"epoch": epoch} | objectives.row(chosen, scores, parts)
        row |= processes.share(monitor(images, chosen) if monitor else {})
        row |= {"log_prob": trajectories.log_probs.mean().item()}
        row |= {
            f"log_prob_t{int(t):03d}": v
            for t, v in zip(schedule.timesteps, trajectories.log_probs.mean(1).tolist(), strict=True)
        }
        stream = generator(seed, "update", epoch)
        return row | update(model, optimizer, average, trajectories, advantages, schedule, config, stream, processes)

    stats = {"stats": Facts(objectives)}
    return fit(model, adapter, step, config, folder, origin, guard, on_epoch, more=stats, processes=processes)


def best_policy(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter of the best frontier, for `ibkit.adapt.load_state`, from a training's newest checkpoint (an
    ArtifactError without any); see `train.guard`. It is there without `patience` too, where the training itself returns
    its last policy.
    """
    return kept_of(folder, "best")


def update(
    model: TextToImage,
    optimizer: torch.optim.Optimizer,
    average: Average,
    trajectories: Trajectories,
    advantages: torch.Tensor,
    schedule: Schedule,
    config: DDPOConfig,
    stream: torch.Generator,
    processes: Processes,
) -> dict[str, float]:
    """The gradient steps of an epoch: trajectories in random order, `batch` of them to a step. Advantages are of each
    image and denoising step (B, T); a step has its own however the steps are drawn.
    """
    n_steps = config.n_trained_steps(len(schedule))
    n_drawn = max(1, round(config.subsample * n_steps))
    advantages = advantages.to(model.device)

    def draws() -> Iterator[torch.Tensor]:
        for members in torch.randperm(len(advantages), generator=stream).split(config.batch):
            steps = torch.stack([torch.randperm(n_steps, generator=stream)[:n_drawn] for _ in members])
            yield torch.stack([members.repeat_interleave(n_drawn), steps.flatten()], 1)

    def measure(image: torch.Tensor, step: torch.Tensor) -> Measured:
        fresh = torch.ones_like(image, dtype=torch.bool)
        image, step = image.to(model.device), step.to(model.device)
        advantage = advantages[image, step]
        return *pair_loss(model, trajectories, image, step, advantage, schedule, config), advantage, fresh

    found, norms, ratio_first = gradient_steps(draws(), measure, model, optimizer, average, schedule, config, processes)
    loss, ratio, kl, advantage, _, gradient_step = found
    moved = gradient_step > 0 if len(norms) > 1 else gradient_step == 0
    high, low = gradient_cut(ratio[moved], advantage[moved], config.clip_range)
    row = {
        "ratio_first": ratio_first,
        "clip_high": high.double().mean().item(),
        "clip_low": low.double().mean().item(),
        "approx_kl": approx_kl(ratio[moved]).item(),
        "grad_norm": sum(norms) / len(norms),
        "pictures": len(advantages),
        "gradient_steps": len(norms),
        "loss": loss.mean().item(),
    }
    return row | ({"kl": kl.mean().item()} if config.kl_weight else {})


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
        with torch.no_grad(), without(model, next(reversed(model.deltas))):  # what the newest stands on
            personalized = policy_mean()
        kl = gaussian_kl(mean, personalized, std)
    return *policy_loss(new, trajectories.log_probs[step, image], advantage, config.clip_range), kl


def tune(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """DDPO as a stage; see `records.Train`."""
    parked = settings.resources.offload
    text, subject = (spec and spec.load(model.device, job.photos, parked) for spec in (job.reward, job.subject_reward))
    with working(model.unet):
        return train(
            model, job.prompts, text, settings, job.folder, job.seed, monitor, job.guard, on_row, processes, subject,
            job.name,
        )  # fmt: skip


def work(settings: DDPOConfig) -> Work:
    """KL rows are the personalized policy's passes."""
    rows = settings.sampler.rows_per_step
    n_steps = settings.n_trained_steps(settings.sampler.n_steps)
    pictures = settings.n_epochs * settings.images_per_epoch
    pairs = pictures * max(1, round(settings.subsample * n_steps))
    return Work(
        forward=pictures * settings.sampler.rows + (pairs * rows if settings.kl_weight else 0),
        tuned=pairs * rows,
        pictures=pictures,
        graph_rows=rows * min(settings.micro_batch, pairs),
    )


METHOD = Method(
    name="ddpo",
    label="DDPO",
    stage="tune",
    settings=DDPOConfig,
    train=tune,
    source="Black et al. 2023, arXiv 2305.13301, as InstructBooth has it (Chae et al. 2023, arXiv 2312.03011)",
    pocket={
        "n_epochs": (20, "minutes; not compared with more"),
        "images_per_epoch": (48, "12 for each of 2 activities x 2 kinds of prompt"),
        "batch": (24, "half of them a gradient step, as in the paper"),
        "sampler.n_steps": (10, "the base model follows prompts at 10 steps as well as at 15"),
        "sampler.guidance": (2.0, "as well as at 3, which hides what the overfitted model lost, and burns colours"),
        "clip_range": (2e-4, "for larger steps than the paper's; 1e-3 learns faster and falls apart after 30 epochs"),
        "learning_rate": (4e-3, "minutes instead of hours"),
        "trained_share": (0.8, "8 of 10 steps: the last but one would drown all others (notebook 13)"),
        "subsample": (0.6, "5 of those 8 for each picture and gradient step"),
        "ema_decay": (0.9, "evens out single gradient steps"),
        "lora_rank": (8, "not compared with other ranks"),
        "micro_batch": (48, "with guidance 96 rows, where two CPU cores are fastest a row (benchmarks/rl.py)"),
        "stats_buffer": (48, "four epochs of a prompt, so that the mean follows the policy"),
        "stats_min_count": (8, "most of the 12 pictures that a prompt has in an epoch"),
    },
    work=work,
)
