"""The reward's own gradient, through the picture and the last denoising steps, instead of a policy gradient.

| method | what is differentiated |
|---|---|
| `draft` | the last K steps (`truncate`); with `n_renoised`, re-noised copies of the last one too (DRaFT-LV) |
| `draft` with `random_truncation` | the steps from a random one on (AlignProp) |
| `refl` | x̂0 of one step, drawn from the last quarter (ReFL) |

DRaFT: Clark et al. 2023, arXiv 2309.17400. AlignProp: Prabhudesai et al. 2023, arXiv 2310.03739. ReFL: Xu et al. 2023,
arXiv 2304.05977.

An epoch draws `images_per_epoch` pictures, differentiates their scores, and takes one step. It needs a scorer with a
gradient (`Scorer.differentiable`), far fewer pictures than DDPO, and finds what the scorer mistakes for better sooner:
the history says how many pictures are above the reward's level, and the monitor and the judge what became of them.

Differs from the papers: all train what `kind` says, by default what the paper trains; ReFL's pre-training term, which
its published code lacks, is the noise loss on class pictures (`prior_weight`); its relu(2 - r) is `clip_at_level` of
the reward, with the level of true pictures instead of 2. DRaFT has no official code: its settings are the paper's.

Shapes: B pictures, T denoising steps, C/H/W latent channels, height, width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ibkit.adapt import attach
from ibkit.data.prompts import Prompt
from ibkit.device import generator, working
from ibkit.errors import TrainingError
from ibkit.fields import field
from ibkit.methods import dreambooth
from ibkit.methods.engine.objectives import Rewards, scorer_reward
from ibkit.methods.engine.photos import add_noise
from ibkit.methods.engine.policy import MAY_CHANGE, epoch_prompts, fit
from ibkit.methods.records import METHODS, Method, Monitor, Work, check_job, delta_of
from ibkit.model.ddim import predict_x0, step_mean
from ibkit.model.sample import Sampler, denoise
from ibkit.model.text_to_image import TextToImage, model_fingerprint, pictures_at_once, to_pictures
from ibkit.runs import hash_json
from ibkit.scorers.base import Scorer
from ibkit.scorers.gradient import has_gradient, without_gradient
from ibkit.train.guard import Guard
from ibkit.train.kept import Average, memory_advice
from ibkit.train.loop import hash_pictures, settings_origin
from ibkit.train.resources import Resources

LAST_QUARTER = 0.25  # of the steps: ReFL draws its step from there (30 to 39 of 40)
FROM_STEP, FROM_STEP_STD = 42 / 50, 5 / 50  # of the step from which AlignProp differentiates, as shares of T


@dataclass(frozen=True)
class DRaFTConfig:
    """Settings; the defaults are DRaFT's for Stable Diffusion's small set of prompts."""

    n_epochs: int = field(2000, "gradient steps", "DRaFT", low=1, high=1_000_000)
    images_per_epoch: int = field(4, "pictures of a gradient step", "DRaFT", low=1, high=1_000_000)
    sampler: Sampler = Sampler()
    truncate: int = field(1, "K, the last denoising steps that are differentiated", "DRaFT: 1 for the money", low=1)
    n_renoised: int = field(0, "re-noised copies of the last step, with K = 1 (DRaFT-LV: 2)", "DRaFT", low=0, high=64)
    random_truncation: bool = field(
        False, "differentiate from a random step on, near 42 of 50, instead of the last K", "AlignProp"
    )
    reward_weight: float = field(1.0, "of the reward's term", "DRaFT", low=0.0)
    prior_weight: float = field(0.0, "of the noise loss on class pictures", "DRaFT: none", low=0.0)
    prior_batch: int = field(4, "class pictures of a gradient step", "ours", low=1, high=4096)
    n_class_images: int = field(200, "class pictures, made by the base model", "DreamBooth", low=1, high=100_000)
    learning_rate: float = field(4e-4, "of AdamW, constant", "DRaFT", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW", "DRaFT is silent", low=0.0, high=1.0)
    weight_decay: float = field(0.1, "of AdamW", "DRaFT", low=0.0, high=1.0)
    max_grad_norm: float = field(1.0, "gradients are clipped to this norm", "DRaFT", low=0.0)
    ema_decay: float = field(
        0.0, "moving average of the weights, which is the result; 0 = the last", "DRaFT: none", low=0.0, high=0.9999
    )
    kind: str = field("lora", "what is trained: a LoRA adapter, or the whole U-Net", "DRaFT", choices=("lora", "unet"))
    lora_rank: int = field(8, "rank of the adapter", "DRaFT", low=1, high=1024)
    micro_batch: int = field(4, "pictures in a forward pass; memory and speed only", "ours", low=1)
    checkpoint_every: int = field(5, "gradient steps between checkpoints", "ours", low=1)
    resources: Resources = Resources()


@dataclass(frozen=True)
class ReFLConfig(DRaFTConfig):
    """Settings; the defaults are those of ReFL's code, with the pre-training term of its paper."""

    n_epochs: int = field(100, "gradient steps", "ReFL's code", low=1, high=1_000_000)
    images_per_epoch: int = field(64, "pictures of a gradient step", "ReFL's code", low=1, high=1_000_000)
    sampler: Sampler = Sampler(40, 1.0, 1.0)
    reward_weight: float = field(1e-3, "of the reward's term", "ReFL's code", low=0.0)
    prior_weight: float = field(1.0, "of the noise loss on class pictures", "ReFL's paper; its code: none", low=0.0)
    learning_rate: float = field(1e-5, "of AdamW, constant", "ReFL's code", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "ReFL's code", low=0.0, high=1.0)
    ema_decay: float = field(0.995, "moving average of the weights, which is the result", "ours: ReFL's code has one",
                             low=0.0, high=0.9999)  # fmt: skip
    kind: str = field("unet", "what is trained: a LoRA adapter, or the whole U-Net", "ReFL", choices=("lora", "unet"))


