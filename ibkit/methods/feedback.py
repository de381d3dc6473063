"""Reward-weighted likelihood: fine-tuning by a reward that was learned from human feedback (Lee et al. 2023).

    L = E_model [ max(r(x, z), 0) ℓ(x, z) ] + β E_pretrain [ ℓ(x, z) ],    ℓ = ‖ε - ε_θ(x_t, t, z)‖²

Each step has as many pictures of the model as of pre-training, in one pass. The model's are drawn once, before the
training: those that were rated (`labelled`), and unlabelled ones for the tuning's prompts (`scored`), which the learned
reward weighs too. A negative weight has no lower bound, since ℓ can grow for ever (DPOK's appendix B saw it fail), so
rewards are clamped at 0. The reward itself is `ibkit.scorers.feedback`; any other scorer can stand in its place.

| arm of the paper | settings |
|---|---|
| labelled only | `labelled` a folder, `scored` false, `pretrain_weight` 0 |
| + scored | `labelled` a folder, `pretrain_weight` 0 |
| + pre-training | `labelled` a folder |
| best-of-n, without any training | `ibkit.scorers.feedback.best_of` |

Differs from paper: the pre-training set is pictures of the class by the model before (there: 625 thousand of
LAION-aesthetic), or whatever `train` is given; learning rate and β are read from the name of the authors' run in DPOK's
code, the paper has neither. Several rounds of feedback: run it again on its own result, with new ratings.

Shapes: B pictures of the model in a step and as many of pre-training, C/H/W latent channels, height, width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ibkit.adapt import attach, freeze
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError, TrainingError
from ibkit.fields import field
from ibkit.methods.class_images import class_images
from ibkit.methods.engine.photos import MAY_CHANGE, Examples, PhotoConfig, Shown, fit
from ibkit.methods.records import Method, Work, check_job, delta_of
from ibkit.model.sample import Sampler, sample
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.loop import hash_pictures, settings_origin

LABELS = "labels.csv"  # of a folder of rated pictures: picture (a file name), prompt, label (1 good, 0 bad, or empty)
RUN_NAME = "the name of the authors' run in DPOK's code"


@dataclass(frozen=True)
class FeedbackConfig(PhotoConfig):
    """Settings; the defaults are Lee et al.'s."""

    n_steps: int = field(10_000, "training steps", "Lee et al.", low=1, high=1_000_000)
    batch: int = field(256, "pictures of the model in a step, and as many of pre-training", "Lee et al.: 512 in all",
                       low=1, high=4096)  # fmt: skip
    learning_rate: float = field(2e-5, "of AdamW, constant", RUN_NAME, low=0.0, high=1.0)
    micro_batch: int = field(
        4, "pictures of the model in a pass, with as many of pre-training: gradients add up to the batch; memory only; "
        "0 = all", "ours: one GPU", low=0,
    )  # fmt: skip
    pretrain_weight: float = field(0.01, "β of the pre-training term; 0 = without it", RUN_NAME, low=0.0, high=1e4)
    n_pretrain: int = field(200, "pictures of the class for it, made by the model before", "ours; Lee et al.: 625K of "
                            "LAION", low=1, high=1_000_000)  # fmt: skip
    labelled: str = field("", f"folder of rated pictures with a {LABELS}; empty = none", "Lee et al.: 23K pictures")
    scored: bool = field(True, "draw unlabelled pictures for the prompts and weigh them too", "Lee et al.: 16K")
    n_scored: int = field(6, "unlabelled pictures of each prompt", "Lee et al.: 6 or 60", low=1, high=100_000)
    sampler: Sampler = Sampler()
    validate_every: int = field(
        500, "steps between looks: the mean reward of new pictures, and the monitor; 0 = none", "ours", low=0
    )
    kind: str = field("unet", "what is trained: the whole U-Net, or a LoRA adapter", "Lee et al.",
                      choices=("unet", "lora"))  # fmt: skip
    lora_rank: int = field(8, "rank of the adapter", "as ddpo", low=1, high=1024)

    @property
    def n_epochs(self) -> int:
        """Steps, by the name that they have in a tuning."""
        return self.n_steps

    @property
    def images_per_epoch(self) -> int:
        return self.batch


def weighted_likelihood_loss(
    eps_hat: torch.Tensor, noise: torch.Tensor, reward: torch.Tensor, pretrain_weight: float
) -> dict[str, torch.Tensor]:
    """The loss and its two terms, scalars.

    Args:
        eps_hat, noise: (2B, C, H, W), the model's pictures first; with pretrain_weight 0, (B, C, H, W) of those alone.
        reward: r (B,); negative ones count as 0.
    """
    error = (eps_hat - noise).square().mean(dim=(1, 2, 3))
    weighted = (reward.clamp(min=0) * error[: len(reward)]).mean()
    if pretrain_weight == 0:
        return {"loss": weighted, "loss_weighted": weighted}
    pretrain = error[len(reward) :].mean()
    return {"loss": weighted + pretrain_weight * pretrain, "loss_weighted": weighted, "loss_pretrain": pretrain}


