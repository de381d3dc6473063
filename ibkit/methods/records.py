"""What a method is: a record with its settings and its training, in one file, and one line in `METHODS`.

A training is a function of a model, a `Job` and settings. It puts one named delta on the model (`ibkit.adapt.attach`)
and returns its history; nothing else about it is known outside of its file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self

import torch
from PIL import Image

from ibkit.adapt import Adapted
from ibkit.data.prompts import Prompt
from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import ParameterError
from ibkit.fields import fill
from ibkit.methods.engine.objectives import RewardSpec
from ibkit.model.text_to_image import TextToImage
from ibkit.registry import Registry
from ibkit.train.guard import Guard
from ibkit.train.loop import Row
from ibkit.train.processes import Processes

Monitor = Callable[[list[Image.Image], list[Prompt]], dict[str, float]]  # numbers to watch, never the objective


@dataclass(frozen=True)
class Job:
    """All that a stage hands to a training, and that can be sent to another process.

    Attributes:
        start: the model to start from; the training is given it, built.
        subject: who it is about; photos: of it, at the model's size.
        name: of the delta that is trained.
        seed: of every random stream; folder: for checkpoints.
        class_pictures: by the base model, as many as the method asks for.
        prompts: of the tuning, of both kinds; of a personalization, those with the identifier.
        reward, subject_reward: what is optimised; None where there is none.
        guard: of the tuning.
    """

    start: Adapted
    subject: PersonalizedSubject
    photos: Sequence[Image.Image]
    name: str
    seed: int
    folder: Path
    class_pictures: Sequence[Image.Image] = ()
    prompts: Sequence[Prompt] = ()
    reward: RewardSpec | None = None
    subject_reward: RewardSpec | None = None
    guard: Guard | None = None


@dataclass(frozen=True)
class Work:
    """What a training does, for a prediction of its time and memory.

    Rows of U-Net passes without gradient (`forward`), with that of a few weights (`tuned`), with that of all
    (`trained`); `pictures` decoded and scored; rows in its largest pass that keeps a graph; and whether the decoder and
    the reward keep one too (`graph_pictures`).
    """

    forward: int = 0
    tuned: int = 0
    trained: int = 0
    pictures: int = 0
    graph_rows: int = 0
    graph_pictures: bool = False

    @classmethod
    def of(cls, kind: str, rows: int, **others: Any) -> Self:
        """That of `rows` with a gradient, of all weights where the delta is the U-Net, else of a few."""
        return cls(**{"trained" if kind == "unet" else "tuned": rows, **others})


class Train(Protocol):
    """How a training is called.

    Args:
        model: `job.start`, built; it gains the delta `job.name`.
        settings: the method's own.
        on_row: called after each step or epoch with its row and the model.
        monitor: see `ibkit.train.monitor`; for methods that draw pictures.
        processes: that train together, for methods that can.

    Returns:
        A row of numbers for each step or epoch.
    """

    def __call__(
        self,
        model: TextToImage,
        job: Job,
        settings: Any,
        *,
        on_row: Callable[[Row, TextToImage], None] | None = None,
        monitor: Monitor | None = None,
        processes: Processes | None = None,
    ) -> list[Row]: ...


def delta_of(settings: Any) -> tuple[str, dict[str, Any]]:
    """The delta of a method's settings: of their `kind`; without one, an adapter where they have a rank."""
    kind = getattr(settings, "kind", "lora" if hasattr(settings, "lora_rank") else "unet")
    return kind, {"rank": settings.lora_rank} if kind == "lora" else {}


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: as users write it; also the name of its arm.
        label: for tables and figures.
        stage: "personalize", from photos; or "tune", from a personalized model and a reward.
        settings: a frozen dataclass of `ibkit.fields.field`s, whose defaults are the paper's.
        train: see `Train`.
        source: the paper.
        pocket: what differs at the pocket world's scale, dotted name -> (value, why).
        names: how the trained model calls the subject; by default as the user does.
        class_pictures: settings -> how many pictures of the class the training wants.
        reward: name of the scorer that a personalization is handed as `Job.reward`; empty where it needs none.
        draws: whether a tuning draws pictures as it trains, by which a guard can stop it.
        refuses: names of reward and second reward, number of processes -> why a tuning cannot have them, or "".
        work: settings -> `Work`, without the class pictures.
        delta: settings -> kind and settings of the delta that is trained, without its words; see `delta_of`.
    """

    name: str
    label: str
    stage: Literal["personalize", "tune"]
    settings: type
    train: Train
    source: str
    pocket: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: MappingProxyType({}))
    names: Callable[[PersonalizedSubject], PersonalizedSubject] = lambda subject: subject
    class_pictures: Callable[[Any], int] = lambda settings: 0
    reward: str = ""
    draws: bool = True
    refuses: Callable[[str, str, int], str] = lambda reward, subject_reward, processes: ""
    work: Callable[[Any], Work] = lambda settings: Work()
    delta: Callable[[Any], tuple[str, Mapping[str, Any]]] = delta_of

    def configure(self, scale: str, given: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Settings at a scale, "pocket" or the paper's ("sd15"), with the values that a user gives by dotted name; a
        ParameterError for an unknown name or a value that is not allowed.
        """
        differs = {name: value for name, (value, _) in self.pocket.items()} if scale == "pocket" else {}
        return fill(fill(self.settings(), differs, f"Method {self.name}"), given, f"Method {self.name}")


