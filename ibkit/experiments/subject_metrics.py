"""Subject metrics that know where the subject is: they read DINO's patches inside a true or an estimated mask.

DINO's usual score compares one vector a picture, the class token, which has seen the whole picture: pose, things and
background too. `ibkit.scorers.subject` has two metrics of the patches that need no mask.

Shapes: N pictures, L patches.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from ibkit.errors import ScoreError
from ibkit.pocket.draw import subject_mask
from ibkit.pocket.world import Scene
from ibkit.scorers.base import Scorer, mean_cosine, rgb_square
from ibkit.scorers.dino import Dino
from ibkit.scorers.subject import LAST_LAYER, patch_tokens

# Which patches show the subject: N pictures -> weights (N, L) in [0, 1].
Foreground = Callable[[Sequence[Image.Image]], torch.Tensor]


class TrueMask:
    """Foreground from the pocket world's truth: which share of each of DINO's patches the subject covers. An oracle.

    Args:
        pictures: scene -> its picture (or that picture's reconstruction); other pictures have no truth.
    """

    def __init__(self, dino: Dino, pictures: Mapping[Scene, Image.Image]) -> None:
        self.dino = dino
        self._scenes = {picture.tobytes(): scene for scene, picture in pictures.items()}

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Weights (N, L); a ScoreError for a picture whose scene is not known."""
        patch = self.dino.model.config.patch_size
        shares = []
        for i, image in enumerate(images):
            if image.tobytes() not in self._scenes:
                raise ScoreError(
                    f"Where the subject is in image {i} is not known: the true mask is for pictures of the "
                    "pocket world; use FoundMask for others."
                )
            mask = subject_mask(self._scenes[image.tobytes()])
            square = np.asarray(rgb_square(mask, self.dino.resize_px, self.dino.image_px))[..., 0] / 255.0
            side = len(square) // patch
            shares.append(square.reshape(side, patch, side, patch).mean((1, 3)).ravel())
        return torch.from_numpy(np.stack(shares)).float().to(self.dino.device)


class FoundMask:
    """Foreground of any picture: the patches least like any patch at its left, right or upper edge.

    It assumes that the edge shows background and that the subject fills about `share` of the picture.
    """

    def __init__(self, dino: Dino, share: float = 0.25) -> None:
        self.dino, self.share = dino, share

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Weights (N, L), 0 or 1."""
        tokens = normalize(patch_tokens(self.dino, images), dim=-1)
        n_images, n_patches, _ = tokens.shape
        side = round(n_patches**0.5)
        row, column = torch.arange(n_patches) // side, torch.arange(n_patches) % side
        edge = ((row == 0) | (column == 0) | (column == side - 1)).to(tokens.device)
        likeness = (tokens @ tokens[:, edge].transpose(1, 2)).amax(2).masked_fill(edge, torch.inf)
        chosen = likeness.argsort(1)[:, : round(self.share * n_patches)]
        return torch.zeros(n_images, n_patches, device=tokens.device).scatter_(1, chosen, 1.0)


def show_mask(picture: Image.Image, weights: torch.Tensor) -> Image.Image:
    """The picture, darkened outside the mask; weights (L,) of a square of patches."""
    side = round(len(weights) ** 0.5)
    light = Image.fromarray((weights.cpu().view(side, side) * 200 + 55).round().byte().numpy())
    light = light.resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), light)


class MaskedMean(Scorer):
    """Cosine of the mean patch tokens inside the subject's masks; a picture whose mask is empty scores 0.

    Args:
        foreground: `TrueMask` or `FoundMask`.
        layer: see `patch_tokens`. A patch of a late layer has attended to the whole picture; a mask cannot undo that.
    """

    name = "masked"
    needs = frozenset({"references"})

    def __init__(self, dino: Dino, foreground: Foreground, layer: int) -> None:
        self.dino, self.foreground, self.layer = dino, foreground, layer
        which = "last layer" if layer == LAST_LAYER else f"layer {layer}"
        kind = type(foreground).__name__
        self.evaluator = f"{dino.evaluator.split(',')[0]}, {which}, mean patch token inside the {kind}"

    def _describe(self, images: Sequence[Image.Image]) -> torch.Tensor:
        weights = self.foreground(images)[..., None]
        return normalize((patch_tokens(self.dino, images, self.layer) * weights).sum(1), dim=-1)

    def _score(self, images, texts, references):
        return mean_cosine(self._describe(images), self._describe(references))
