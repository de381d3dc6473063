"""The two scales as data. A preset is the only thing that differs between them: no method knows which one it runs at.

`sd15` holds the paper's values (InstructBooth, appendix C) wherever the paper gives them. `pocket` says, value by
value, where and why it differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ibkit.errors import ParameterError
from ibkit.methods.ddpo import DDPOConfig
from ibkit.methods.dreambooth import DreamBoothConfig
from ibkit.model.sample import Sampler
from ibkit.train.guard import Guard


@dataclass(frozen=True)
class Preset:
    """Everything that depends on the scale.

    Attributes:
        sampler: for evaluation and sample grids.
        class_sampler: for the class images of prior preservation, which should be as good as the base model draws.
        scorers: where the scorers' weights come from, see `ibkit.scorers.make_scorer`.
        activities: what RL trains on when the user names none.
        n_images: pictures for each prompt, method and seed in the evaluation.
        sample_every: epochs between sample grids.
        monitor: scorer of subject fidelity that is watched in training, and whose frontier with the text the guard
            follows.
        guard: of the RL stage.
        world: whether the subject can come from the pocket world, whose truth the judge knows.
    """

    dreambooth: DreamBoothConfig
    ddpo: DDPOConfig
    sampler: Sampler
    class_sampler: Sampler
    scorers: str
    activities: tuple[str, ...]
    n_images: int
    sample_every: int
    monitor: str
    guard: Guard
    world: bool


POCKET = Preset(
    dreambooth=DreamBoothConfig(
        n_steps=800,  # the trade of text against subject, by `python -m benchmarks.personalize`
        batch=4,  # 64 px pictures: four cost little more than one
        learning_rate=5e-4,  # a 6 M U-Net takes larger steps than one of 860 M
        prior_weight=0.3,  # at 1 the subject comes with the bare prompt alone, and an activity drives it out
        ema_decay=0.98,  # single steps of this size smear the pictures
        n_class_images=64,
        checkpoint_every=150,
    ),
    ddpo=DDPOConfig(
        n_epochs=40,  # minutes; with the weights of November 2026 not yet compared with more
        images_per_epoch=48,  # 12 for each of 2 activities x 2 kinds of prompt
        batch=24,  # half of them a gradient step, as in the paper
        sampler=Sampler(10, 2.0, 1.0),
        clip_range=2e-4,  # for larger steps than the paper's; at 1e-3 it learns faster and falls apart after 30 epochs
        learning_rate=4e-3,  # minutes instead of hours
        trained_share=0.8,  # 8 of 10 steps: the last but one would drown all others (notebook 02)
        subsample=0.6,  # 5 of those 8 for each image and gradient step
        ema_decay=0.9,  # evens out single gradient steps
        lora_rank=8,
        micro_batch=48,  # with guidance 96 rows of the U-Net, where two CPU cores are fastest a row (benchmarks/rl.py)
        stats_buffer=48,  # four epochs of a prompt, so the baseline follows the policy
        stats_min_count=8,
    ),
    # The base model follows prompts at 10 steps as well as at 15, and at guidance 2 as well as at 3; the overfitted
    # model does not, and stronger guidance hides that (its activity: 0.5 at 3, 0.1 at 2) and burns colours.
    sampler=Sampler(10, 2.0, 1.0),
    class_sampler=Sampler(15, 3.0, 1.0),
    scorers="pocket",
    activities=("playing soccer", "dancing"),  # poses that leave the subject in sight, so that identity can be judged
    n_images=30,
    sample_every=10,
    monitor="subject",
    guard=Guard(),
    world=True,
)

SD15 = Preset(
    dreambooth=DreamBoothConfig(),
    ddpo=DDPOConfig(),
    sampler=Sampler(50, 7.5, 1.0),
    class_sampler=Sampler(50, 7.5, 1.0),
    scorers="official",
    activities=("playing soccer", "riding a bike", "cooking a gourmet meal"),  # of the paper's own set
    n_images=10,  # the paper's 10 pictures for each of its 40 prompts
    sample_every=10,
    monitor="dino",
    guard=Guard(),
    world=False,
)

PRESETS = {"pocket": POCKET, "sd15": SD15}


def preset_of(model: str) -> Preset:
    """The preset of a model: its own, or `sd15`'s for a local folder in diffusers format."""
    return PRESETS.get(model, SD15)


def preset_of_run(model: str, base_model: str, folder: Path) -> Preset:
    """The preset of a model that a run is gone on from with.

    Args:
        model: what the user named.
        base_model: what the run in `folder` personalized.

    Raises:
        ParameterError: they are of different presets.
    """
    if preset_of(model) is not preset_of(base_model):
        raise ParameterError(
            f"{folder} personalized the model {base_model!r}, whose preset is not that of {model!r}: "
            f"give model={base_model!r} here too."
        )
    return preset_of(model)


# settings of which 0 is a value: without the KL divergence, without an average, without an end before the last epoch
ZERO_IS_A_VALUE = frozenset({"kl_weight", "ema_decay", "patience", "prior_weight"})


def override(config, **values):
    """A copy of a settings object with the values that are set; 0, "" and () stand for the preset's own, and where 0
    is a value, -1 does.
    """
    return replace(config, **{k: v for k, v in values.items() if (v != -1 if k in ZERO_IS_A_VALUE else v)})