def last_steps(
    model: TextToImage,
    prompts: Sequence[str],
    streams: Sequence[torch.Generator],
    choice: torch.Generator,
    config: DRaFTConfig,
) -> list[torch.Tensor]:
    """Latents of finished pictures whose last K steps have a gradient; and of `n_renoised` copies (DRaFT-LV): x0 is
    noised to the last step's level again, and that step alone is taken.

    `streams` are each picture's; `choice` draws the step from which AlignProp differentiates, the same for all.
    """
    schedule = config.sampler.schedule(model)
    first = first_step(len(schedule), config, choice)
    walk = denoise(model, prompts, schedule, config.sampler.guidance, streams)
    for i in range(len(schedule)):
        with torch.set_grad_enabled(i >= first):
            x = next(walk).x_prev
    found = [x]
    for _ in range(config.n_renoised):
        noise = torch.stack([torch.randn(model.latent_shape, generator=s) for s in streams]).to(x)
        x_t = add_noise(x.detach(), noise, schedule.alpha_bar[-1].expand(len(x)))
        t = schedule.timesteps[-1].expand(len(x))
        eps_hat = model.guided_noise(x_t, t, prompts, config.sampler.guidance)
        found.append(step_mean(x_t, eps_hat, schedule.alpha_bar[-1], schedule.alpha_bar_prev[-1], schedule.std[-1]))
    return found


def first_step(n_steps: int, config: DRaFTConfig, choice: torch.Generator) -> int:
    """The first denoising step with a gradient: T - K, or AlignProp's normal draw, cut to the steps there are."""
    if not config.random_truncation:
        return max(0, n_steps - config.truncate)
    drawn = n_steps * (FROM_STEP + FROM_STEP_STD * torch.randn((), generator=choice).item())
    return min(max(round(drawn), 1), n_steps - 1)


def one_shot(
    model: TextToImage,
    prompts: Sequence[str],
    streams: Sequence[torch.Generator],
    choice: torch.Generator,
    config: DRaFTConfig,
) -> list[torch.Tensor]:
    """x̂0 of one step of the last quarter, which alone has a gradient (ReFL, algorithm 1); the steps before are
    sampled, those behind it are not taken.
    """
    schedule = config.sampler.schedule(model)
    n = len(schedule)
    n_last = max(1, round(LAST_QUARTER * n))
    at = n - n_last + int(torch.randint(n_last, (), generator=choice))
    walk = denoise(model, prompts, schedule, config.sampler.guidance, streams)
    with torch.no_grad():
        for _ in range(at):
            next(walk)
    step = next(walk)
    return [predict_x0(step.x_t, step.eps_hat, schedule.alpha_bar[at])]


