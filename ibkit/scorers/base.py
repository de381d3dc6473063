"""What every scorer is: pictures (and texts or reference pictures) in, one number a picture out.

Shapes: N pictures, R reference pictures, B batch, C/H/W channels and pixels, D embedding width.
A new scorer is one file with a `Scorer` class and one line in `SCORERS`; another package names its own by an entry
point, see `ibkit.registry`, and its label by one of `ibkit.metrics`.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from ibkit.device import park, working
from ibkit.errors import ModelError, ParameterError, ScoreError
from ibkit.fields import fill
from ibkit.model import hub
from ibkit.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

POCKET_WEIGHTS = Path(__file__).resolve().parents[1] / "pocket" / "weights"

Need = Literal["text", "references"]


class Level(NamedTuple):
    """Mean and standard deviation of the scores of true pictures: what a policy can earn without fooling the scorer."""

    mean: float
    std: float


@dataclass(frozen=True)
class NoOptions:
    """The options of a scorer that has none."""


class Scorer(ABC):
    """A picture metric that can also serve as a reward.

    Attributes:
        name: Its name in `SCORERS`, for example `clip_t`; see `column_of`.
        evaluator: Model and preprocessing in words; printed beside every number.
        needs: What a call must bring beside the pictures: `"text"`, `"references"`.
        options: A frozen dataclass of `ibkit.fields.field`s, what `load` takes beside weights and device.
    """

    name: str
    evaluator: str
    needs: frozenset[Need]
    options: type = NoOptions

    def __call__(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str] | None = None,
        references: Sequence[Image.Image] | None = None,
    ) -> torch.Tensor:
        """Score each picture: (N,) float32 on the CPU.

        Args:
            images: N pictures of any size.
            texts: N texts, one a picture, without the identifier; needed if `"text"` is in `needs`.
            references: R photos of the subject, common to all pictures; needed if `"references"` is in `needs`.

        Raises:
            ScoreError: Nothing to score, a needed input missing, lengths that differ, or a score that is not finite.
        """
        return self.with_parts(images, texts, references)[0]

    def with_parts(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str] | None = None,
        references: Sequence[Image.Image] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Score each picture as a call does, and return what the score is made of beside it, by name, each (N,)."""
        images = list(images)
        texts = None if texts is None else list(texts)
        references = None if references is None else list(references)
        self._check(images, texts, references)
        with torch.inference_mode(), working(*networks(self)):
            scored = self._score(images, texts, references)
        scores, parts = scored if isinstance(scored, tuple) else (scored, {})
        scores = scores.float().cpu()
        finite = torch.isfinite(scores)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            raise ScoreError(
                f"{self.name} gave {scores[index].item()} for image {index} of {len(scores)}: "
                "look at that image, and at the scorer's weights if it is an ordinary picture."
            )
        # clone: an inference tensor could not take part in a later autograd computation
        return scores.clone(), {name: part.float().cpu().clone() for name, part in parts.items()}

    def differentiable(self, pixels: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Score pictures with the gradient of their pixels, as `reward_gradient` needs it; a ParameterError
        where this scorer offers none, which names those that do.

        Args:
            pixels: (B, 3, H, W) in [0, 1].
            texts: B texts, without the identifier.

        Returns:
            (B,) float32; that of a call, but for the rounding to 8 bits and the resizing of tensors.
        """
        from ibkit.scorers.gradient import without_gradient

        raise ParameterError(without_gradient(self.name))

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> Scorer:
        """Make the scorer from its weights, and its `options` as keywords where it has any; see `make_scorer`. A
        ModelError where the weights are missing, damaged, or do not fit the model.
        """
        raise NotImplementedError(f"{cls.__name__} does not say how it is made: give it a class method `load`.")

    def park(self) -> None:
        """Keep its networks off the GPU but for the time of a call; see `ibkit.device.park`."""
        park(*networks(self))

    def level(self, text: str) -> Level | None:
        """The scores of true pictures for a text without the identifier; None where they were not measured."""
        return None

    @abstractmethod
    def _score(
        self, images: list[Image.Image], texts: list[str] | None, references: list[Image.Image] | None
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (N,) scores, or those and their parts by name; inputs are checked, gradients are off."""

    def _check(self, images: list[Image.Image], texts: list[str] | None, references: list[Image.Image] | None) -> None:
        if not images:
            raise ScoreError(f"{self.name} got no image to score: pass at least one.")
        for index, image in enumerate(images + (references or [])):
            if not isinstance(image, Image.Image):
                which = f"image {index}" if index < len(images) else f"reference {index - len(images)}"
                raise ScoreError(f"{self.name}: {which} is a {type(image).__name__}: pass PIL images.")
        if "text" in self.needs:
            if texts is None:
                raise ScoreError(f"{self.name} compares images with texts and got no texts: pass one text an image.")
            if (n := len(images)) != len(texts):
                raise ScoreError(f"{self.name} got {n} images and {len(texts)} texts: pass one text an image.")
            for index, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise ScoreError(f"{self.name}: text {index} is {text!r}: pass a text with at least one word.")
        if "references" in self.needs and not references:
            raise ScoreError(f"{self.name} compares with photos of the subject and got none: pass references.")


def networks(holder: Any) -> list[torch.nn.Module]:
    """The networks of a scorer, and of the encoders and scorers it stands on: whatever of it has an `evaluator`."""
    found = []
    for value in vars(holder).values():
        if isinstance(value, torch.nn.Module):
            found.append(value)
        elif hasattr(value, "evaluator"):
            found += networks(value)
    return found


def rgb_square(image: Image.Image, resize_px: int, crop_px: int) -> Image.Image:
    """Resize the shorter side to `resize_px` (PIL bicubic) and cut the central `crop_px` square.

    CLIP, DINO and ImageReward were evaluated with torchvision on PIL images; on tensors it gives other pixels.
    """
    from torchvision.transforms import InterpolationMode, functional

    resized = functional.resize(image.convert("RGB"), [resize_px], InterpolationMode.BICUBIC)
    return functional.center_crop(resized, [crop_px])


def to_pixel_values(
    images: Iterable[Image.Image], resize_px: int, crop_px: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Turn B pictures of any size and mode into normalised network input, (B, 3, crop_px, crop_px) float32.

    Args:
        resize_px, crop_px: see `rgb_square`.
        mean, std: of each channel, on the 0..1 scale.
    """
    squares = np.stack([np.asarray(rgb_square(image, resize_px, crop_px)) for image in images])
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Sliced(Protocol):
    """A list, array, tensor or table: something that slices cut along its first axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


Many = TypeVar("Many", bound=Sliced)


def batches(items: Many, size: int) -> Iterator[Many]:
    """Cut along the first axis into pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def tokenize(tokenizer, texts: list[str], context: int, warn: Callable[[str, int], None]):
    """Token ids and mask of texts by transformers' tokenizer, all `context` long; `warn` is told the length of each."""
    for text in texts:
        warn(text, len(tokenizer(text, verbose=False)["input_ids"]))
    return tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=context)


def embed(items: Sequence, features: Callable[[Sequence], torch.Tensor], batch_size: int) -> torch.Tensor:
    """Embed N items, up to `batch_size` at a time, by their features (B, D): (N, D) float32 of unit length."""
    embedded = torch.cat([features(batch) for batch in batches(items, batch_size)])
    return torch.nn.functional.normalize(embedded.float(), dim=-1)


def load_transformer(
    metric: str, architecture: type[PreTrainedModel], source: str | Path, **options
) -> torch.nn.Module:
    """transformers' `architecture.from_pretrained` in fp32. A weight that is missing from the files or has another
    shape, which from_pretrained only logs and leaves random, is a ModelError.
    """
    model, report = architecture.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    if lacking := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ModelError(
            f"{metric}: {len(lacking)} weights are missing from {source} or misfit, the first {lacking[0]}: "
            "restore them."
        )
    return model


def mean_cosine(embeddings: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each embedding (N, D) with all references (R, D), all of unit length; (N,). Its mean over N is the
    mean over all generated x reference pairs (DreamBooth, section 4.1).
    """
    return (embeddings @ references.T).mean(dim=1)


class ReferenceCache:
    """Keeps the embeddings of the last set of reference photos: RL scores against the same photos every epoch."""

    def __init__(self, embed: Callable[[Sequence[Image.Image]], torch.Tensor]) -> None:
        self._embed = embed
        self._key: str | None = None
        self._embeddings: torch.Tensor | None = None

    def __call__(self, references: Sequence[Image.Image]) -> torch.Tensor:
        """The embeddings (R, D) of the photos; recognised by their pixels, not by the objects."""
        digest = hashlib.sha256()
        for image in references:
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        if digest.hexdigest() != self._key:
            self._embeddings = self._embed(references)
            self._key = digest.hexdigest()
        return self._embeddings


def truncation_warning(name: str, limit: int) -> Callable[[str, int], None]:
    """Says once per text that a text encoder will not read all of it, when told its tokens, special ones included."""
    told: set[str] = set()

    def warn(text: str, n_tokens: int) -> None:
        if n_tokens > limit and text not in told:
            told.add(text)
            said = f"{name} reads {limit} tokens and this prompt has {n_tokens}; its end is cut off: {text!r}"
            warnings.warn(said, stacklevel=2)

    return warn


def check_vocabulary(metric: str, where: str | Path, found: int, expected: int) -> None:
    """Refuse a tokenizer whose vocabulary is not its model's.

    transformers >= 5 may return a nearly empty tokenizer when files are missing; scores would be noise.
    """
    if found != expected:
        raise ModelError(
            f"{metric}: the tokenizer in {where} has {found} entries and its model expects {expected}: "
            "its files are incomplete or belong to another model; restore the folder or download it again."
        )


def require_files(metric: str, folder: Path, *names: str) -> None:
    """Refuse a weights folder in which one of the named files is missing."""
    if not folder.is_dir():
        raise ModelError(f"{metric}: there is no weights folder {folder}: name an existing one.")
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{metric}: the weights folder {folder} has no {name}: restore it or name another folder.")


def load_state(model: torch.nn.Module, file: Path) -> None:
    """Load a safetensors file, all names; weights stored in half precision still compute in fp32."""
    from safetensors.torch import load_file

    model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})


@contextmanager
def as_model_error(wrong: str, remedy: str, longest: int = 300) -> Iterator[None]:
    """Turn any failure inside, of which libraries raise many kinds, into one sentence: what is wrong, why (the
    library's own words, `longest` characters at most; 0 leaves them out), what to do.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:longest] or type(error).__name__
        why = f" ({words})" if longest else ""
        raise ModelError(f"{wrong}{why}: {remedy}.") from error


def reading(metric: str, what: str, folder: Path) -> AbstractContextManager[None]:
    """Inside, a local file is loaded; a failure becomes a ModelError."""
    wrong = f"{metric}: the {what} in {folder} is damaged or does not fit its config"
    return as_model_error(wrong, "restore the folder")


@contextmanager
def from_hub(metric: str, repository: str, what: str = "weights") -> Iterator[None]:
    """Inside, official weights (or another part, `what`) are fetched; a failure becomes a ModelError.

    Where the hub does not answer, its client is told so and looks into the cache alone: by itself it would try again
    for half a minute, in words of its own.
    """
    from huggingface_hub import constants

    switched_off, endpoint = constants.HF_HUB_OFFLINE, constants.ENDPOINT
    silent = not switched_off and (hub.misset(endpoint) or not hub.answers(endpoint) and f"{endpoint} does not answer")
    part = f"official {what} ({repository})"
    wrong = f"the cache lacks its {part}, and {silent}" if silent else f"its {part} cannot be had from cache or hub"
    constants.HF_HUB_OFFLINE = switched_off or bool(silent)
    try:
        with as_model_error(
            f"{metric}: {wrong}",
            "connect to the internet once, or set HF_HOME to a cache that has them, or leave this metric out",
            0 if silent else 160,
        ):
            yield
    finally:
        constants.HF_HUB_OFFLINE = switched_off


def hub_name(repository: str, *files: str) -> str:
    """A repository with the revision that was loaded from it, "facebook/dino-vits16@ab12cd34", for evaluators.

    Call it once the weights are there; the revision is the folder that the hub's cache keeps the first of `files` in
    that it has (without any named, config.json).
    """
    from huggingface_hub import try_to_load_from_cache

    for file in files or ("config.json",):
        path = try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return f"{repository}@{Path(path).parent.name[:8]}"
    return repository


SCORERS: Registry[type[Scorer]] = Registry(
    "ibkit.scorers",
    "scorer",
    {
        "clip_t": "ibkit.scorers.clip:ClipT",
        "clip_i": "ibkit.scorers.clip:ClipI",
        "dino": "ibkit.scorers.dino:Dino",
        "subject": "ibkit.scorers.subject:SubjectFidelity",
        "pick_score": "ibkit.scorers.pick_score:PickScore",
        "align_t": "ibkit.scorers.align:AlignT",
        "align_i": "ibkit.scorers.align:AlignI",
        "harmonic": "ibkit.scorers.align:Harmonic",
        "image_reward": "ibkit.scorers.image_reward:ImageReward",
        "weak_reward": "ibkit.scorers.image_reward:WeakReward",
        "feedback": "ibkit.scorers.feedback:FeedbackReward",
    },
)


def column_of(name: str) -> str:
    """The score table's column of a scorer: its name; but the column `subject` says who a picture shows."""
    return "subject_score" if name == "subject" else name


def make_scorer(
    name: str,
    weights: str | Path = "pocket",
    device: str | torch.device = "cpu",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Scorer:
    """Make a scorer by name.

    Args:
        name: A key of `SCORERS`.
        weights: `"pocket"` (the kit's own small models), `"official"` (the published ones, from the hub's cache or
            the hub), or a local folder laid out like the pocket weights (`clip/`, `dino/`, `image_reward/`).
        options: The scorer's own, such as `{"weight": 0.7}` of harmonic.

    Raises:
        ParameterError: No scorer or option has this name (the nearest is named), or a value that is not allowed.
        ModelError: The weights are missing, incomplete, or do not fit the model.
    """
    scorer = SCORERS.find(name)
    return scorer.load(weights, device, **vars(check_options(name, options)))


def check_options(name: str, options: Mapping[str, Any]) -> Any:
    """A scorer's options with the values that are given; raises as `make_scorer` does."""
    return fill(SCORERS.find(name).options(), options, f"Scorer {name}")


def weights_folder(metric: str, weights: str | Path, subfolder: str, *files: str) -> Path:
    """The folder that `"pocket"` or a local weights folder keeps one model in, which must have the files."""
    root = POCKET_WEIGHTS if str(weights) == "pocket" else Path(weights).expanduser()
    if not root.is_dir():
        raise ModelError(
            f"{metric}: there is no weights folder {root}: choose 'pocket', 'official', or an existing folder."
        )
    if files:
        require_files(metric, root / subfolder, *files)
    return root / subfolder
