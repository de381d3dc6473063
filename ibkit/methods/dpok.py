"""DPOK: policy gradient with a value baseline and a KL divergence from the model before (Fan et al. 2023).

| here | paper (arXiv 2305.16381) and code (google-research, `dpok/`) |
|---|---|
| `policy_loss` | -w A clamp(ρ, 1 ± ε), A = R - V(x_t, c, t): `_train_policy_func` |
| `Value` | V, the baseline: `ValueMulti` in `reward_model.py` |
| `divergence` | KL(p_θ(x_{t-1} | x_t) ‖ p_pre(x_{t-1} | x_t)), eq. 8; `kl="eps"`: the code's (ε̂ - ε̂_pre)² |

An iteration: sample `images_per_epoch` trajectories, put them into a replay buffer of the newest `buffer` transitions,
take one step of the value network and `gradient_steps` of the policy, each on `batch` transitions of the buffer.

Differs from the code: latents, log-probabilities and rewards are fp32, the model before is the same U-Net without its
newest adapter, and a buffer of fewer transitions than a batch serves as it is. The clamp is bare as there: outside of
1 ± ε a transition has no gradient, whatever the sign of its advantage.

Shapes: B images, T denoising steps, M transitions, D latent values (C H W).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ibkit.adapt import attach, without
from ibkit.data.prompts import Prompt
from ibkit.device import generator, working
from ibkit.fields import field
from ibkit.methods.ddpo import gaussian_kl
from ibkit.methods.engine.objectives import Reward, Rewards
from ibkit.methods.engine.policy import MAY_CHANGE, Measured, check_policy, collect, epoch_prompts, fit, gradient_steps
from ibkit.methods.engine.ratio import approx_kl
from ibkit.methods.engine.replay import Replay
from ibkit.methods.engine.rollout import Trajectories
from ibkit.methods.records import Method, Monitor, Work, check_job
from ibkit.model.ddim import Schedule, log_prob, step_mean
from ibkit.model.sample import Sampler
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.guard import Guard
from ibkit.train.kept import Average, Kept, Optimizer, Weights
from ibkit.train.loop import settings_origin
from ibkit.train.processes import Processes
from ibkit.train.resources import Resources

DIVERGENCES = ("gauss", "eps")


@dataclass(frozen=True)
class DPOKConfig:
    """Settings; the defaults are those of the code for one prompt (its README), or where it has none the paper's."""

    n_epochs: int = field(2000, "iterations", "DPOK's code: 20,000 pictures", low=1, high=1_000_000)
    images_per_epoch: int = field(10, "pictures drawn in an iteration", "DPOK's code", low=1, high=1_000_000)
    gradient_steps: int = field(5, "of the policy in an iteration", "DPOK's code", low=1, high=10_000)
    batch: int = field(48, "transitions of a gradient step", "DPOK's code: 4 × 12; the paper: 32", low=1)
    buffer: int = field(1000, "newest transitions that are drawn from, whole trajectories", "DPOK's code", low=1)
    sampler: Sampler = Sampler()
    reward_weight: float = field(10.0, "w (the paper's α) of the advantage", "DPOK", low=0.0)
    kl: str = field(
        "gauss", "divergence from the model before: of the Gaussian steps, or of the predicted noise",
        "DPOK; its code: eps", choices=DIVERGENCES,
    )  # fmt: skip
    kl_weight: float = field(
        0.045, "β; on SD's schedule as much as .01 of the code's form, see `divergence`", "DPOK's code: .01", low=0.0
    )
    clip_range: float = field(1e-4, "the ratio is clamped there", "DPOK's code", low=0.0, high=1.0)
    learning_rate: float = field(1e-5, "of AdamW, constant", "DPOK's code", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW", "DPOK's code", low=0.0, high=1.0)
    weight_decay: float = field(0.0, "of AdamW", "DPOK's code", low=0.0, high=1.0)
    max_grad_norm: float = field(0.1, "gradients are clipped to this norm", "DPOK's code", low=0.0)
    value_learning_rate: float = field(1e-4, "of the value network's AdamW", "DPOK's code", low=0.0, high=1.0)
    value_batch: int = field(256, "transitions of a batch of the value network", "DPOK's code", low=1)
    value_batches: int = field(5, "batches whose mean makes its one step an iteration", "DPOK's code", low=1)
    trained_share: float = field(1.0, "of the denoising steps, the first; 1 = all", "DPOK: all", low=0.0, high=1.0)
    ema_decay: float = field(
        0.0, "moving average of the adapter, which is the result; 0 = the last policy", "DPOK: none", low=0.0,
        high=0.9999,
    )  # fmt: skip
    lora_rank: int = field(4, "rank of the adapter", "DPOK's code", low=1, high=1024)
    micro_batch: int = field(
        4, "pictures of a rollout, or transitions, in a forward pass; memory and speed only", "ours", low=1
    )
    checkpoint_every: int = field(5, "iterations between checkpoints", "ours", low=1)
    resources: Resources = Resources()

    def n_trained_steps(self, n_steps: int) -> int:
        """How many of `n_steps` denoising steps are trained, at least one."""
        return max(1, round(self.trained_share * n_steps))


def policy_loss(
    new_log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip_range: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-w A clamp(ρ, 1 ± ε) and the ratio ρ, each (M,). It is not PPO's maximum: beyond the band there is no gradient,
    whatever the sign of A.
    """
    ratio = torch.exp(new_log_prob - old_log_prob)
    return -weight * advantage * ratio.clamp(1 - clip_range, 1 + clip_range), ratio


def divergence(
    kind: str,
    eps_hat: torch.Tensor,
    reference: torch.Tensor,
    x_t: torch.Tensor,
    schedule: Schedule,
    step: torch.Tensor,
) -> torch.Tensor:
    """How far a policy's step is from another's, (M,), as a mean over the latent's values.

    "gauss": KL of the two Gaussians, (μ - μ_pre)²/2s² (paper, eq. 8). "eps": (ε̂ - ε̂_pre)², as the code has it, with the
    same weight for every step. The first is the second times half of `model.ddim.step_weight`, .22 in the mean over
    SD's 50 steps.

    Args:
        eps_hat, reference: guided predictions (M, C, H, W).
        step: of each (M,).
    """
    if kind == "eps":
        return (eps_hat - reference).square().mean(dim=(1, 2, 3))
    a, a_prev, std = schedule.alpha_bar[step], schedule.alpha_bar_prev[step], schedule.std[step]
    return gaussian_kl(step_mean(x_t, eps_hat, a, a_prev, std), step_mean(x_t, reference, a, a_prev, std), std)


class Value(nn.Module):
    """V(x_t, c, t): the expected reward of a trajectory that is at x_t.

    Three hidden layers, each multiplied by a learned row of the denoising step, which starts uniform in [0, 1).

    Args:
        n_values: D; text_width: of the text's feature; n_steps: T.
        stream: draws the weights (Xavier's uniform).
    """

    WIDTH, DEPTH = 256, 3

    def __init__(self, n_values: int, text_width: int, n_steps: int, stream: torch.Generator):
        super().__init__()
        widths = [n_values + text_width] + [self.WIDTH] * self.DEPTH
        self.hidden = nn.ModuleList(nn.Linear(before, self.WIDTH) for before in widths[:-1])
        self.last = nn.Linear(self.WIDTH, 1)
        self.rows = nn.Parameter(torch.rand(self.DEPTH, n_steps, self.WIDTH, generator=stream))
        for layer in (*self.hidden, self.last):
            nn.init.xavier_uniform_(layer.weight, generator=stream)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: torch.Tensor, text: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """(M,) of latents (M, C, H, W), text features (M, W) and steps (M,)."""
        h = torch.cat([x_t.flatten(1), text], 1)
        for layer, rows in zip(self.hidden, self.rows, strict=True):
            h = (layer(h) * rows[step]).relu()
        return self.last(h)[:, 0]


def train(
    model: TextToImage,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: DPOKConfig,
    folder: Path,
    seed: int = 0,
    monitor: Monitor | None = None,
    guard: Guard | None = None,
    on_epoch: Callable[[dict[str, float], TextToImage], None] | None = None,
    processes: Processes | None = None,
    name: str = "dpok",
) -> list[dict[str, float]]:
    """Fine-tune `model` in place (it gains a LoRA adapter `name`) and return one row of numbers an iteration.

    Args: as those of `ddpo.train`.

    Returns:
        Rows with the columns of `ddpo.train` but clip_high, clip_low and those of each step; instead clipped (share of
        transitions outside of the band, which have no gradient), reused (share that are of earlier iterations), kl (of
        the kind that is trained) and value_loss.

    Raises: as `ddpo.train`.
    """
    processes = processes or Processes()
    rewards, schedule = Rewards(reward), config.sampler.schedule(model)
    rewards.given["text"].levels(prompts)  # a clip at a level that nobody knows is refused before anything is drawn
    check_policy(schedule, config, processes)
    n_steps = config.n_trained_steps(len(schedule))
    origin = settings_origin(config, MAY_CHANGE)
    origin |= {"model": model_fingerprint(model), "prompts": hash_json([p.text for p in prompts]), "seed": str(seed)}
    origin |= {"rewards": hash_json(rewards.facts)} | config.resources.origin
    texts = text_features(model, [p.text for p in prompts])
    adapter = attach(model, "lora", name, {"rank": config.lora_rank}, generator(seed, "lora"))
    n_values, width = math.prod(model.latent_shape), len(next(iter(texts.values())))
    value = Value(n_values, width, len(schedule), generator(seed, "value")).to(model.device)
    value_optimizer = torch.optim.AdamW(value.parameters(), lr=config.value_learning_rate)
    n_kept = max(config.buffer // len(schedule), config.images_per_epoch)
    replay = Replay(n_kept, 4 * n_kept * (n_values * (len(schedule) + 1) + len(schedule)))
    more: dict[str, Kept] = {"replay": replay, "value": Weights(dict(value.named_parameters()))}
    more["value optimizer"] = Optimizer(value_optimizer)

    def step(epoch: int, optimizer: torch.optim.Optimizer, average: Average) -> dict[str, float]:
        chosen = epoch_prompts(prompts, config.images_per_epoch, seed, epoch)
        made, images, scores, parts = collect(model, chosen, rewards, schedule, config, seed, epoch, processes)
        row = {"epoch": epoch} | rewards.row(chosen, scores, parts)
        row |= processes.share(monitor(images, chosen) if monitor else {})
        row |= {"log_prob": made.log_probs.mean().item()}
        replay.add(made, rewards.clipped(chosen, scores)["text"])
        stream = generator(seed, "update", epoch)
        row |= fit_value(value, value_optimizer, replay, texts, n_steps, config, stream)
        row |= update(model, optimizer, average, value, replay, texts, schedule, config, stream, processes)
        return row | {"pictures": len(chosen), "gradient_steps": config.gradient_steps}

    return fit(model, adapter, step, config, folder, origin, guard, on_epoch, more=more, processes=processes)


@torch.no_grad()
def text_features(model: TextToImage, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the value network reads of each prompt: the text encoder's hidden state at the end mark, (W,)."""
    states = model.encode_text(prompts)
    return {p: state[len(model.token_ids(p)) + 1].clone() for p, state in zip(prompts, states, strict=True)}


def fit_value(
    value: Value,
    optimizer: torch.optim.Optimizer,
    replay: Replay,
    texts: Mapping[str, torch.Tensor],
    n_steps: int,
    config: DPOKConfig,
    stream: torch.Generator,
) -> dict[str, float]:
    """One step of the value network, on the mean squared error to the trajectories' rewards over several batches."""
    losses = []
    for _ in range(config.value_batches):
        image, step = replay.draw(config.value_batch, n_steps, stream)
        error = (_values(value, replay, texts, image, step) - replay.rewards[image].to(value.rows.device)).square()
        loss = error.mean() / config.value_batches
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"value_loss": torch.stack(losses).sum().item()}


def _values(
    value: Value, replay: Replay, texts: Mapping[str, torch.Tensor], image: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    assert replay.trajectories is not None
    made, device = replay.trajectories, value.rows.device
    text = torch.stack([texts[made.prompts[i]] for i in image.tolist()])
    return value(made.latents[step, image].to(device), text.to(device), step.to(device))


def update(
    model: TextToImage,
    optimizer: torch.optim.Optimizer,
    average: Average,
    value: Value,
    replay: Replay,
    texts: Mapping[str, torch.Tensor],
    schedule: Schedule,
    config: DPOKConfig,
    stream: torch.Generator,
    processes: Processes,
) -> dict[str, float]:
    """The policy's gradient steps of an iteration."""
    assert replay.trajectories is not None
    made = replay.trajectories
    n_steps, first_fresh = config.n_trained_steps(len(schedule)), len(replay.rewards) - replay.fresh

    def measure(image: torch.Tensor, step: torch.Tensor) -> Measured:
        with torch.no_grad():
            advantage = replay.rewards[image].to(model.device) - _values(value, replay, texts, image, step)
        measured = transition_loss(model, made, image, step, advantage, schedule, config)
        return *measured, advantage, image >= first_fresh

    draws = (torch.stack(replay.draw(config.batch, n_steps, stream), 1) for _ in range(config.gradient_steps))
    found, norms, ratio_first = gradient_steps(draws, measure, model, optimizer, average, schedule, config, processes)
    loss, ratio, kl, _, fresh, _ = found
    return {
        "ratio_first": ratio_first,
        "clipped": ((ratio - 1).abs() > config.clip_range).double().mean().item(),
        "approx_kl": approx_kl(ratio).item(),
        "reused": (1 - fresh).mean().item(),
        "grad_norm": sum(norms) / len(norms),
        "loss": loss.mean().item(),
        "kl": kl.mean().item(),
    }


def transition_loss(
    model: TextToImage,
    made: Trajectories,
    image: torch.Tensor,
    step: torch.Tensor,
    advantage: torch.Tensor,
    schedule: Schedule,
    config: DPOKConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, ratio and divergence from the model before, each (M,), of transitions (image, step)."""
    prompts = [made.prompts[i] for i in image.tolist()]
    device = model.device
    x_t, x_prev = made.latents[step, image].to(device), made.latents[step + 1, image].to(device)
    old, step = made.log_probs[step, image].to(device), step.to(device)
    t, a, a_prev = schedule.timesteps[step], schedule.alpha_bar[step], schedule.alpha_bar_prev[step]
    eps_hat = model.guided_noise(x_t, t, prompts, config.sampler.guidance)
    mean = step_mean(x_t, eps_hat, a, a_prev, schedule.std[step])
    loss, ratio = policy_loss(
        log_prob(x_prev, mean, schedule.std[step]), old, advantage, config.clip_range, config.reward_weight
    )
    with torch.no_grad(), without(model, next(reversed(model.deltas))):  # what the newest stands on
        before = model.guided_noise(x_t, t, prompts, config.sampler.guidance)
    return loss, ratio, divergence(config.kl, eps_hat, before, x_t, schedule, step)


def tune(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """DPOK as a stage; see `records.Train`. A second reward is a ParameterError."""
    check_job(METHOD, job)
    reward = job.reward.load(model.device, job.photos, settings.resources.offload)
    with working(model.unet):
        return train(
            model, job.prompts, reward, settings, job.folder, job.seed, monitor, job.guard, on_row, processes, job.name
        )


def refuses(reward: str, subject_reward: str, processes: int) -> str:
    """See `records.Method`."""
    if subject_reward:
        return "dpok optimises one reward: leave subject_reward empty, or use ddpo for two objectives."
    return ""


def work(settings: DPOKConfig) -> Work:
    """Rows of rollouts and of the model before; each transition has a gradient."""
    rows = settings.sampler.rows_per_step
    pictures = settings.n_epochs * settings.images_per_epoch
    transitions = settings.n_epochs * settings.gradient_steps * settings.batch
    return Work(
        forward=pictures * settings.sampler.rows + transitions * rows,
        tuned=transitions * rows,
        pictures=pictures,
        graph_rows=rows * min(settings.micro_batch, settings.batch),
    )


METHOD = Method(
    name="dpok",
    label="DPOK",
    stage="tune",
    settings=DPOKConfig,
    train=tune,
    source="Fan et al. 2023, arXiv 2305.16381",
    pocket={
        "n_epochs": (20, "minutes, and as many pictures as DDPO's"),
        "images_per_epoch": (48, "12 for each of 2 activities x 2 kinds of prompt, as DDPO's"),
        "gradient_steps": (4, "as many pairs as DDPO in two epochs"),
        "batch": (120, "transitions, as DDPO's: 24 pictures x 5 steps"),
        "buffer": (480, "the newest iteration's transitions"),
        "sampler.n_steps": (10, "as DDPO's"),
        "sampler.guidance": (2.0, "as DDPO's"),
        "clip_range": (2e-4, "as DDPO's"),
        "learning_rate": (4e-3, "as DDPO's"),
        "max_grad_norm": (1.0, "as DDPO's"),
        "value_learning_rate": (3e-2, "20 steps instead of 2,000; at 1e-2 the baseline takes half of them"),
        "trained_share": (0.8, "as DDPO's"),
        "ema_decay": (0.9, "as DDPO's"),
        "lora_rank": (8, "as DDPO's"),
        "micro_batch": (48, "as DDPO's"),
    },
    refuses=refuses,
    work=work,
)