def train(
    model: TextToImage,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: DRaFTConfig,
    folder: Path,
    seed: int = 0,
    draw: Callable[..., list[torch.Tensor]] = last_steps,
    class_prompt: str = "",
    class_pictures: Sequence[Image.Image] = (),
    clip_at_level: bool = False,
    monitor: Monitor | None = None,
    guard: Guard | None = None,
    on_epoch: Callable[[dict[str, float], TextToImage], None] | None = None,
    name: str = "draft",
) -> list[dict[str, float]]:
    """Fine-tune `model` in place (it gains a delta `name`) and return one row of numbers a gradient step.

    Args:
        scorer: the reward, which must offer `differentiable`.
        draw: latents with a gradient: `last_steps` or `one_shot`.
        class_prompt, class_pictures: of the noise loss; none with prior_weight 0.
        clip_at_level: no picture is pulled beyond the mean score of true pictures (ReFL's relu).
        The others as in `ddpo.train`.

    Returns:
        Rows with epoch, reward and its companions as `Rewards.row` has them, the monitor's and the guard's numbers,
        loss, loss_prior, grad_norm, pictures, gradient_steps, seconds.

    Raises:
        ParameterError: a scorer without a gradient, or a clip at a level that is not known.
        TrainingError: a score, loss or gradient that is not finite, or memory does not suffice.
        ArtifactError: the checkpoints in `folder` are of another training.
    """
    rewards = Rewards(scorer_reward(scorer, (), clip_at_level))
    objective = rewards.given["text"]
    objective.levels(prompts)  # refused before anything is drawn
    scorer.differentiable(torch.zeros(1, 3, model.image_px, model.image_px), [prompts[0].clean])
    origin = settings_origin(config, MAY_CHANGE)
    origin |= {"model": model_fingerprint(model), "prompts": hash_json([p.text for p in prompts]), "seed": str(seed)}
    origin |= {"rewards": hash_json({scorer.evaluator: clip_at_level}), "class pictures": hash_pictures(class_pictures)}
    origin |= config.resources.origin
    prior_latents = model.encode_images(class_pictures) if config.prior_weight else None
    weights = attach(model, config.kind, name, delta_of(config)[1], generator(seed, config.kind))

    def step(epoch: int, optimizer: torch.optim.Optimizer, average: Average) -> dict[str, float]:
        chosen = epoch_prompts(prompts, config.images_per_epoch, seed, epoch)
        levels = objective.levels(chosen) if clip_at_level else torch.full((len(chosen),), torch.inf)
        pictures: list[Image.Image] = []
        scores, losses = [], []
        with memory_advice(f"lower micro_batch (now {config.micro_batch}) or set resources.checkpointing"):
            for part in torch.arange(len(chosen)).split(config.micro_batch):
                asked, members = [chosen[i] for i in part], part.tolist()
                streams = [generator(seed, "rollout", epoch, i) for i in members]
                drawn = draw(model, [p.text for p in asked], streams, generator(seed, "truncate", epoch), config)
                for i, latents in enumerate(drawn):
                    end = latents.detach().requires_grad_()
                    for few in torch.arange(len(part)).split(pictures_at_once(model.image_px)):
                        pixels = model.decode_pixels(end[few])  # whose graph takes more than the U-Net's
                        found = scorer.differentiable((pixels + 1) / 2, [asked[k].clean for k in few])
                        short = torch.minimum(found, levels[part[few]].to(found.device))
                        loss = -short.sum() / (len(drawn) * len(chosen))
                        (config.reward_weight * loss).backward()
                        losses.append(loss.detach().cpu())
                        if i == 0:
                            pictures += to_pictures(pixels)
                            scores.append(found.detach().cpu())
                    latents.backward(end.grad)
            row = {"epoch": epoch} | rewards.row(chosen, torch.cat(scores)[None])
            prior = _prior_loss(model, class_prompt, prior_latents, config, generator(seed, "prior", epoch))
            if prior is not None:
                (config.prior_weight * prior).backward()
                row["loss_prior"] = prior.item()
        row["loss"] = torch.stack(losses).sum().item()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"epoch {epoch}: the gradient is not finite (reward {row['reward']:.3g}): lower the learning rate."
            )
        row |= monitor(pictures, chosen) if monitor else {}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.follow(at_most=(epoch + 1) / (epoch + 11))  # the first weights are soon forgotten
        return row | {"grad_norm": norm.item(), "pictures": len(chosen), "gradient_steps": 1}

    return fit(model, weights, step, config, folder, origin, guard, on_epoch, fused=True)


