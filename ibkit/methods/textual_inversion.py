"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): the subject becomes a new word, and the model stays as it is.

    v* = arg min E ‖ε - ε_θ(z_t, t, c(y))‖²          (eq. 2)

One row of the text encoder's embedding is trained, or a few that stand beside each other; it starts as a copy of a
class word's. The prompt names the subject by that word alone, "a <sks> playing soccer".

Settings and captions follow the authors' recipe as diffusers has it (`examples/textual_inversion`, the command of its
README). Differs from it:
- the row is a parameter of its own, so that weight decay cannot shrink the other rows, and it has none itself;
- latents are the mean of the autoencoder's posterior, encoded once, of each photo and of its mirror image;
- photos are cropped at the centre, the recipe squeezes them into a square;
- a batch of 4 stands for its 4 steps of accumulation; photos are drawn with replacement.

Shapes: B photos of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ibkit.adapt import attach, freeze, load_state
from ibkit.data.subject import PersonalizedSubject
from ibkit.data.templates import TEMPLATES
from ibkit.device import generator
from ibkit.errors import ArtifactError, ParameterError
from ibkit.fields import field
from ibkit.methods.engine import photos as engine
from ibkit.methods.engine.photos import Examples, PhotoConfig, fit, mirrored_latents
from ibkit.methods.records import Job, Method, Work
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json, resolve
from ibkit.train.loop import hash_pictures, settings_origin

MAY_CHANGE = (*engine.MAY_CHANGE, "start_file")  # the file's rows have a hash


@dataclass(frozen=True)
class WordConfig(PhotoConfig):
    """Settings of a training that learns a word from photos alone."""

    weight_decay: float = field(0.0, "of AdamW", "ours: the recipe's 0.01 would shrink the word", low=0.0, high=1.0)
    start: str = field("", "word of one token that the new one starts as; empty = the last of the class noun", "ours")
    templates: str = field("objects", "captions of the photos", "Textual Inversion", choices=tuple(TEMPLATES))
    flip: float = field(0.5, "share of photos that are mirrored", "diffusers' recipe", low=0.0, high=1.0)


@dataclass(frozen=True)
class TextualInversionConfig(WordConfig):
    """Settings; the defaults are those of the command in the recipe's README, with its scaled learning rate."""

    n_steps: int = field(3000, "training steps", "diffusers' recipe", low=1, high=1_000_000)
    batch: int = field(4, "photos in a step", "diffusers' recipe: 1 × 4 steps of accumulation", low=1, high=1024)
    learning_rate: float = field(2e-3, "of AdamW, constant", "diffusers' recipe: 5e-4 × 4", low=0.0, high=1.0)
    n_vectors: int = field(1, "rows of the new word", "Textual Inversion", low=1, high=64)
    start_file: str = field(
        "", "learned embeddings, of diffusers or of a run of ours, that the word starts as instead of `start`", "ours"
    )


def learned_word(subject: PersonalizedSubject) -> PersonalizedSubject:
    """The subject under its learned word, "<sks>", which stands for class noun and description too."""
    return replace(subject, identifier=f"<{subject.identifier}>", alone=True)


def start_word(subject: PersonalizedSubject, asked: str) -> str:
    """The word that a learned one starts as: the one asked for, else the last of the class noun."""
    return asked or subject.class_noun.split()[-1]


def train_word(
    model: TextToImage,
    job: Job,
    settings: WordConfig,
    on_row: Any,
    kind: str,
    kind_settings: dict[str, Any],
    on_draw: Callable[[torch.Generator], None] = lambda stream: None,
    first: dict[str, torch.Tensor] | None = None,
) -> list[dict[str, float]]:
    """Train a delta that brings the word `job.subject.identifier` on captioned photos; rows with step, loss, seconds.

    Args:
        kind, kind_settings: of the delta, see `ibkit.adapt`.
        on_draw: called with a step's random stream before anything is drawn from it.
        first: the delta's first weights, where they are not the kind's.
    """
    latents = mirrored_latents(model, job.photos)
    captions = TEMPLATES[settings.templates]
    origin = settings_origin(settings, MAY_CHANGE) | {"model": model_fingerprint(model), "seed": str(job.seed)}
    rows = {} if first is None else {n: tensor.tolist() for n, tensor in first.items()}
    origin |= {"word": hash_json([kind_settings, rows]), "photos": hash_pictures(job.photos)}
    weights = attach(model, kind, job.name, kind_settings, generator(job.seed, job.name))
    if first is not None:
        load_state(model, job.name, first)

    def draw(stream: torch.Generator) -> Examples:
        on_draw(stream)
        which = torch.randint(len(job.photos), (settings.batch,), generator=stream)
        flipped = torch.rand(settings.batch, generator=stream) < settings.flip
        said = torch.randint(len(captions), (settings.batch,), generator=stream).tolist()
        return Examples(latents[flipped.long(), which], [captions[i].format(job.subject.identifier) for i in said])

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        return {"loss": (eps_hat - noise).square().mean()}

    on_step = (lambda row: on_row(row, model)) if on_row else None
    history = fit(model, weights, draw, loss, settings, job.folder, origin, (job.seed, job.name), on_step)
    freeze(model)
    return history


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """See `records.Train`."""
    word = {"word": job.subject.identifier, "start": start_word(job.subject, settings.start)}
    word["n_vectors"] = settings.n_vectors
    first = {"rows": read_rows(resolve(settings.start_file))} if settings.start_file else None
    if first and len(first["rows"]) != settings.n_vectors:
        raise ParameterError(
            f"{settings.start_file} has {len(first['rows'])} vectors and n_vectors is {settings.n_vectors}: make them "
            "equal."
        )
    return train_word(model, job, settings, on_row, "tokens", word, first=first)


def read_rows(file: Path) -> torch.Tensor:
    """Rows (n, D) of a file of learned embeddings: diffusers' (.safetensors, .bin) or the authors' (.pt); an
    ArtifactError where it is not there, or holds something else.
    """
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        found = found.get("string_to_param", found)
        [rows] = found.values()
        return rows.detach().float().reshape(-1, rows.shape[-1])
    except (OSError, ValueError, AttributeError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ArtifactError(
            f"{file} does not hold the embedding of one word ({type(error).__name__}): give a file as diffusers' "
            "`load_textual_inversion` reads it."
        ) from error


def work(settings: WordConfig) -> Work:
    """Rows of a pass whose gradient reaches the text, but no weights of the U-Net."""
    return Work(tuned=settings.n_steps * settings.batch, graph_rows=settings.batch)


METHOD = Method(
    name="textual_inversion",
    label="Textual Inversion",
    stage="personalize",
    settings=TextualInversionConfig,
    train=personalize,
    source="Gal et al. 2022, arXiv 2208.01618",
    names=learned_word,
    pocket={
        "n_steps": (200, "the teddy bear is known in 20 % of the pictures after 200, in 15 % after 400"),
        "batch": (8, "64 px pictures: eight cost little more than four"),
        "learning_rate": (1e-2, "not compared with other rates"),
        "n_vectors": (4, "with one row the teddy bear is known in 8 % of the pictures, with four in 20 %"),
        "flip": (0.0, "the pocket world's places are never mirrored, and the model cannot draw them so"),
        "templates": ("plain", "captions of words that the pocket model knows"),
    },
    work=work,
    delta=lambda settings: ("tokens", {"n_vectors": settings.n_vectors}),
)
