"""Subject metrics beside DINO's class token: from all patches, and from the subject's patches.

DINO's usual score compares one vector a picture, the class token, which has seen the whole picture: pose, things and
background too. What is here compares patch tokens of the same frozen network; `ibkit.experiments.subject_head` trains a
small network on them. Each is a `Scorer`, called as `scorer(images, references=photos)`.

Shapes: N pictures, R reference photos, L patches, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from ibkit.errors import ScoreError
from ibkit.pocket.draw import subject_mask
from ibkit.pocket.world import Scene
from ibkit.scorers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Scorer,
    batches,
    mean_cosine,
    rgb_square,
    to_pixel_values,
)
from ibkit.scorers.dino import Dino

LAST_LAYER = -1

# Says which patches show the subject: N pictures -> weights (N, L) in [0, 1].
Foreground = Callable[[Sequence[Image.Image]], torch.Tensor]


def middle_layer(dino: Dino) -> int:
    """The number of transformer layers that make up the first half of the network."""
    return dino.model.config.num_hidden_layers // 2


@torch.inference_mode()
def patch_tokens(dino: Dino, images: Sequence[Image.Image], layer: int = LAST_LAYER) -> torch.Tensor:
    """DINO's patch tokens (N, L, D) on its device; rows of patches from the top, each from the left.

    Args:
        dino: preprocessing is that of its own score.
        images: N pictures of any size.
        layer: tokens after so many layers; `LAST_LAYER` = after all of them and the final norm, as DINO's score uses.
    """
    tokens = []
    for batch in batches(list(images), dino.batch_size):
        pixels = to_pixel_values(batch, dino.resize_px, dino.image_px, IMAGENET_MEAN, IMAGENET_STD).to(dino.device)
        output = dino.model(pixel_values=pixels, output_hidden_states=layer != LAST_LAYER)
        found = output.last_hidden_state if layer == LAST_LAYER else output.hidden_states[layer]
        tokens.append(found[:, 1:].float())
    return torch.cat(tokens)


# --- 1. patch matching -----------------------------------------------------------------------------------------


def best_match(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over the patches of a picture of the best cosine among the other picture's patches, both ways.

    Args:
        a: tokens (N, L, D).
        b: tokens of one picture, (L, D).

    Returns:
        (N,)
    """
    cosines = normalize(a, dim=-1) @ normalize(b, dim=-1).T  # (N, L of a, L of b)
    return (cosines.amax(2).mean(1) + cosines.amax(1).mean(1)) / 2


class PatchMatch(Scorer):
    """Every patch looks for its like in the other picture, wherever it is; needs no training and no truth.

    Only where a patch moved is forgiven. The background counts as much as the subject, patch for patch.
    """

    name = "patch_match"
    needs = frozenset({"references"})

    def __init__(self, dino: Dino) -> None:
        self.dino = dino
        self.evaluator = f"{dino.evaluator.split(',')[0]}, last layer, best match of every patch"

    def _score(self, images, texts, references):
        tokens = patch_tokens(self.dino, images)
        return torch.stack([best_match(tokens, photo) for photo in patch_tokens(self.dino, references)]).mean(0)


# --- 2. the subject's patches ----------------------------------------------------------------------------------


class TrueMask:
    """Foreground from the pocket world's truth: which share of a patch the subject covers. An oracle.

    Args:
        dino: whose patches are meant.
        pictures: scene -> its picture (or that picture's reconstruction); other pictures have no truth.
    """

    def __init__(self, dino: Dino, pictures: Mapping[Scene, Image.Image]) -> None:
        self.dino = dino
        self._scenes = {picture.tobytes(): scene for scene, picture in pictures.items()}

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Weights (N, L).

        Raises:
            ScoreError: a picture whose scene is not known.
        """
        unknown = [i for i, image in enumerate(images) if image.tobytes() not in self._scenes]
        if unknown:
            raise ScoreError(
                f"Where the subject is in image {unknown[0]} is not known: the true mask is for pictures of the "
                "pocket world; use FoundMask for others."
            )
        patch = self.dino.model.config.patch_size
        shares = []
        for image in images:
            mask = subject_mask(self._scenes[image.tobytes()])
            square = np.asarray(rgb_square(mask, self.dino.resize_px, self.dino.image_px))[..., 0] / 255.0
            side = len(square) // patch
            shares.append(square.reshape(side, patch, side, patch).mean((1, 3)).ravel())
        return torch.from_numpy(np.stack(shares)).float().to(self.dino.device)


class FoundMask:
    """Foreground of any picture: the patches least like any patch at its left, right or upper edge.

    It supposes that the edge shows background and that the subject fills about `share` of the picture.
    """

    def __init__(self, dino: Dino, share: float = 0.25) -> None:
        self.dino = dino
        self.share = share

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
    """The picture with what is outside of the mask darkened; weights (L,) of a square of patches."""
    side = round(len(weights) ** 0.5)
    light = Image.fromarray((weights.cpu().view(side, side) * 200 + 55).round().byte().numpy())
    return Image.composite(
        picture, Image.new("RGB", picture.size), light.resize(picture.size, Image.Resampling.NEAREST)
    )


class MaskedMean(Scorer):
    """Cosine of the mean patch token inside the subject's mask; a picture whose mask is empty scores 0.

    Args:
        dino: the frozen network.
        foreground: `TrueMask` or `FoundMask`.
        layer: see `patch_tokens`. A late layer's patch has looked at the whole picture, and a mask cannot undo that.
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
