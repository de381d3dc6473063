"""How natural pictures are, and how different, from their embeddings: without labels or references of their own.

Shapes: N pictures, M true pictures, D embedding width.
"""

from collections.abc import Sequence

import torch

from ibkit.errors import ScoreError


def precision(pictures: torch.Tensor, true: torch.Tensor, k: int = 3) -> torch.Tensor:
    """1.0 where a picture (N, D) lies among true ones (M, D), else 0.0; (N,). A ScoreError where there are too few true
    ones.

    It does where it is as near to one of them as that one's own k-th neighbour among them. The mean is the improved
    precision of Kynkäänniemi et al. 2019 (equation 1, k = 3); embeddings there are VGG-16's, here any.
    """
    if len(true) <= k:
        raise ScoreError(f"the precision needs more than {k} true pictures, and there are {len(true)}.")
    radius = torch.cdist(true, true).kthvalue(k + 1, dim=1).values  # the nearest is the picture itself
    return (torch.cdist(pictures, true) <= radius).any(1).float()


def diversity(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """For each picture (N, D), unit length, 1 - its mean cosine to the others of its prompt; NaN where it is alone."""
    found = torch.full((len(pictures),), torch.nan)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([i for i, one in enumerate(prompts) if one == prompt])
        if len(rows) > 1:
            likeness = pictures[rows] @ pictures[rows].T
            found[rows] = 1 - (likeness.sum(1) - likeness.diagonal()) / (len(rows) - 1)
    return found
