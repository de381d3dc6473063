"""The subject of a run: what later notebooks have to know of the subject that the first one personalized."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ibkit.data.prompts import Prompt, make_prompt, subject_phrase
from ibkit.errors import ArtifactError, ParameterError
from ibkit.pocket.words import check_phrase
from ibkit.pocket.world import DEMO_SUBJECTS, Subject, activities_of, reference_scenes
from ibkit.runs import CompletedRun, Run, input_of, read_json

FILE = "subject.json"


@dataclass(frozen=True)
class PersonalizedSubject:
    """A subject and the words for it.

    Attributes:
        name: for tables and figures.
        class_noun, identifier, description, alone: see `subject_phrase`.
        base_model, base_revision: the model that was personalized.
        world: the individual of the pocket world, which the judge can recognise; None for a user's photos.
    """

    name: str
    class_noun: str
    identifier: str
    description: str
    base_model: str
    base_revision: str
    world: Subject | None
    alone: bool = False

    @property
    def instance_prompt(self) -> str:
        """The prompt that names the subject, "a sks cat"."""
        return subject_phrase(self.class_noun, self.identifier, self.description, self.alone)

    @property
    def class_prompt(self) -> str:
        """The prompt of prior preservation, "a cat"."""
        return subject_phrase(self.class_noun)

    def prompt(self, activity: str, identifier: bool = True) -> Prompt:
        """The prompt for an activity, about the subject or, without `identifier`, about any individual of its class."""
        if not identifier:
            return make_prompt(activity, self.class_noun)
        return make_prompt(activity, self.class_noun, self.identifier, self.description, self.alone)

    def save(self, run: Run) -> None:
        """Write `subject.json` as an output of the run."""
        run.write_json(FILE, dataclasses.asdict(self))

    @staticmethod
    def read(run: CompletedRun) -> "PersonalizedSubject":
        """Read it from a finished run; an ArtifactError where it has no `subject.json`, or one that another version of
        ibkit wrote.
        """
        path = run.path(FILE)
        try:
            values = read_json(path)
            world = values.pop("world")
            return PersonalizedSubject(**values, world=Subject(**world) if world else None)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} does not describe a subject ({error}); run 01_personalize again.") from error


def personalization_of(run: CompletedRun) -> CompletedRun:
    """The run of notebook 01 that a run of 01 or 02 is based on: it holds the subject and the photos. An ArtifactError
    where it is missing or not finished.
    """
    return run if run.kind == "01_personalize" else input_of(run, "run_in", "01_personalize")


def choose_activities(subject: PersonalizedSubject, asked: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The activities to train or evaluate on: those asked for, else the usual ones, without duplicates.

    A subject of the pocket world gets only those of the usual ones that its class can do, or the first two of its class
    if there are none (a pot plays no soccer); asked for one that it does not know, or not of this class, it is a
    ParameterError.
    """
    if subject.world is None:
        return list(dict.fromkeys(asked or usual))
    possible = activities_of(subject.class_noun)
    for phrase in asked:
        try:
            check_phrase(subject.class_noun, phrase)
        except ValueError as error:
            raise ParameterError(str(error)) from None
    return list(dict.fromkeys(asked)) or [a for a in usual if a in possible] or list(possible[:2])


def demo_subject(class_noun: str) -> Subject:
    """The pocket world's own individual of a class; a ParameterError where it has no such class."""
    if class_noun not in DEMO_SUBJECTS:
        raise ParameterError(
            f"the pocket world has no {class_noun!r} to personalize: choose a class_noun of "
            f"{', '.join(DEMO_SUBJECTS)}, or give a folder of photos as the subject."
        )
    return DEMO_SUBJECTS[class_noun]


def world_photos(subject: Subject, n: int = 5) -> list[Image.Image]:
    """Photos of a subject of the pocket world: at rest, in two places, without accessories."""
    from ibkit.pocket.draw import render

    return [render(scene) for scene in reference_scenes(subject, n)]
