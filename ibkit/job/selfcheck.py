"""`ibkit check rl`: is the policy gradient right on this machine, with these libraries?

Each check recomputes a quantity of the RL stage in another way and compares. They run on the pocket model with an
adapter whose weights are not zero, because an untrained one hides errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ibkit.adapt import attach
from ibkit.data.prompts import make_prompt, training_prompts
from ibkit.device import generator, pick_device
from ibkit.errors import IbkitError
from ibkit.methods.ddpo import DDPOConfig, pair_loss, policy_loss
from ibkit.methods.engine.advantages import PromptStats
from ibkit.methods.engine.rollout import Trajectories, rollout
from ibkit.model.ddim import Schedule, log_prob, step_mean
from ibkit.model.loading import load_model
from ibkit.model.text_to_image import TextToImage
from ibkit.presets import POCKET, PRESETS

ADAPTER_STD = 0.02  # moves the policy by much more than rounding, and leaves it a policy
N_IMAGES = 4


@dataclass(frozen=True)
class Check:
    """One comparison: what was measured, what is allowed, and whether it holds (`measured` < `allowed`, so never for
    NaN, which stands for a check that could not be made); `hint` says what to suspect where it does not.
    """

    name: str
    measured: float
    allowed: float
    hint: str

    @property
    def ok(self) -> bool:
        return self.measured < self.allowed


class Subject:
    """The policy under test: a model with a trained-looking adapter, and trajectories that it made when first asked."""

    def __init__(self, model: TextToImage, config: DDPOConfig):
        self.model, self.config = model, config
        adapter = attach(model, "lora", "ddpo", {"rank": config.lora_rank}, generator(0, "selfcheck lora"))
        self.trainable = list(adapter.values())
        with torch.no_grad():
            for i, p in enumerate(self.trainable):
                p.add_(ADAPTER_STD * torch.randn(p.shape, generator=generator(0, "selfcheck adapter", i)).to(p.device))
        prompts = training_prompts(["playing soccer", "dancing"], "cat", "sks")
        self.texts = [prompts[i % len(prompts)].text for i in range(N_IMAGES)]

    @cached_property
    def schedule(self) -> Schedule:
        return self.config.sampler.schedule(self.model)

    @cached_property
    def trajectories(self) -> Trajectories:
        return self.roll(self.config.sampler.guidance)

    @cached_property
    def pairs(self) -> torch.Tensor:
        """All (image, step), (N_IMAGES T, 2)."""
        steps = torch.arange(len(self.schedule))
        return torch.cartesian_prod(torch.arange(N_IMAGES), steps).to(self.model.device)

    def roll(self, guidance: float) -> Trajectories:
        streams = [generator(0, "selfcheck", i) for i in range(N_IMAGES)]
        return rollout(self.model, self.texts, self.schedule, guidance, streams)

    def ratios(self, trajectories: Trajectories) -> torch.Tensor:
        """Ratio of every (image, step) pair under the present adapter."""
        with torch.no_grad():
            return torch.cat([self.loss(part, trajectories)[1] for part in self.pairs.split(self.config.micro_batch)])

    def loss(self, pairs: torch.Tensor, trajectories: Trajectories) -> tuple[torch.Tensor, ...]:
        image, step = pairs.unbind(1)
        advantages = torch.linspace(-1.0, 2.0, N_IMAGES, device=self.model.device)
        return pair_loss(self.model, trajectories, image, step, advantages[image], self.schedule, self.config)


def ratio_before_the_first_update(subject: Subject) -> float:
    return (subject.ratios(subject.trajectories) - 1).abs().max().item()


def stored_log_probs_at_the_same_batch_shape(subject: Subject) -> float:
    trajectories, schedule = subject.trajectories, subject.schedule
    differences = []
    with torch.no_grad():
        for i in range(len(schedule)):
            x_t, t = trajectories.latents[i], schedule.timesteps[i].expand(N_IMAGES)
            eps_hat = subject.model.guided_noise(x_t, t, trajectories.prompts, subject.config.sampler.guidance)
            mean = step_mean(x_t, eps_hat, schedule.alpha_bar[i], schedule.alpha_bar_prev[i], schedule.std[i])
            again = log_prob(trajectories.latents[i + 1], mean, schedule.std[i])
            differences.append(again - trajectories.log_probs[i])
    return torch.stack(differences).abs().max().item()  # torch's maximum of NaN is NaN, Python's need not be


def log_prob_against_torch(subject: Subject) -> float:
    stream = generator(0, "selfcheck normal")
    mean, noise = torch.randn(2, 64, *subject.model.latent_shape, generator=stream).unbind(0)
    std = torch.linspace(0.02, 1.0, 64)  # the range of a schedule's deviations
    wide = std.view(-1, 1, 1, 1)
    x = mean + wide * noise
    expected = torch.distributions.Normal(mean.double(), wide.double()).log_prob(x.double()).mean((1, 2, 3))
    ours = log_prob(x.double(), mean.double(), std.double())
    return ((ours - expected) / expected.abs().clamp(min=1)).abs().max().item()


def smallest_standard_deviation(subject: Subject) -> float:
    """1 for a step whose deviation is not finite and positive, over the schedules of all presets; else 0."""
    bad = 0.0
    for preset in PRESETS.values():
        std = preset.settings("ddpo").sampler.schedule(subject.model).std
        bad = max(bad, float((~(torch.isfinite(std) & (std > 0))).any()))
    return bad


def reinforce_on_a_gaussian(subject: Subject) -> float:
    """∇ of the loss at ratio 1 against REINFORCE's -mean(A (x - θ) / s²), for x ~ N(θ, s²) and reward -(x - 3)²."""
    stream = generator(0, "selfcheck toy")
    theta, std = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    x = (theta.detach() + std * torch.randn(4096, 1, 1, 1, generator=stream).double()).detach()
    rewards = -((x.flatten() - 3) ** 2)
    advantages = (rewards - rewards.mean()) / rewards.std(unbiased=False)
    new = log_prob(x, theta.expand_as(x), std)
    loss, _ = policy_loss(new, new.detach(), advantages, subject.config.clip_range)
    loss.mean().backward()
    analytic = -(advantages * (x.flatten() - theta.detach()) / std**2).mean()
    return ((theta.grad - analytic) / analytic).abs().item()