def train(
    model: TextToImage,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    rewards: Sequence[float],
    config: FeedbackConfig,
    folder: Path,
    seed: int = 0,
    pretraining: Sequence[Image.Image] = (),
    pretraining_prompts: Sequence[str] = (),
    validate: Callable[[], Mapping[str, float]] = dict,
    on_step: Callable[[dict[str, float]], None] | None = None,
    name: str = "feedback",
) -> list[dict[str, float]]:
    """Fine-tune `model` in place (it gains a delta `name`) and return a row a step.

    Args:
        pictures, prompts, rewards: of the model before, one of each.
        pretraining, pretraining_prompts: pictures and captions of the second term; not read with pretrain_weight 0.
        folder: for checkpoints; training resumes from the newest one there.
        validate: columns of the row after every `validate_every`-th step.

    Returns:
        Rows with step, epoch (the same), loss, loss_weighted, loss_pretrain, weight (the mean clamped reward of all
        pictures), pictures, gradient_steps, what `validate` gives, seconds.

    Raises:
        ParameterError: lengths that differ, no reward above 0, or no pictures of pre-training.
        TrainingError, ArtifactError: a reward that is not finite; see `engine.photos.fit`.
    """
    r = torch.as_tensor(list(rewards), dtype=torch.float32)
    _check(pictures, prompts, r, config, pretraining, pretraining_prompts)
    latents = model.encode_images(pictures)
    others = model.encode_images(pretraining) if config.pretrain_weight else None
    origin = settings_origin(config, (*MAY_CHANGE, "labelled")) | {"model": model_fingerprint(model), "seed": str(seed)}
    origin |= {"pictures": hash_pictures(pictures), "prompts": hash_json(list(prompts))}
    origin["rewards"] = hash_json(r.tolist())
    if others is not None:
        origin["pre-training"] = hash_json([hash_pictures(pretraining), list(pretraining_prompts)])
    weights = attach(model, config.kind, name, delta_of(config)[1], generator(seed, name))
    weight = r.clamp(min=0).mean().item()

    def draw(stream: torch.Generator) -> Examples:
        mine = torch.randint(len(latents), (config.batch,), generator=stream)
        z_0, captions = latents[mine], [prompts[i] for i in mine.tolist()]
        if others is not None:
            theirs = torch.randint(len(others), (config.batch,), generator=stream)
            z_0 = torch.cat([z_0, others[theirs]])
            captions += [pretraining_prompts[i] for i in theirs.tolist()]
        return Examples(z_0, captions, labels=r[mine].to(z_0.device))

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        assert examples.labels is not None
        return weighted_likelihood_loss(eps_hat, noise, examples.labels, config.pretrain_weight)

    def after(number: int, result: Shown) -> dict[str, float]:
        row = {"epoch": number, "weight": weight, "pictures": config.batch, "gradient_steps": 1}
        if not config.validate_every or (number + 1) % config.validate_every:
            return row
        with result():
            return row | dict(validate())

    history = fit(model, weights, draw, loss, config, folder, origin, (seed, "feedback"), on_step, after=after)
    freeze(model)
    return history


def _check(
    pictures: Sequence, prompts: Sequence, r: torch.Tensor, config: FeedbackConfig, pretraining: Sequence,
    captions: Sequence,
) -> None:  # fmt: skip
    if not pictures or not len(pictures) == len(prompts) == len(r):
        raise ParameterError(
            f"feedback trains on pictures of the model, and there are {len(pictures)} pictures, {len(prompts)} prompts "
            f"and {len(r)} rewards: give each picture one of each (name a `labelled` folder, or set scored to true)."
        )
    if not bool(torch.isfinite(r).all()):
        bad = int((~torch.isfinite(r)).nonzero()[0])
        raise TrainingError(
            f"the reward of picture {bad} ({prompts[bad]!r}) is {r[bad].item()}: look at the picture and the reward."
        )
    if not bool((r > 0).any()):
        raise ParameterError(
            f"no reward of the {len(r)} pictures is above 0 (the highest is {r.max().item():.3g}), so that there is "
            "nothing to learn from: choose another reward, or draw more pictures."
        )
    if config.pretrain_weight and (not pretraining or len(pretraining) != len(captions)):
        raise ParameterError(
            f"the pre-training term needs pictures with a caption each, and there are {len(pretraining)} with "
            f"{len(captions)}: give them, or set pretrain_weight to 0."
        )


