"""Subject fidelity that forgives a new pose: from DINO's patches, where the DINO score compares one token a picture.

Two scorers go by the name `subject`. In the pocket world it is a small head on the pocket DINO's patches, trained to
tell individuals apart whatever they do and wherever they are (`ibkit.pocket.build.subject`; apart from the judge). It
knows the pocket world's subjects and no others. On photos, where no such head exists, it is the matching of patches,
which needs no training and says so in its evaluator.

Shapes: N pictures, R reference photos, L patches, D token width, E embedding width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ibkit.errors import ModelError
from ibkit.runs import hash_file, read_json
from ibkit.scorers import base
from ibkit.scorers.dino import Dino

LAST_LAYER = -1


def middle_layer(dino: Dino) -> int:
    """The number of transformer layers that make up the first half of the network."""
    return dino.model.config.num_hidden_layers // 2


@torch.inference_mode()
def patch_tokens(dino: Dino, images: Sequence[Image.Image], layer: int = LAST_LAYER) -> torch.Tensor:
    """DINO's patch tokens (N, L, D) on its device, of pictures preprocessed as for its score; rows of patches from the
    top, each from the left.

    Args:
        layer: tokens after so many layers; `LAST_LAYER` = after all of them and the final norm, as DINO's score uses.
    """
    parts = base.batches(list(images), dino.batch_size)
    return torch.cat([tokens_of(dino.model, dino.pixels(part), layer) for part in parts])


def tokens_of(model: nn.Module, pixels: torch.Tensor, layer: int = LAST_LAYER) -> torch.Tensor:
    """The same of a ViT's normalised input (N, 3, H, W)."""
    output = model(pixel_values=pixels, output_hidden_states=layer != LAST_LAYER)
    found = output.last_hidden_state if layer == LAST_LAYER else output.hidden_states[layer]
    return found[:, 1:].float()


# --- on photos: patch matching ---------------------------------------------------------------------------------


def best_match(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over the patches of a picture (N, L, D) of the best cosine among those of another picture (L, D), both ways;
    (N,).
    """
    cosines = normalize(a, dim=-1) @ normalize(b, dim=-1).T  # (N, L of a, L of b)
    return (cosines.amax(2).mean(1) + cosines.amax(1).mean(1)) / 2


class PatchMatch(base.Scorer):
    """Every patch looks for its like in the other picture, wherever it is; needs no training and no truth.

    Only where a patch moved is forgiven. The background counts as much as the subject, patch for patch.
    """

    name = "subject"
    needs = frozenset({"references"})

    def __init__(self, dino: Dino) -> None:
        self.dino = dino
        self.evaluator = f"{_eye(dino, 'last')}; patch matching, no training"
        self._references = base.ReferenceCache(lambda photos: patch_tokens(dino, photos))

    def _score(self, images, texts, references):
        tokens = patch_tokens(self.dino, images)
        return torch.stack([best_match(tokens, photo) for photo in self._references(references)]).mean(0)


# --- in the pocket world: a learned head -----------------------------------------------------------------------


class IdentityHead(nn.Module):
    """Attention pooling of patch tokens with a few learned queries ("questions"), then a linear layer.

    Args:
        n_in: D, the width of a token.
        width: of a patch's value.
        n_out: E.
        n_questions: queries; each can look at another place of the picture.
    """

    def __init__(self, n_in: int, width: int = 192, n_out: int = 64, n_questions: int = 8) -> None:
        super().__init__()
        self.sizes = {"n_in": n_in, "width": width, "n_out": n_out, "n_questions": n_questions}
        self.norm = nn.LayerNorm(n_in)
        self.say = nn.Sequential(nn.Linear(n_in, width), nn.GELU(), nn.Linear(width, width))
        self.ask = nn.Linear(n_in, n_questions)
        self.out = nn.Linear(n_questions * width, n_out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens (N, L, D) -> embeddings of unit length (N, E)."""
        tokens = self.norm(tokens)
        weights = self.ask(tokens).softmax(dim=1)  # (N, L, questions)
        answers = torch.einsum("nlq,nlw->nqw", weights, self.say(tokens))
        return normalize(self.out(answers.flatten(1)), dim=-1)


class SubjectFidelity(base.Scorer):
    """Mean cosine of the picture's embedding with those of all reference photos, embedded by a trained head.

    Args:
        dino: the frozen network that the head reads, after the middle layer.
        head: of individuals; it knows the kinds of subjects that it was trained on.
        evaluator: the head in words.
    """

    name = "subject"
    needs = frozenset({"references"})

    def __init__(self, dino: Dino, head: IdentityHead, evaluator: str = "subject head") -> None:
        self.dino, self.head = dino, head.to(dino.device).eval().requires_grad_(False)
        self.evaluator = f"{_eye(dino, 'middle')}; {evaluator}"
        self._references = base.ReferenceCache(self.embed)

    @classmethod
    def load(cls, weights: str | Path, device: str | torch.device = "cpu") -> base.Scorer:
        """A trained head where the weights have one (`subject/`), else `PatchMatch` on their DINO; see `make_scorer`. A
        head that was trained on another DINO is a ModelError, too.
        """
        dino = Dino.load(weights, device)
        if str(weights) == "official":
            return PatchMatch(dino)
        folder = base.weights_folder(cls.name, weights, "subject")
        if str(weights) != "pocket" and not folder.is_dir():
            return PatchMatch(dino)
        base.require_files(cls.name, folder, "subject.safetensors", "subject.json")
        with base.reading(cls.name, "subject.safetensors and subject.json", folder):
            card = read_json(folder / "subject.json")
            head = IdentityHead(**card["sizes"])
            base.load_state(head, folder / "subject.safetensors")
            auc = card["auc"]["renders"]
        if card["dino"] != hash_file(folder.parent / "dino" / "model.safetensors"):
            raise ModelError(
                f"{cls.name}: the head in {folder} was trained on another DINO than the one beside it: restore both, "
                "or build the head again (python -m ibkit.pocket.build --stages subject)."
            )
        told = ", ".join(f"{change} {value:.3f}" for change, value in auc.items())
        n = card["n"]
        return cls(dino, head, f"subject head; AUC, same over other individual, on n = {n} unseen individuals: {told}")

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embed pictures: (N, E) of unit length, on DINO's device."""
        return self.head(patch_tokens(self.dino, images, middle_layer(self.dino)))

    def _score(self, images, texts, references):
        return base.mean_cosine(self.embed(images), self._references(references))


def _eye(dino: Dino, layer: str) -> str:
    """DINO's evaluator, with the patches of a layer in the place of the class token."""
    return dino.evaluator.replace("class token", f"patches after the {layer} layer")