def guidance_of_training_and_sampling(subject: Subject) -> float:
    """1 when a rollout with another guidance than the training's goes unnoticed by the ratio; else 0."""
    other = subject.ratios(subject.roll(subject.config.sampler.guidance + 1.0))
    noticed = (other - 1).abs().max() >= 10 * subject.config.clip_range  # NaN is no notice
    return float(not noticed)


def accumulated_gradient(subject: Subject) -> float:
    """Relative difference of the gradients of one pass over all pairs and of many small ones."""
    gradients = []
    for size in (len(subject.pairs), 7):
        for parameter in subject.trainable:
            parameter.grad = None
        for part in subject.pairs.split(size):
            loss, *_ = subject.loss(part, subject.trajectories)
            (loss.sum() / len(subject.pairs)).backward()
        gradients.append(torch.cat([p.grad.double().flatten() for p in subject.trainable]))
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


def prompt_statistics(subject: Subject) -> float:
    """Both kinds of prompts, one of constant reward, and one that was seen once, by hand."""
    named, plain, other = make_prompt("", "cat", "sks"), make_prompt("", "cat"), make_prompt("", "dog")
    prompts = [named, named, plain, plain, other]
    rewards = torch.tensor([1.0, 3.0, 7.0, 7.0, 6.0])
    advantages = PromptStats(buffer_size=8, min_count=2).advantages(prompts, rewards).double()
    once = -(2**0.5)  # of 7, 7 and 6, the prompts of its kind
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, once], dtype=torch.float64)
    return (advantages - expected).abs().max().item()


# name, measure, allowed, what to suspect
CHECKS: tuple[tuple[str, Callable[[Subject], float], float, str], ...] = (
    (
        "|ratio - 1| before the first update",
        ratio_before_the_first_update,
        1e-6,
        "rollout and training compute different probabilities: kernels, precision or attention differ between them",
    ),
    (
        "stored log-prob, scored again in the same batch shape",
        stored_log_probs_at_the_same_batch_shape,
        torch.finfo(torch.float32).tiny,
        "the network is not deterministic on this device",
    ),
    (
        "log-prob against torch.distributions.Normal, fp64",
        log_prob_against_torch,
        1e-12,
        "the Gaussian of a denoising step is computed wrongly",
    ),
    (
        "steps whose deviation is not finite and > 0",
        smallest_standard_deviation,
        0.5,
        "a scheduler setting (steps_offset) puts a step at t = 0",
    ),
    (
        "policy gradient against REINFORCE, relative",
        reinforce_on_a_gaussian,
        1e-5,
        "the loss or its clipping is wrong",
    ),
    (
        "another guidance in sampling goes unnoticed",
        guidance_of_training_and_sampling,
        0.5,
        "guidance does not enter the ratio",
    ),
    (
        "accumulated gradient against the whole batch, relative",
        accumulated_gradient,
        1e-4,
        "micro-batches are weighted wrongly",
    ),
    (
        "advantages of prompts by hand",
        prompt_statistics,
        1e-5,
        "per-prompt statistics are mixed up",
    ),
)


def run_checks(model: TextToImage | None = None) -> list[Check]:
    """Run all checks, on the pocket model unless another one is given; it gains an adapter."""
    if model is None:
        model = load_model("pocket", device=pick_device("auto"))
    config = POCKET.settings("ddpo", {"trained_share": 1.0})
    subject = Subject(model, config)
    return [_made(subject, *check) for check in CHECKS]


def _made(subject: Subject, name: str, measure: Callable[[Subject], float], allowed: float, hint: str) -> Check:
    """A check, made; one that an error ends has failed, with the error's sentence for its hint."""
    try:
        return Check(name, measure(subject), allowed, hint)
    except IbkitError as error:
        return Check(name, math.nan, allowed, str(error))
