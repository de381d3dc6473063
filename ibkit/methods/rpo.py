"""RPO: reward preference optimization with the λ-harmonic reward (Miao et al. 2024, arXiv 2407.12164).

| here | paper and code (andrew-miao/RPO) |
|---|---|
| `harmonic` | r = 1 / (λ/I + (1 - λ)/T), subject and text fidelity, both in [0, 1] |
| `preference_loss` | k = (ℓ_pre^ref - ℓ_θ^ref) - (ℓ_pre^gen - ℓ_θ^gen), and -[y log σ(βk) + (1 - y) log σ(-βk)] |
| label y | ~ Bernoulli(σ(r_ref - r_gen)) (Bradley-Terry), drawn anew at every visit, r at λ_train |
| early stopping | every `validate_every` steps the training prompts' pictures, r at λ_val; the best is the result |

A step has a photo under the instance prompt and a picture that the model before drew for a training prompt (the
"negative"), each with its own t and ε; the loss is ℓ_θ^ref plus the preference. There is no prior term. Without the
preference (`preference_weight = 0`) a step has the photo alone, and no negatives are drawn.

Differs from the code, whose faults these are: photo, prompt and negative are drawn independently, and a label uses the
reward of the picture that is shown; the text score reads the prompt without the identifier; the weights before the
first step are validated too, always on the same noise, and `patience` validations without gain end the training. The
rewards of two pictures are so close that labels are almost fair coins (`pr`, the mean probability that the photo wins);
`temperature` below 1 sharpens them.

Shapes: B pairs, C/H/W latent channels, height, width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as plain_field

import torch
from PIL import Image

from ibkit.adapt import attach, freeze, without
from ibkit.data.prompts import Prompt
from ibkit.device import generator
from ibkit.errors import ParameterError
from ibkit.fields import field
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.photos import MAY_CHANGE, Examples, PhotoConfig, Shown, fit
from ibkit.methods.records import Method, Work, delta_of
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import model_fingerprint
from ibkit.runs import hash_json
from ibkit.scorers.base import Scorer
from ibkit.train.kept import Copy, Facts
from ibkit.train.loop import hash_pictures, settings_origin

MEANS = ("harmonic", "arithmetic")
PARTS = ("align_i", "align_t")  # of a score, what it is made of: subject and text


@dataclass(frozen=True)
class RPOConfig(PhotoConfig):
    """Settings; the defaults are those of the authors' code."""

    n_steps: int = field(400, "training steps, at most", "RPO's code", low=1, high=1_000_000)
    batch: int = field(1, "photos in a step, and as many negatives", "RPO's code", low=1, high=1024)
    learning_rate: float = field(5e-6, "of AdamW, constant", "RPO's code", low=0.0, high=1.0)
    max_grad_norm: float = field(1.0, "gradients are clipped to this norm; 0 = not", "RPO's code", low=0.0)
    n_negatives: int = field(
        16, "pictures that the model before draws of each prompt", "RPO's code", low=1, high=10_000
    )
    similarity_weight: float = field(1.0, "of the photo's noise loss", "RPO", low=0.0)
    preference_weight: float = field(1.0, "of the preference loss; 0 = pure similarity", "RPO", low=0.0)
    beta: float = field(1.0, "β of the preference loss", "RPO's code", low=0.0)
    lambda_train: float = field(0.0, "λ of the labels: 0 asks for the text alone, 1 for the subject", "RPO's code",
                                low=0.0, high=1.0)  # fmt: skip
    lambda_val: float = field(0.3, "λ of the validation", "RPO's code; its README: 0.5", low=0.0, high=1.0)
    mean: str = field("harmonic", "of subject and text in the reward", "RPO", choices=MEANS)
    temperature: float = field(1.0, "that the difference of rewards is divided by for a label", "RPO: 1", low=1e-6)
    validate_every: int = field(40, "steps between validations", "RPO's code", low=1)
    n_validation: int = field(4, "pictures of each prompt in a validation", "RPO's code", low=1, high=10_000)
    early_stopping: bool = field(True, "keep the best of the validated weights, and stop; else the last", "RPO")
    patience: int = field(3, "validations without gain that end the training; 0 = none", "ours; RPO's code: 0", low=0)
    sampler: Sampler = Sampler()
    kind: str = field("unet", "what is trained: the whole U-Net, or a LoRA adapter", "RPO", choices=("unet", "lora"))
    lora_rank: int = field(4, "rank of the adapter", "as lora_dreambooth", low=1, high=1024)


