"""Custom Diffusion (Kumari et al. 2022, arXiv 2212.04488): what the cross-attentions make of text, and a new word.

Keys and values of all cross-attentions are trained, and the row of a new word that stands before the class noun, "a
<sks> cat". It starts as a copy of the identifier's own row, a rare word. Prior preservation as in DreamBooth. Photos
are drawn smaller or larger, and the captions say so (section 3.2 of the paper; appendix).

Two subjects come into one model by training them together, or by `merge` (section 3.3, eqs. 4 and 5).

Settings follow the authors' code on one GPU. Differs from it:
- instance and class term are per-element means and `instance_weight` weighs the first; in both scripts of diffusers the
  instance term is 4 times its mean, since the mask has one channel of four;
- the class caption is "a cat", not "cat"; class pictures are drawn by the base model with this kit's sampler;
- latents are the mean of the autoencoder's posterior.

Shapes: B photos of a step and as many class pictures, C/H/W latent channels, height, width, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ibkit.adapt import attach, freeze, parameters_of
from ibkit.adapt.cross_kv import changed
from ibkit.data.subject import PersonalizedSubject
from ibkit.device import generator
from ibkit.errors import ModelError
from ibkit.fields import field
from ibkit.methods import dreambooth
from ibkit.methods.engine import photos as engine
from ibkit.methods.engine.photos import Examples, PhotoConfig, fit, mirrored_latents
from ibkit.methods.records import Method
from ibkit.model.text_to_image import TextToImage, model_fingerprint
from ibkit.runs import hash_json
from ibkit.train.loop import hash_pictures, settings_origin

MAY_CHANGE = (*engine.MAY_CHANGE, "n_class_images")  # the pictures have a hash
SMALL, LARGE = ("a far away ", "very small "), ("zoomed in ", "close up ")
GREY = (128, 128, 128)


@dataclass(frozen=True)
class CustomDiffusionConfig(PhotoConfig):
    """Settings; the defaults are those of the authors' code on one GPU."""

    n_steps: int = field(500, "training steps", "Custom Diffusion: 250 on two GPUs", low=1, high=1_000_000)
    batch: int = field(2, "photos in a step, and as many class pictures", "Custom Diffusion: 2 + 2", low=1, high=1024)
    learning_rate: float = field(4e-5, "of AdamW, constant", "Custom Diffusion: 1e-5 × 2 × 2", low=0.0, high=1.0)
    prior_weight: float = field(1.0, "λ of prior preservation; 0 = without it", "Custom Diffusion", low=0.0, high=100.0)
    instance_weight: float = field(
        1.0,
        "of the photos' term; 4 is what diffusers' scripts compute",
        "Custom Diffusion's paper",
        low=0.0,
        high=100.0,
    )
    n_class_images: int = field(200, "class pictures for it", "Custom Diffusion", low=1, high=100_000)
    scale_augmentation: bool = field(True, "photos smaller and larger, with captions that say so", "Custom Diffusion")
    flip: float = field(0.5, "share of photos that are mirrored", "Custom Diffusion", low=0.0, high=1.0)
    start: str = field(
        "", "word of one token that the new one starts as; empty = the identifier", "Custom Diffusion: ktn"
    )


@dataclass(frozen=True)
class Concept:
    """What one subject brings to a training; `subject` has its learned word, see `new_word`."""

    subject: PersonalizedSubject
    photos: Sequence[Image.Image]
    class_pictures: Sequence[Image.Image]


def new_word(subject: PersonalizedSubject) -> PersonalizedSubject:
    """The subject under its learned word, "<sks>", which stands before the class noun."""
    return replace(subject, identifier=f"<{subject.identifier}>")


