"""NeTI (Alaluf et al. 2023, arXiv 2305.15391): a learned word that means something else at every denoising step and
layer.

As Textual Inversion, but what is trained is a small network (t, ℓ) -> word instead of the word's row; see
`ibkit.model.mapper` for the network, nested dropout and the textual bypass.

Settings follow the authors' code. Differs from it: photos, latents and weight decay as in `textual_inversion`.
"""

from dataclasses import dataclass

import torch

from ibkit.fields import field
from ibkit.methods import textual_inversion
from ibkit.methods.records import Method
from ibkit.methods.textual_inversion import WordConfig
from ibkit.model.mapper import N_UNITS, NORMS


@dataclass(frozen=True)
class NeTIConfig(WordConfig):
    """Settings; the defaults are those of the authors' code, with its scaled learning rate."""

    n_steps: int = field(1000, "training steps", "NeTI's code", low=1, high=1_000_000)
    batch: int = field(8, "photos in a step", "NeTI's code: 2 × 4 steps of accumulation", low=1, high=1024)
    learning_rate: float = field(8e-3, "of AdamW, constant", "NeTI's code: 1e-3 × 8", low=0.0, high=1.0)
    weight_decay: float = field(0.01, "of AdamW", "NeTI's code", low=0.0, high=1.0)
    norm: str = field("whole", "what is scaled to the class word's norm", "NeTI's code; the paper: word", choices=NORMS)
    truncate: int = field(0, "hidden units that pictures use, 0 = all; fewer edit better", "NeTI", low=0, high=N_UNITS)


def personalize(model, job, settings, *, on_row=None, monitor=None, processes=None) -> list[dict[str, float]]:
    """See `records.Train`."""
    word = {"word": job.subject.identifier, "start": textual_inversion.start_word(job.subject, settings.start)}
    word |= {"seed": job.seed, "norm": settings.norm, "truncate": settings.truncate}

    def drop_units(stream: torch.Generator | None) -> None:
        model.mapped.mapper.dropout = stream

    history = textual_inversion.train_word(model, job, settings, on_row, "mapper", word, drop_units)
    drop_units(None)
    return history


METHOD = Method(
    name="neti",
    label="NeTI",
    stage="personalize",
    settings=NeTIConfig,
    train=personalize,
    source="Alaluf et al. 2023, arXiv 2305.15391",
    names=textual_inversion.learned_word,
    pocket={
        "n_steps": (400, "minutes; the teddy bear is known in 30 % after 200 and in 40 % after 400"),
        "flip": (0.0, "the pocket world's places are never mirrored, and the model cannot draw them so"),
        "templates": ("plain", "captions of words that the pocket model knows"),
    },
    work=textual_inversion.work,
    delta=lambda settings: ("mapper", {"norm": settings.norm}),
)