def harmonic(subject: torch.Tensor, text: torch.Tensor, weight: float, mean: str = "harmonic") -> torch.Tensor:
    """RPO's reward of I and T in [0, 1]; λ (`weight`) of 1 or 0 is I or T alone."""
    if mean == "arithmetic" or weight in (0.0, 1.0):
        return weight * subject + (1 - weight) * text
    return 1 / (weight / (subject + 1e-8) + (1 - weight) / (text + 1e-8))


def preference_loss(
    error: torch.Tensor, error_before: torch.Tensor, label: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-[y log σ(βk) + (1 - y) log σ(-βk)] and k, each (B,).

    Args:
        error, error_before: ℓ of θ and of the model before, (2B,): the photos', then the negatives'.
        label: y (B,), 1 where the photo is preferred.
    """
    gained_photo, gained_negative = (error_before - error).chunk(2)
    k = gained_photo - gained_negative
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(label * log_sigmoid(beta * k) + (1 - label) * log_sigmoid(-beta * k)), k


@dataclass
class Validations:
    """Rewards of all validations so far."""

    rewards: list[float] = plain_field(default_factory=list)

    def add(self, reward: float) -> bool:
        """Whether it is better than all before."""
        self.rewards.append(reward)
        return reward > max(self.rewards[:-1], default=float("-inf"))

    @property
    def without_gain(self) -> int:
        """Validations behind the best one."""
        return len(self.rewards) - 1 - self.rewards.index(max(self.rewards)) if self.rewards else 0

    def state(self) -> list[float]:
        return self.rewards

    def load(self, state: list[float]) -> None:
        self.rewards = list(state)


def parts_of(
    scorer: Scorer, pictures: Sequence[Image.Image], prompts: Sequence[Prompt], photos: Sequence[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """I and T of each picture, (n,); a ParameterError for a scorer that is not made of both."""
    _, parts = scorer.with_parts(list(pictures), [p.clean for p in prompts], list(photos))
    if missing := [name for name in PARTS if name not in parts]:
        raise ParameterError(
            f"rpo's reward is made of {' and '.join(PARTS)}, and {scorer.name} has no {missing[0]}: use harmonic."
        )
    return parts[PARTS[0]], parts[PARTS[1]]


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """See `records.Train`.

    The history has step, loss, loss_similarity, loss_preference, k (its mean) and pr (the mean probability of the
    labels that the photo wins), these three where the preference counts, validation and the monitor's numbers (the mean
    reward, of the steps that have one; step 0 has that of the weights before it, where `validate_every` is above 1),
    and seconds.
    """
    device, scorer = model.device, job.reward.scorer(model.device)
    prompts = list(job.prompts)
    origin = settings_origin(settings, MAY_CHANGE) | {"model": model_fingerprint(model), "seed": str(job.seed)}
    origin |= {"prompts": hash_json([job.subject.instance_prompt, *(p.text for p in prompts)])}
    origin |= {"photos": hash_pictures(job.photos), "rewards": scorer.evaluator}
    in_pairs = settings.preference_weight > 0
    asked = [p for p in prompts * in_pairs for _ in range(settings.n_negatives)]
    drawn = [
        picture
        for prompt in prompts * in_pairs
        for picture in class_images(
            model, prompt.text, settings.n_negatives, settings.sampler, job.folder / "negatives", job.seed
        )
    ]
    references, lam, mean = model.encode_images(job.photos), settings.lambda_train, settings.mean
    if in_pairs:
        negatives = model.encode_images(drawn)
        r_negative = harmonic(*parts_of(scorer, drawn, asked, job.photos), lam, mean)
        r_photo = torch.stack(  # (photos, prompts)
            [harmonic(*parts_of(scorer, job.photos, [p] * len(job.photos), job.photos), lam, mean) for p in prompts], 1
        )
    weights = attach(model, settings.kind, job.name, delta_of(settings)[1], generator(job.seed, job.name))
    best, validations = Copy(weights), Validations()
    probabilities: list[torch.Tensor] = []

    def draw(stream: torch.Generator) -> Examples:
        photo = torch.randint(len(references), (settings.batch,), generator=stream)
        captions = [job.subject.instance_prompt] * settings.batch
        if not in_pairs:
            return Examples(references[photo], captions)
        negative = torch.randint(len(drawn), (settings.batch,), generator=stream)
        better = r_photo[photo, negative // settings.n_negatives] - r_negative[negative]
        pr = torch.sigmoid(better / settings.temperature)
        probabilities.append(pr)
        z_0 = torch.cat([references[photo], negatives[negative]])
        captions += [asked[i].text for i in negative]
        return Examples(z_0, captions, labels=torch.bernoulli(pr, generator=stream).to(device))

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        error = (eps_hat - noise).square().mean(dim=(1, 2, 3))
        similarity = error[: len(error) // 2 if in_pairs else None].mean()
        if not in_pairs:
            return {"loss": settings.similarity_weight * similarity, "loss_similarity": similarity}
        assert examples.z_t is not None and examples.t is not None and examples.labels is not None
        with torch.no_grad(), without(model, job.name):
            before = model.predict_noise(examples.z_t, examples.t, examples.prompts)
        error_before = (before - noise).square().mean(dim=(1, 2, 3))
        preference, k = preference_loss(error, error_before, examples.labels, settings.beta)
        whole = settings.similarity_weight * similarity + settings.preference_weight * preference.mean()
        return {"loss": whole, "loss_similarity": similarity, "loss_preference": preference.mean(), "k": k.mean()}

    def validate() -> dict[str, float]:
        """The mean reward of the training prompts' pictures, always from the same noise."""
        shown = [p for p in prompts for _ in range(settings.n_validation)]
        seeds = [*range(settings.n_validation)] * len(prompts)
        pictures = sample(model, [p.text for p in shown], seeds, settings.sampler)
        reward = harmonic(*parts_of(scorer, pictures, shown, job.photos), settings.lambda_val, mean).mean().item()
        if validations.add(reward):
            best.take(best.now())
        return {"validation": reward} | (monitor(pictures, shown) if monitor else {})

    def after(number: int, result: Shown) -> dict[str, float]:
        pr = {"pr": torch.cat(probabilities).mean().item()} if in_pairs else {}
        probabilities.clear()
        if (number + 1) % settings.validate_every:
            return pr
        with result():
            return pr | validate()

    def stop(history: list[dict[str, float]]) -> bool:
        patience = settings.patience if settings.early_stopping else 0
        return bool(patience and validations.without_gain >= patience)

    history = fit(
        model, weights, draw, loss, settings, job.folder, origin, (job.seed, "rpo"),
        on_step=lambda row: on_row(row, model) if on_row else None,
        more={"best": best, "validations": Facts(validations)},
        before=lambda number: validate() if number == 0 else {}, after=after, stop=stop,
    )  # fmt: skip
    if settings.early_stopping:
        best.put_on()
    freeze(model)
    return history


