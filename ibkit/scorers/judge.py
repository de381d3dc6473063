"""The judge of the pocket world: which class, pose, things, place, accessory, and which individual of a line-up.

A picture shows an activity when every part that the activity has is right: its pose, its things, or both. It shows an
individual when it is more like that one's photos than like those of seven others of the class, and as like them as all
but 1 % of true pictures are: a smear in the wrong colours may be nearest to somebody, too.

It answers from the picture alone, was trained apart from every scorer (`ibkit.pocket.build.judge`) and is never a
reward. Six smaller ones, each of its own seed, vote with it in notebook 07 in the place of the paper's human raters,
and are called simulated.

Shapes: N pictures, D = 64 identity dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ibkit.errors import ScoreError
from ibkit.pocket import world
from ibkit.pocket.draw import render
from ibkit.runs import read_json
from ibkit.scorers.base import POCKET_WEIGHTS, load_state, reading, require_files, weights_folder

ANSWERS: dict[str, tuple[str, ...]] = {
    "class": world.CLASSES,
    "pose": (world.NO_ACTIVITY, *(a for a in world.ACTIVITIES if "pose" in world.PARTS[a])),
    "things": (world.NO_ACTIVITY, *(a for a in world.ACTIVITIES if "things" in world.PARTS[a])),
    "place": tuple(world.PLACES),
    "accessory": (world.NO_ACCESSORY, *world.ACCESSORIES),
}
IDENTITY_DIM = 64
JUDGE_WIDTHS = (24, 48, 96, 128)  # channels of the judge's four resolutions
# Smaller networks, each of its own seed: with the judge they are the seven simulated raters of notebook 07.
RATERS = tuple(f"rater-{k}" for k in range(1, 7))
RATER_WIDTHS = (16, 24, 32, 48)
# The judge's blind spot, as `ibkit.pocket.build.card` measures it and names it in the model card.
THINGS_TAKEN = "judge, an activity's things around a subject at rest taken for the activity"


class JudgeNet(nn.Module):
    """Residual convolutional trunk, one linear head per question and an identity embedding."""

    def __init__(self, widths: tuple[int, ...] = JUDGE_WIDTHS, answers: Mapping[str, Sequence] = ANSWERS):
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        later = (_Residual(n_in, n_out, stride=2) for n_in, n_out in pairwise(widths))
        self.blocks = nn.Sequential(_Residual(widths[0], widths[0], stride=1), *later)
        n_features = 4 * widths[-1]
        self.heads = nn.ModuleDict({q: nn.Linear(n_features, len(a)) for q, a in answers.items()})
        self.identity = nn.Linear(n_features, IDENTITY_DIM)

    def forward(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pictures (N, 3, 64, 64) in [-1, 1] -> ({question: logits (N, answers)}, identity (N, D))."""
        features = self.blocks(F.silu(self.stem(x)))  # (N, 128, 4, 4)
        pooled = F.adaptive_avg_pool2d(features, 2).flatten(1)  # keeps left/right and top/bottom apart
        return {q: head(pooled) for q, head in self.heads.items()}, self.identity(pooled)


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, n_in), nn.Conv2d(n_in, n_out, 3, stride, 1)
        self.norm2, self.conv2 = nn.GroupNorm(8, n_out), nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.skip = nn.Conv2d(n_in, n_out, 1, stride) if stride > 1 or n_in != n_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures to (N, 3, 64, 64) in [-1, 1]; other sizes are resized (bicubic)."""
    size = (world.IMAGE_PX, world.IMAGE_PX)  # a picture of this size is copied, not filtered
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class Answering:
    """What answers questions about pictures of the pocket world.

    Attributes:
        net: the trained network.
        card: its accuracy by question on held-out renders and on reconstructions, with n; printed beside every number
            it gives.
    """

    net: JudgeNet
    card: dict
    device: str | torch.device = "cpu"
    batch_size: int = 128

    def __post_init__(self):
        self.net = self.net.to(self.device).eval().requires_grad_(False)

    @classmethod
    def read(cls, kind: str, device, folder: str | Path, name: str, net: Callable[[dict], JudgeNet]) -> Self:
        """From `name`.safetensors and `name`.json of the folder, or of the shipped weights; a ModelError where they are
        missing or damaged. `net` makes the network of what the card says.
        """
        folder = Path(folder) if folder else weights_folder(kind, "pocket", kind)
        require_files(kind, folder, f"{name}.safetensors", f"{name}.json")
        with reading(kind, f"{name}.safetensors and {name}.json", folder):
            card = read_json(folder / f"{name}.json")
            made = net(card)
            load_state(made, folder / f"{name}.safetensors")
        return cls(made, card, device)


class Judge(Answering):
    """Answers `ANSWERS`, and which individual is shown; its card also has the least likeness of a true picture
    (`threshold`), and the widths of its network.
    """

    @classmethod
    def load(cls, device: str | torch.device = "cpu", folder: str | Path = "", name: str = "judge") -> Self:
        """Load the shipped judge, or another one of the folder (`name`, such as one of `RATERS`)."""
        return cls.read("judge", device, folder, name, lambda card: JudgeNet(tuple(card["widths"])))

    @property
    def evaluator(self) -> str:
        shares = ", ".join(f"{q} {v['renders']:.1%}" for q, v in self.card["accuracy"].items())
        return f"pocket judge (simulated rater); right on held-out renders: {shares}"

    @torch.inference_mode()
    def look(self, images: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Log-probabilities by question {q: (N, answers)} and unit identity vectors (N, D)."""
        if not images:
            raise ScoreError("judge: there are no images to look at.")
        parts = [self.net(x.to(self.device)) for x in to_tensor(images).split(self.batch_size)]
        answers = {q: torch.cat([p[0][q] for p in parts]).log_softmax(1).cpu() for q in ANSWERS}
        return answers, F.normalize(torch.cat([p[1] for p in parts]), dim=1).cpu()

    def answers(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """The judge's answer for each picture: the likeliest class, pose, things, place or accessory; for `activity`
        the one that is shown whole (of two, the one of the pose), or none.
        """
        if question == "activity":
            return [(world.shown_by(*parts) or (world.NO_ACTIVITY,))[0] for parts in self._parts(images)]
        log_probs, _ = self.look(images)
        return [ANSWERS[question][i] for i in log_probs[question].argmax(1).tolist()]

    def agrees(self, images: Sequence[Image.Image], question: str, expected: Sequence[str]) -> torch.Tensor:
        """1.0 where the answer is the expected one, else 0.0; (N,). For `activity`, where every part that the expected
        one has is right; where none is expected, both pose and things are.
        """
        if question == "activity":
            rest = (world.NO_ACTIVITY, world.NO_ACTIVITY)
            shown = [parts[:1] if parts == rest else world.shown_by(*parts) for parts in self._parts(images)]
            return torch.tensor([float(wanted in seen) for wanted, seen in zip(expected, shown, strict=True)])
        return torch.tensor([float(a == b) for a, b in zip(self.answers(images, question), expected, strict=True)])

    def _parts(self, images: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """(pose, things) of each picture."""
        log_probs, _ = self.look(images)
        named = [[ANSWERS[q][i] for i in log_probs[q].argmax(1).tolist()] for q in ("pose", "things")]
        return list(zip(*named, strict=True))

    def pick(self, images: Sequence[Image.Image], parade: Sequence[world.Subject], n_references: int = 8) -> list[int]:
        """Which individual of a line-up each picture shows: the index of the nearest one by mean identity
        vector of its own photos.
        """
        _, vectors = self.look(images)
        return (vectors @ self.centres(parade, n_references).T).argmax(1).tolist()

    def centres(self, parade: Sequence[world.Subject], n_references: int = 8) -> torch.Tensor:
        """The mean identity vector of photos of each individual of a line-up, unit length; (individuals, D)."""
        photos = [[render(scene) for scene in world.reference_scenes(one, n_references, seed=1)] for one in parade]
        return torch.stack([F.normalize(self.look(of_one)[1].mean(0), dim=0) for of_one in photos])

    def identifies(self, images: Sequence[Image.Image], subject: world.Subject, n_others: int = 7) -> torch.Tensor:
        """1.0 where the judge recognises `subject` in a line-up with `n_others` of its class, else 0.0; (N,)."""
        _, vectors = self.look(images)
        return self.recognised(vectors @ self.centres(world.line_up(subject, n_others + 1)).T).float()

    def recognised(self, likeness: torch.Tensor) -> torch.Tensor:
        """Whether the first of a line-up is shown, by the likeness to each (N, individuals); (N,) bool."""
        return (likeness.argmax(1) == 0) & (likeness[:, 0] >= self.card.get("threshold", -1.0))


def things_taken() -> tuple[float, int]:
    """How often the shipped judge takes a subject at rest among an activity's things for the activity: the share and
    the number of renders, from the model card of the pocket weights (a ModelError where it has none).
    """
    require_files("judge", POCKET_WEIGHTS, "card.json")
    with reading("judge", "card.json", POCKET_WEIGHTS):
        card = read_json(POCKET_WEIGHTS / "card.json")
        number = {number["name"]: number for number in card["numbers"]}[THINGS_TAKEN]
    return number["value"], number["n"]