METHODS: Registry[Method] = Registry(
    "ibkit.methods",
    "method",
    {
        "dreambooth": "ibkit.methods.dreambooth:METHOD",
        "lora_dreambooth": "ibkit.methods.lora_dreambooth:METHOD",
        "textual_inversion": "ibkit.methods.textual_inversion:METHOD",
        "custom_diffusion": "ibkit.methods.custom_diffusion:METHOD",
        "neti": "ibkit.methods.neti:METHOD",
        "dpg": "ibkit.methods.dpg:METHOD",
        "rpo": "ibkit.methods.rpo:METHOD",
        "ddpo": "ibkit.methods.ddpo:METHOD",
        "dpok": "ibkit.methods.dpok:METHOD",
        "draft": "ibkit.methods.reward_gradient:DRAFT",
        "refl": "ibkit.methods.reward_gradient:REFL",
        "feedback": "ibkit.methods.feedback:METHOD",
    },
)


def find_method(name: str, stage: str) -> Method:
    """The method of a name; a ParameterError where there is none, or where it belongs to another stage."""
    method = METHODS.find(name)
    if method.stage != stage:
        fitting = [other for other in METHODS if METHODS[other].stage == stage]
        raise ParameterError(f"{name} is a method to {method.stage}: to {stage}, choose one of {', '.join(fitting)}.")
    return method


def check_job(method: Method, job: Job, processes: Processes | None = None) -> None:
    """Refuse what a tuning cannot have of a job, see `check_tuning`."""
    reward, subject_reward = (spec.name if spec else "" for spec in (job.reward, job.subject_reward))
    patience = job.guard.patience if job.guard else 0
    check_tuning(method, reward, subject_reward, processes.count if processes else 1, patience)


def check_tuning(method: Method, reward: str, subject_reward: str, processes: int, patience: int) -> None:
    """Raise ParameterError where a tuning cannot have these rewards, so many processes, or a guard that stops it."""
    if patience and not method.draws:
        raise ParameterError(
            f"{method.name} draws its pictures before the training, not in it, and has no frontier to stop by: leave "
            "guard.patience at 0."
        )
    if sentence := method.refuses(reward, subject_reward, processes):
        raise ParameterError(sentence)


def named(subject: PersonalizedSubject, arm: str) -> PersonalizedSubject:
    """The subject as the models of a chain of methods call it."""
    for method in arm.split("+"):
        subject = METHODS[method].names(subject) if method in METHODS else subject
    return subject


def help_train(processes: Processes, device: torch.device, name: str, job: Job, settings: Any) -> None:
    """Be one of the processes that help the first, whose training has the same arguments; see `processes.start`."""
    METHODS.find(name).train(job.start.build(device), job, settings, processes=processes)