def _prior_loss(
    model: TextToImage, prompt: str, latents: torch.Tensor | None, config: DRaFTConfig, stream: torch.Generator
) -> torch.Tensor | None:
    """The noise loss on a batch of class pictures, a scalar; None without any."""
    if latents is None:
        return None
    z_0 = latents[torch.randint(len(latents), (config.prior_batch,), generator=stream)]
    alphas = model.alphas_cumprod.float()
    t = torch.randint(len(alphas), (len(z_0),), generator=stream)
    noise = torch.randn(z_0.shape, generator=stream).to(model.device)
    z_t = add_noise(z_0, noise, alphas[t].to(model.device))
    return (model.predict_noise(z_t, t.to(model.device), [prompt] * len(z_0)) - noise).square().mean()


def _tune(name: str, draw: Callable[..., list[torch.Tensor]]):
    def tune(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
        """As a stage; see `records.Train`. What `refuses` names is a ParameterError."""
        check_job(METHODS[name], job, processes)
        scorer = job.reward.scorer(model.device)
        with working(model.unet, model.vae):
            return train(
                model, job.prompts, scorer, settings, job.folder, job.seed, draw, job.subject.class_prompt,
                job.class_pictures, job.reward.clip_at_level, monitor, job.guard, on_row, job.name,
            )  # fmt: skip

    return tune


def refuses(reward: str, subject_reward: str, processes: int) -> str:
    """See `records.Method`."""
    if subject_reward:
        return "A reward's gradient is that of one reward: leave subject_reward empty, or use ddpo for two objectives."
    if processes > 1:
        return "A reward's gradient is followed by one process: leave processes at 1."
    return "" if has_gradient(reward) else without_gradient(reward)


def _work(settings: DRaFTConfig, n_forward: float, n_trained: int) -> Work:
    """Of so many steps of a picture without and with gradient."""
    rows, pictures = settings.sampler.rows_per_step, settings.n_epochs * settings.images_per_epoch
    prior = settings.n_epochs * settings.prior_batch if settings.prior_weight else 0
    return Work.of(
        settings.kind,
        pictures * n_trained * rows + prior,
        forward=round(pictures * n_forward * rows),
        pictures=2 * pictures,  # decoded and scored, forth and back
        graph_rows=n_trained * rows * min(settings.micro_batch, settings.images_per_epoch),
        graph_pictures=True,
    )


def draft_work(settings: DRaFTConfig) -> Work:
    n = settings.sampler.n_steps
    trained = round((1 - FROM_STEP) * n) if settings.random_truncation else min(settings.truncate, n)
    return _work(settings, n - trained, max(1, trained) + settings.n_renoised)


POCKET = {
    "images_per_epoch": (48, "12 for each of 2 activities x 2 kinds of prompt, as DDPO's epoch"),
    "sampler.n_steps": (10, "as DDPO's"),
    "sampler.guidance": (2.0, "as DDPO's"),
    "learning_rate": (2e-3, "minutes instead of hours"),
    "lora_rank": (8, "as DDPO's"),
    "micro_batch": (48, "as DDPO's"),
    "n_class_images": (64, "minutes"),
}
DRAFT = Method(
    name="draft",
    label="DRaFT",
    stage="tune",
    settings=DRaFTConfig,
    train=_tune("draft", last_steps),
    source="Clark et al. 2023, arXiv 2309.17400",
    pocket=POCKET | {"n_epochs": (8, "the reward is passed and the pictures fall apart after 10: benchmarks/arms.py")},
    class_pictures=dreambooth.class_pictures,
    refuses=refuses,
    work=draft_work,
)
REFL = Method(
    name="refl",
    label="ReFL",
    stage="tune",
    settings=ReFLConfig,
    train=_tune("refl", one_shot),
    source="Xu et al. 2023, arXiv 2304.05977",
    pocket=POCKET
    | {
        "n_epochs": (20, "as many pictures as DDPO's"),
        "sampler.guidance": (1.0, "as the paper's"),
        "reward_weight": (0.03, "a noise loss of .1 beside rewards of 1"),
        "ema_decay": (0.9, "20 steps"),
        "kind": ("lora", "as the other methods there"),
    },
    class_pictures=dreambooth.class_pictures,
    refuses=refuses,
    work=lambda settings: _work(settings, (1 - LAST_QUARTER / 2) * settings.sampler.n_steps, 1),
)