def scaled(photo: Image.Image, stream: torch.Generator, cell_px: int) -> tuple[Image.Image, str, torch.Tensor]:
    """A square photo drawn smaller or larger, what its caption says first, and where it counts: (1, H, W), 1 where the
    photo is, less a cell at each side.

    Two of three are from a third to all of their size, the others 1.2 to 1.4 times as large. Below 0.6 of it a photo
    lies on grey at random; from there on it keeps its size, as in the authors' code.

    Args:
        cell_px: pixels of a latent.
    """
    px = photo.width

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=stream).item()

    smaller = torch.rand((), generator=stream) < 2 / 3
    size = round(px * (between(1 / 3, 1) if smaller else between(1.2, 1.4)))
    mask = torch.ones(1, px // cell_px, px // cell_px)
    if 0.6 * px <= size <= px:
        return photo, "", mask
    place = [round(between(0, abs(px - size))) for _ in range(2)]
    prefix = (SMALL if smaller else LARGE)[int(torch.randint(2, (), generator=stream))]
    resized = photo.resize((size, size), Image.Resampling.BICUBIC)
    if not smaller:
        left, top = place
        return resized.crop((left, top, left + px, top + px)), prefix, mask
    canvas = Image.new("RGB", photo.size, GREY)
    canvas.paste(resized, (place[0], place[1]))
    mask.zero_()
    (left, right), (top, bottom) = ((start // cell_px + 1, (start + size) // cell_px - 1) for start in place)
    mask[:, top:bottom, left:right] = 1
    return canvas, prefix, mask


def masked_loss(
    eps_hat: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, instance_weight: float, prior_weight: float
) -> dict[str, torch.Tensor]:
    """Mean error of the photos where they count, and of the class pictures.

    Args:
        eps_hat, noise: (2B, C, H, W), photos first; with prior_weight 0, (B, C, H, W).
        mask: (B, 1, H, W) of the photos.
    """
    error = (eps_hat - noise).square()
    mine, n = error[: len(mask)], error.shape[1]
    instance = ((mine * mask).sum((1, 2, 3)) / (n * mask.sum((1, 2, 3)).clamp(min=1))).mean()
    prior = error[len(mask) :].mean() if prior_weight else error.new_zeros(())
    loss = instance_weight * instance + prior_weight * prior
    return {"loss": loss, "loss_instance": instance, "loss_prior": prior}


def train(
    model: TextToImage,
    concepts: Sequence[Concept],
    settings: CustomDiffusionConfig,
    folder: Path,
    seed: int = 0,
    name: str = "custom_diffusion",
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Personalize `model` in place for one subject, or for several together; rows as DreamBooth's.

    Raises:
        ModelError: two subjects of one word, or one that cannot be learned (see `adapt.tokens.add_word`).
        TrainingError, ArtifactError: see `engine.photos.fit`.
    """
    words = {c.subject.identifier: settings.start or c.subject.identifier.strip("<>") for c in concepts}
    if len(words) < len(concepts):
        raise ModelError(f"two subjects are called {next(iter(words))!r}: give each its own identifier.")
    photos = [photo for c in concepts for photo in c.photos]
    captions = [f"photo of {c.subject.instance_prompt}" for c in concepts for _ in c.photos]
    class_pictures = [picture for c in concepts for picture in c.class_pictures] if settings.prior_weight else []
    class_captions = [c.subject.class_prompt for c in concepts for _ in c.class_pictures]
    origin = settings_origin(settings, MAY_CHANGE) | {"model": model_fingerprint(model), "seed": str(seed)}
    origin |= {"prompts": hash_json([captions, words]), "photos": hash_pictures(photos)}
    origin["class pictures"] = hash_pictures(class_pictures)
    latents = mirrored_latents(model, photos)
    prior_latents = model.encode_images(class_pictures) if class_pictures else None
    everywhere = torch.ones(1, *latents.shape[-2:], device=model.device)
    weights = attach(model, "cross_kv", name, {"words": words}, generator(seed, name))

    def draw(stream: torch.Generator) -> Examples:
        which = torch.randint(len(photos), (settings.batch,), generator=stream).tolist()
        flipped = (torch.rand(settings.batch, generator=stream) < settings.flip).long().tolist()
        said, mask = [captions[i] for i in which], everywhere.expand(settings.batch, -1, -1, -1)
        z_0 = latents[flipped, which]
        if settings.scale_augmentation:
            chosen = [ImageOps.mirror(photos[i]) if f else photos[i] for i, f in zip(which, flipped, strict=True)]
            drawn = [scaled(photo, stream, model.image_px // latents.shape[-1]) for photo in chosen]
            z_0 = model.encode_images([picture for picture, *_ in drawn])
            said = [prefix + caption for (_, prefix, _), caption in zip(drawn, said, strict=True)]
            mask = torch.stack([where for *_, where in drawn]).to(model.device)
        if prior_latents is not None:
            others = torch.randint(len(prior_latents), (settings.batch,), generator=stream).tolist()
            z_0, said = torch.cat([z_0, prior_latents[others]]), said + [class_captions[i] for i in others]
        return Examples(z_0, said, mask)

    def loss(eps_hat: torch.Tensor, noise: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        assert examples.mask is not None
        return masked_loss(eps_hat, noise, examples.mask, settings.instance_weight, settings.prior_weight)

    history = fit(model, weights, draw, loss, settings, folder, origin, (seed, name), on_step)
    freeze(model)
    return history


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """See `records.Train`."""
    concept = Concept(job.subject, job.photos, job.class_pictures)
    on_step = (lambda row: on_row(row, model)) if on_row else None
    return train(model, [concept], settings, job.folder, job.seed, job.name, on_step)


@torch.no_grad()
def merge(
    base: TextToImage,
    customized: Sequence[tuple[TextToImage, str, PersonalizedSubject]],
    captions: Sequence[str],
    name: str = "custom_diffusion",
    ridge: float = 1e-4,
) -> TextToImage:
    """One model of several subjects that were trained apart, in closed form (eqs. 4 and 5): the base with the delta
    `name`, which has all words.

    Each matrix becomes that which keeps what the captions read as near as it can, W C_reg ≈ W_0 C_reg, and gives each
    subject's words exactly what its own matrix gave: W c_i = W_i c_i.

    Args:
        base: what all of them were trained on.
        customized: a model, the name of its `cross_kv` delta, and its subject, with its learned word.
        captions: of ordinary pictures; the reference code takes 200. With fewer independent ones than D only the
            ridge makes C_reg C_regᵀ invertible.
        ridge: added to its diagonal, as a share of its mean.
    """
    merged = base.copy()
    starts: dict[str, str] = {}
    rows: dict[str, torch.Tensor] = {}
    for model, delta, subject in customized:
        starts |= model.deltas[delta].settings["words"]
        rows[subject.identifier] = parameters_of(model, delta)[f"word {subject.identifier}"]
    attach(merged, "cross_kv", name, {"words": starts}, generator(0, "overwritten at once"))
    for word, row in rows.items():
        parameters_of(merged, name)[f"word {word}"].copy_(row)
    freeze(merged)
    merged.forget_text()
    regular = torch.cat([_text_rows(base, caption) for caption in captions])  # (n, D)
    gram = regular.T @ regular
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    targets, owners = [], []
    for i, (*_, subject) in enumerate(customized):
        word = subject.identifier
        for prompt in (f"{word} {subject.class_noun}", f"photo of a {word} {subject.class_noun}"):
            before = 1 + merged.token_ids(prompt).index(merged.token_ids(word)[0])
            found = _text_rows(merged, prompt, first=before)
            targets.append(found)
            owners += [i] * len(found)
    keys = torch.cat(targets)  # (m, D)
    apart = torch.linalg.solve(gram, keys.T).T  # D = K_t (K_rᵀ K_r)⁻¹
    projections = [changed(model, delta) for model, delta, _ in customized]
    for place, module in changed(merged, name).items():
        w_0 = module.weight.double()
        own = [parts[place].weight.double() + parts[place].delta.double() for parts in projections]
        wanted = torch.stack([own[i] @ key for i, key in zip(owners, keys, strict=True)], 1)  # V_tᵀ (out, m)
        missing = wanted - w_0 @ keys.T
        module.delta.copy_(torch.linalg.lstsq((apart @ keys.T).T, missing.T).solution.T @ apart)
    return merged


def _text_rows(model: TextToImage, prompt: str, first: int = 1) -> torch.Tensor:
    """Hidden states of a prompt from a token to the end mark, without start mark and padding, (n, D) fp64."""
    return model.encode_text([prompt])[0, first : 2 + len(model.token_ids(prompt))].double()


METHOD = Method(
    name="custom_diffusion",
    label="Custom Diffusion",
    stage="personalize",
    settings=CustomDiffusionConfig,
    train=personalize,
    source="Kumari et al. 2022, arXiv 2212.04488",
    names=new_word,
    pocket={
        "n_steps": (800, "minutes"),
        "batch": (4, "64 px pictures: four cost little more than two"),
        "learning_rate": (3e-3, "of 1e-3, 3e-3 and 1e-2, tried on the teddy bear; 1e-2 lost the text"),
        "ema_decay": (0.98, "single steps of this size smear the pictures"),
        "flip": (0.0, "the pocket world's places are never mirrored, and the model cannot draw them so"),
        "scale_augmentation": (False, "the pocket model knows no words for sizes"),
        "n_class_images": (64, "minutes"),
    },
    class_pictures=dreambooth.class_pictures,
    work=partial(dreambooth.work, kind="cross_kv"),
    delta=lambda settings: ("cross_kv", {}),
)
