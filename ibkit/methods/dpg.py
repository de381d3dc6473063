"""DPG: personalization as a deterministic policy gradient (Wei et al. 2024, arXiv 2407.06642).

| here | paper and code (wfanyue/DPG-T2I-Personalization) |
|---|---|
| action | ε̂ = ε_θ(x_t, t, c) in state (x_t, t, c) |
| `residual` | (x_0 - x̂0)², "look forward": what the picture would become if denoising ended here |
| `Critic` | Q_φ, a learned cost, which the policy descends |
| `Settings.discount` | γ, by the timestep of the photo |

    L = λ_pr ‖ε' - ε̂'‖² + γ^t Q_φ((x_0 - x̂0)²)          look_forward: the photo's half has no noise loss of its own
    L = ‖ε - ε̂‖² + λ_pr ‖ε' - ε̂'‖² + λ_Q Q_φ((x_0 - x̂0)²)    scorer: Q learns 1 - score of the decoded x̂0

Straight after each update, Q takes a step towards the cost it stands for: the mean of the residual, or of the scorer,
which needs no gradient of its own. `critic = "none"` puts the mean itself in Q's place: as Q only has to learn a mean,
this arm says what a learned critic is for.

Differs from the code: it trains the text encoder too, here U-Net weights or a LoRA are trained alone; Q and residuals
are fp32; γ^t is each photo's own, not the batch's first; photos are cropped at the centre. The Bellman form of Q that
the paper writes is in no code, and not here.

Shapes: B photos, C/H/W latent channels, height, width.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from ibkit.adapt import attach, freeze
from ibkit.device import generator
from ibkit.errors import ParameterError, TrainingError
from ibkit.fields import field
from ibkit.methods import dreambooth
from ibkit.methods.dreambooth import MAY_CHANGE, DreamBoothConfig
from ibkit.methods.engine.photos import Examples, Shown, fit
from ibkit.methods.records import Method, Work, delta_of
from ibkit.model.ddim import predict_x0
from ibkit.model.text_to_image import model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.kept import Weights
from ibkit.train.loop import hash_pictures, settings_origin

COSTS = ("look_forward", "scorer")
CRITICS = ("learned", "none")


@dataclass(frozen=True)
class DPGConfig(DreamBoothConfig):
    """Settings; the defaults are those of the authors' code, or of the paper's DINO variant, which has none."""

    n_steps: int = field(1000, "training steps", "DPG's code", low=1, high=1_000_000)
    learning_rate: float = field(1e-6, "of AdamW, constant", "DPG's code", low=0.0, high=1.0)
    betas: tuple[float, float] = field((0.9, 0.999), "of AdamW", "DPG's code", low=0.0, high=1.0)
    n_class_images: int = field(8, "class pictures for the prior term", "DPG's code", low=1, high=100_000)
    cost: str = field("look_forward", "what Q stands for: the residual, or 1 - a scorer's score of the decoded x̂0",
                      "DPG", choices=COSTS)  # fmt: skip
    critic: str = field("learned", "Q, or none: the mean of the residual in its place", "DPG", choices=CRITICS)
    discount: float = field(0.9986, "γ of γ^t, which trusts late steps more; 1 = none", "DPG's code", low=0.0, high=1.0)
    critic_weight: float = field(1.0, "λ_Q of the scorer's cost", "DPG: 0.1 or 1", low=0.0, high=1e6)
    critic_learning_rate: float = field(0.01, "of Q's SGD", "DPG's code", low=0.0, high=10.0)
    kind: str = field("unet", "what is trained: the whole U-Net, or a LoRA adapter", "DPG, which trains the text "
                      "encoder too", choices=("unet", "lora"))  # fmt: skip
    lora_rank: int = field(4, "rank of the adapter", "as lora_dreambooth", low=1, high=1024)


def residual(eps_hat: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """(x_0 - x̂0)² = (1/ᾱ - 1)(ε - ε̂)², (B, C, H, W), with ᾱ_t of each photo (B,): it weighs noisy steps up to 214
    times (t = 999).
    """
    return (1 / alpha_bar - 1).view(-1, 1, 1, 1) * (noise - eps_hat).square()


class Critic(nn.Module):
    """Q_φ: residual (B, C, H, W) -> cost (B,).

    All weights and biases start uniform and positive, so that Q starts to increase in every residual; with a usual
    start its first gradients may push the policy away from the photo. The convolution's bound is the code's 1/9 at its
    4 channels, and less with more, so that Q starts as near to the mean of the residual at any number.
    """

    WIDTH = 64

    def __init__(self, channels: int, height: int, width: int, stream: torch.Generator):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)
        self.hidden, self.last = nn.Linear(height * width, self.WIDTH), nn.Linear(self.WIDTH, 1)
        for layer, bound in (
            (self.conv, 4 / (9 * channels)),
            (self.hidden, 1 / (height * width)),
            (self.last, 1 / self.WIDTH),
        ):
            for parameter in layer.parameters():
                parameter.data.uniform_(0, bound, generator=stream)

    def forward(self, of: torch.Tensor) -> torch.Tensor:
        h = nn.functional.leaky_relu(self.conv(of), 0.01).flatten(1)
        return self.last(self.hidden(h).relu())[:, 0]


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """See `records.Train`.

    The history has step, loss, loss_prior, cost (the mean that Q stands for), critic (Q's mean, where it is learned),
    critic_loss and seconds.

    Raises:
        ParameterError: the scorer's cost without a critic, which would need the scorer's gradient.
        TrainingError, ArtifactError: a critic's cost that is not finite; see `engine.photos.fit`.
    """
    if settings.cost == "scorer" and settings.critic == "none":
        raise ParameterError("dpg: a scorer's cost is learned by the critic: leave critic at 'learned'.")
    latents, device = model.encode_images(job.photos), model.device
    with_prior = settings.prior_weight > 0
    prior = model.encode_images(job.class_pictures) if with_prior else None
    prompts = [job.subject.instance_prompt] * settings.batch
    prompts += [job.subject.class_prompt] * settings.batch * with_prior
    origin = settings_origin(settings, MAY_CHANGE) | {"model": model_fingerprint(model), "seed": str(job.seed)}
    origin |= {"prompts": hash_json(sorted(set(prompts))), "photos": hash_pictures(job.photos)}
    origin["class pictures"] = hash_pictures(job.class_pictures if with_prior else [])
    score = job.reward.load(device, job.photos) if settings.cost == "scorer" else None
    weights = attach(model, settings.kind, job.name, delta_of(settings)[1], generator(job.seed, job.name))
    alphas = model.alphas_cumprod.float().to(device)
    channels, height, width = model.latent_shape
    critic = Critic(channels, height, width, generator(job.seed, "critic")).to(device)
    optimizer = torch.optim.SGD(critic.parameters(), lr=settings.critic_learning_rate)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # residuals of the step and their costs, for Q

    def draw(stream: torch.Generator) -> Examples:
        z_0 = latents[torch.randint(len(latents), (settings.batch,), generator=stream)]
        if prior is not None:
            z_0 = torch.cat([z_0, prior[torch.randint(len(prior), (settings.batch,), generator=stream)]])
        return Examples(z_0, prompts)

    def cost_of(eps_hat: torch.Tensor, of: torch.Tensor, examples: Examples) -> torch.Tensor:
        """What Q is to learn, (B,), without gradient."""
        if score is None:
            return of.detach().mean(dim=(1, 2, 3))
        assert examples.z_t is not None and examples.t is not None
        n = len(of)
        x_0 = predict_x0(examples.z_t[:n], eps_hat[:n].detach(), alphas[examples.t[:n]])
        asked = [job.subject.prompt("")] * n
        return 1 - score(model.decode(x_0), asked)[0].to(device)

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        assert examples.t is not None
        n = len(eps_hat) // 2 if with_prior else len(eps_hat)
        t = examples.t[:n]
        of = residual(eps_hat[:n], noise[:n], alphas[t])
        cost = cost_of(eps_hat, of, examples)
        seen.append((of.detach(), cost))
        if settings.critic == "learned":
            critic.requires_grad_(False)  # the policy descends Q, and does not move it
            judged = critic(of)
            critic.requires_grad_(True)
        else:
            judged = of.mean(dim=(1, 2, 3))
        if not bool(torch.isfinite(judged).all()):
            raise TrainingError(
                "dpg: the critic's cost is not finite: its own steps are too large, so lower critic_learning_rate "
                f"({settings.critic_learning_rate:g})."
            )
        terms = {"cost": cost.mean(), "critic": judged.mean()}
        if score is None:
            whole = (settings.discount ** t.float() * judged).mean()
        else:
            whole = (eps_hat[:n] - noise[:n]).square().mean() + settings.critic_weight * judged.mean()
        if with_prior:
            terms["loss_prior"] = (eps_hat[n:] - noise[n:]).square().mean()
            whole = whole + settings.prior_weight * terms["loss_prior"]
        return {"loss": whole, **terms}

    def after(number: int, result: Shown) -> dict[str, float]:
        of, cost = (torch.cat(each) for each in zip(*seen, strict=True))
        seen.clear()
        if settings.critic == "none":
            return {}
        error = (critic(of) - cost).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"critic_loss": error.item()}

    history = fit(
        model, weights, draw, loss, settings, job.folder, origin, (job.seed, "dpg"),
        on_step=lambda row: on_row(row, model) if on_row else None,
        more={"critic": Weights(dict(critic.named_parameters()))}, after=after,
    )  # fmt: skip
    freeze(model)
    return history


def work(settings: DPGConfig) -> Work:
    """Rows as DreamBooth's; with a scorer, every x̂0 is decoded and scored."""
    pictures = settings.n_steps * settings.batch if settings.cost == "scorer" else 0
    return replace(dreambooth.work(settings), pictures=pictures)


METHOD = Method(
    name="dpg",
    label="DPG",
    stage="personalize",
    settings=DPGConfig,
    train=personalize,
    source="Wei et al. 2024, arXiv 2407.06642",
    pocket={
        "n_steps": (1400, "as lora_dreambooth"),
        "batch": (4, "as lora_dreambooth"),
        "learning_rate": (4e-3, "as lora_dreambooth"),
        "prior_weight": (0.3, "as lora_dreambooth"),
        "ema_decay": (0.98, "as lora_dreambooth"),
        "n_class_images": (64, "as lora_dreambooth"),
        "critic_learning_rate": (1e-3, "at 0.01 same subject 2 % after 1,000 steps, so 48 % after 400"),
        "kind": ("lora", "as the pocket's DreamBooth"),
        "lora_rank": (16, "as lora_dreambooth"),
    },
    class_pictures=dreambooth.class_pictures,
    reward="dino",
    work=work,
)
