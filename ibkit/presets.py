"""The two scales as data. A preset, and what a method's record says of the pocket world, is all that differs between
them: no method knows which one it runs at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ibkit.errors import ParameterError
from ibkit.fields import fill
from ibkit.methods.records import METHODS
from ibkit.model.sample import Sampler
from ibkit.train.guard import Guard


@dataclass(frozen=True)
class Preset:
    """Everything that depends on the scale.

    Attributes:
        name: of the scale.
        sampler: for evaluation and sample grids.
        class_sampler: for the class images of prior preservation, which should be as good as the base model draws.
        personalize: the method of notebook 01 when the user names none.
        scorers: where the scorers' weights come from, see `ibkit.scorers.make_scorer`.
        activities: what RL trains on when the user names none.
        n_images: pictures for each prompt, method and seed in the evaluation.
        sample_every: epochs between sample grids.
        monitor: scorer of subject fidelity that is watched in training, and whose frontier with the text the guard
            follows.
        guard: of the RL stage.
        world: whether the subject can come from the pocket world, whose truth the judge knows.
    """

    name: str
    sampler: Sampler
    class_sampler: Sampler
    personalize: str
    scorers: str
    activities: tuple[str, ...]
    n_images: int
    sample_every: int
    monitor: str
    guard: Guard
    world: bool

    def settings(self, method: str, given: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """A method's settings at this scale, with the values that are given; see `Method.configure`."""
        return METHODS.find(method).configure(self.name, given)

    def filled(self, parameters: Any) -> str:
        """What this preset gives where a notebook's parameters leave it open, in a sentence for people."""
        given = vars(parameters)
        own = {"scorer_weights": self.scorers, "prompts": list(self.activities), "n_images": self.n_images}
        own |= {"n_inference_steps": self.sampler.n_steps, "guidance": self.sampler.guidance, "eta": self.sampler.eta}
        own |= {"sample_every": self.sample_every}
        said = [
            f"{name} = {value!r}" for name, value in own.items() if name in given and given[name] in ("", 0, -1, [])
        ]
        return f"of the preset {self.name}: {', '.join(said) or 'nothing'}"

    def drawing(self, given: Mapping[str, Any]) -> Preset:
        """This preset, whose two samplers have what a notebook's parameters give of a sampler: n_inference_steps, where
        0 leaves the preset's; guidance and eta, where -1 does. A value that no sampler has is a ParameterError.
        """
        chosen = {"n_steps": given["n_inference_steps"] or -1, "guidance": given["guidance"], "eta": given["eta"]}
        chosen = {name: value for name, value in chosen.items() if value != -1}
        sampler, class_sampler = (fill(one, chosen, "The sampler") for one in (self.sampler, self.class_sampler))
        return replace(self, sampler=sampler, class_sampler=class_sampler)


POCKET = Preset(
    name="pocket",
    # The base model follows prompts at 10 steps as well as at 15, and at guidance 2 as well as at 3; the overfitted
    # model does not, and stronger guidance hides that (its activity: 0.5 at 3, 0.1 at 2) and burns colours.
    sampler=Sampler(10, 2.0, 1.0),
    class_sampler=Sampler(15, 3.0, 1.0),
    # starts like the paper's DreamBooth, with the subject and a part of the prompts: benchmarks/personalize.py
    personalize="lora_dreambooth",
    scorers="pocket",
    # Poses that leave the subject in sight, so that identity can be judged; of the cat the personalization keeps the
    # first and loses the second.
    activities=("playing soccer", "playing tennis"),
    n_images=30,
    sample_every=10,
    monitor="subject",
    guard=Guard(),
    world=True,
)

SD15 = Preset(
    name="sd15",
    sampler=Sampler(50, 7.5, 1.0),
    class_sampler=Sampler(50, 7.5, 1.0),
    personalize="dreambooth",
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
    """The preset of a model: its own, or `sd15`'s for any other of Stable Diffusion's kind."""
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
