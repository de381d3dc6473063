"""Watching what the reward does not see: subject fidelity, and in the pocket world the judge's answers.

Its numbers are drawn beside the reward while a model trains; they are never part of the objective. A reward that rises
while they fall is being hacked.
"""

from collections.abc import Sequence

from PIL import Image

from ibkit.data.prompts import Prompt
from ibkit.data.subject import PersonalizedSubject
from ibkit.pocket.words import said_in
from ibkit.scorers.base import Scorer
from ibkit.scorers.judge import Judge


class SubjectMonitor:
    """(images, prompts) -> numbers of an epoch; see `ibkit.methods.ddpo.train`.

    Args:
        subject: whose pictures they should be.
        references: its photos.
        scorer: similarity to the references, such as DINO.
        judge: asked as well where the truth is known; None for a user's photos.
        text_scorer: a text scorer that is not the reward, such as CLIP-T; None to do without.

    A call returns `monitor` and `text_monitor`, the two scorers' means over the pictures made with the identifier (the
    text scorer reads the prompt without it). With a judge it adds shares: `judge_activity` and `judge_identity` of
    those pictures, and `judge_activity_class` of the others. A kind of prompt without pictures has no number, and only
    prompts that name an activity count in its shares.
    """

    def __init__(
        self,
        subject: PersonalizedSubject,
        references: Sequence[Image.Image],
        scorer: Scorer,
        judge: Judge | None = None,
        text_scorer: Scorer | None = None,
    ):
        self.subject, self.references, self.scorer = subject, list(references), scorer
        self.text_scorer = text_scorer
        self.judge = judge if subject.world else None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, float]:
        pairs = list(zip(images, prompts, strict=True))
        named, others = ([pair for pair in pairs if bool(pair[1].identifier) == kind] for kind in (True, False))
        numbers = {}
        if named:
            pictures = [image for image, _ in named]
            numbers["monitor"] = self.scorer(pictures, references=self.references).mean().item()
            if self.text_scorer:
                clean = [prompt.clean for _, prompt in named]
                numbers["text_monitor"] = self.text_scorer(pictures, texts=clean).mean().item()
            numbers |= self._activity_shown("judge_activity", named)
            if self.judge and self.subject.world:
                numbers["judge_identity"] = self.judge.identifies(pictures, self.subject.world).mean().item()
        return numbers | self._activity_shown("judge_activity_class", others)

    def _activity_shown(self, name: str, pairs: Sequence[tuple[Image.Image, Prompt]]) -> dict[str, float]:
        """The share of pictures that show the activity that their prompt names, of those whose prompt names one."""
        asked = [(image, said_in(prompt.activity)["activity"]) for image, prompt in pairs]
        images = [image for image, activity in asked if activity]
        if not images or self.judge is None:
            return {}
        answers = self.judge.agrees(images, "activity", [activity for _, activity in asked if activity])
        return {name: answers.mean().item()}