def read_labelled(folder: Path) -> tuple[list[Image.Image], list[str], list[float | None]]:
    """Pictures, prompts and labels (None: skipped) of a folder of rated pictures, whose `labels.csv` has the columns
    picture, prompt and label; an ArtifactError where it is missing or incomplete, a label is none, or a picture cannot
    be read.
    """
    path = folder / LABELS
    try:
        table = pd.read_csv(path, dtype={"picture": str, "prompt": str})
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): write one with picture, prompt and label.") from error
    if missing := [name for name in ("picture", "prompt", "label") if name not in table]:
        raise ArtifactError(f"{path} has no column {missing[0]}: it needs picture, prompt and label.")
    pictures: list[Image.Image] = []
    prompts: list[str] = []
    labels: list[float | None] = []
    for line, (picture, prompt, label) in enumerate(table[["picture", "prompt", "label"]].itertuples(index=False), 2):
        if not (pd.isna(label) or label in (0, 1)) or pd.isna(prompt):
            raise ArtifactError(
                f"{path}, line {line}: the label of {picture!r} for {prompt!r} is {label!r}: write 1 for good, 0 for "
                "bad, nothing for skipped, and a prompt for each."
            )
        try:
            pictures.append(Image.open(folder / str(picture)).convert("RGB"))
        except OSError as error:
            raise ArtifactError(
                f"{path}, line {line}: the picture {picture!r} cannot be read ({error}): restore it, or leave the line "
                "out."
            ) from error
        prompts.append(prompt)
        labels.append(None if pd.isna(label) else float(label))
    return pictures, prompts, labels


def tune(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """As a stage; see `records.Train`. What `check_job` or `train` refuses is a ParameterError."""
    check_job(METHOD, job, processes)
    scorer = job.reward.scorer(model.device)
    pictures: list[Image.Image] = []
    prompts: list[str] = []
    clean: list[str] = []
    if settings.labelled:
        pictures, prompts, labels = read_labelled(Path(settings.labelled).expanduser())
        kept = [i for i, label in enumerate(labels) if label is not None]  # skipped ones are left out, as in the paper
        pictures, prompts = [model_size(pictures[i], model) for i in kept], [prompts[i] for i in kept]
        clean = list(prompts)
    if settings.scored:
        for prompt in job.prompts:
            drawn = class_images(
                model, prompt.text, settings.n_scored, settings.sampler, job.folder / "scored", job.seed
            )
            pictures, prompts = [*pictures, *drawn], [*prompts, *[prompt.text] * len(drawn)]
            clean += [prompt.clean] * len(drawn)
    rewards = scorer(pictures, clean).tolist() if pictures else []
    asked = list(job.prompts)

    def validate() -> dict[str, float]:
        """Always from the same noise."""
        drawn = sample(model, [p.text for p in asked], list(range(len(asked))), settings.sampler)
        row = {"reward": scorer(drawn, [p.clean for p in asked]).mean().item()}
        return row | (monitor(drawn, asked) if monitor else {})

    return train(
        model, pictures, prompts, rewards, settings, job.folder, job.seed, job.class_pictures,
        [job.subject.class_prompt] * len(job.class_pictures), validate,
        lambda row: on_row(row, model) if on_row else None, job.name,
    )  # fmt: skip


def model_size(picture: Image.Image, model: TextToImage) -> Image.Image:
    """A picture at the model's size, by PIL's bicubic filter; one of that size is left as it is."""
    size = (model.image_px, model.image_px)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def refuses(reward: str, subject_reward: str, processes: int) -> str:
    """See `records.Method`."""
    if subject_reward:
        return "feedback follows one reward: leave subject_reward empty, or use ddpo for two."
    return "feedback trains in one process: leave processes at 1." if processes > 1 else ""


def class_pictures(settings: FeedbackConfig) -> int:
    """How many pictures of the class are needed."""
    return settings.n_pretrain if settings.pretrain_weight else 0


def work(settings: FeedbackConfig) -> Work:
    """Rows with gradient; pictures that are scored and looked at, of four prompts, as the pocket's tuning has."""
    kinds = 2 if settings.pretrain_weight else 1
    rows = kinds * settings.n_steps * settings.batch
    looks = settings.n_steps // settings.validate_every if settings.validate_every else 0
    pictures = 4 * (looks + (settings.n_scored if settings.scored else 0))
    return Work.of(
        settings.kind,
        rows,
        forward=pictures * settings.sampler.rows,
        pictures=pictures,
        graph_rows=kinds * min(settings.micro_batch or settings.batch, settings.batch),
    )


METHOD = Method(
    name="feedback",
    label="Human feedback",
    stage="tune",
    settings=FeedbackConfig,
    train=tune,
    source="Lee et al. 2023, arXiv 2302.12192",
    pocket={
        "n_steps": (150, "minutes; not compared with other numbers"),
        "batch": (8, "minutes; not compared with other sizes"),
        "micro_batch": (0, "64 px pictures fit in one pass"),
        "learning_rate": (2e-3, "as DRaFT's adapter there; not compared with others"),
        "pretrain_weight": (0.5, "rewards of about .5, so that both terms weigh alike; not compared with others"),
        "n_pretrain": (64, "minutes"),
        "n_scored": (16, "as many pictures as four epochs of four"),
        "sampler.n_steps": (10, "as DDPO's"),
        "sampler.guidance": (2.0, "as DDPO's"),
        "validate_every": (50, "minutes"),
        "kind": ("lora", "as the other methods there"),
        "checkpoint_every": (50, "minutes"),
    },
    class_pictures=class_pictures,
    draws=False,
    refuses=refuses,
    work=work,
)