def work(settings: RPOConfig) -> Work:
    """Rows of pairs, with and without gradient; validations, of two prompts, as the pocket's and the paper's few."""
    in_pairs = settings.preference_weight > 0
    rows = (1 + in_pairs) * settings.n_steps * settings.batch
    pictures = (1 + settings.n_steps // settings.validate_every) * settings.n_validation
    pictures += settings.n_negatives * in_pairs
    forward = rows * in_pairs + pictures * settings.sampler.rows
    graph_rows = (1 + in_pairs) * min(settings.micro_batch or settings.batch, settings.batch)
    return Work.of(settings.kind, rows, forward=forward, pictures=pictures, graph_rows=graph_rows)


METHOD = Method(
    name="rpo",
    label="RPO",
    stage="personalize",
    settings=RPOConfig,
    train=personalize,
    source="Miao et al. 2024, arXiv 2407.12164",
    pocket={
        "batch": (4, "as lora_dreambooth"),
        "learning_rate": (4e-3, "as lora_dreambooth"),
        "ema_decay": (0.98, "as lora_dreambooth"),
        "n_validation": (8, "two prompts instead of eight"),
        "sampler.n_steps": (10, "as everywhere there"),
        "sampler.guidance": (2.0, "as everywhere there"),
        "kind": ("lora", "as the pocket's DreamBooth"),
        "lora_rank": (16, "as lora_dreambooth"),
    },
    reward="harmonic",
    work=work,
)
