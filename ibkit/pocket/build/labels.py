"""Generated pictures that were labelled by looking at them, and how far the judge agrees.

Renders and their reconstructions say what the judge can see; pictures of models are what it is used on. `labelled/`
holds them as one sheet, row by row, and `labels.csv`: a row a picture and pass, with the labels of one look that knew
neither the model nor the prompt, only the photos of the subject. Two passes by different labellers say how far such
labels can be trusted.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from ibkit.pocket.world import DEMO_SUBJECTS, IMAGE_PX
from ibkit.scorers.judge import Judge

FOLDER = Path(__file__).parent / "labelled"
COLUMNS = 20  # pictures in a row of the sheet
QUESTIONS = ("class", "pose", "things", "identity")
UNCLEAR = "unclear"  # what a labeller says of a picture that shows no answer; it counts in no agreement


def pictures() -> list[Image.Image]:
    """The labelled pictures, in the order of their numbers."""
    sheet = Image.open(FOLDER / "pictures.webp").convert("RGB")
    n = pd.read_csv(FOLDER / "labels.csv")["picture"].max() + 1
    corners = [(i % COLUMNS * IMAGE_PX, i // COLUMNS * IMAGE_PX) for i in range(n)]
    return [sheet.crop((x, y, x + IMAGE_PX, y + IMAGE_PX)) for x, y in corners]


def labels() -> pd.DataFrame:
    """One row a picture and pass: picture, model, subject, labeller (1, 2), class, pose, things, identity (yes, no)."""
    return pd.read_csv(FOLDER / "labels.csv", keep_default_na=False)


def answers(judge: Judge, images: list[Image.Image], subjects: list[str]) -> pd.DataFrame:
    """What the judge says of the same pictures, in the words of the labels; a column a question."""
    said = pd.DataFrame({question: judge.answers(images, question) for question in QUESTIONS[:-1]})
    said["identity"] = ""
    for noun in dict.fromkeys(subjects):
        rows = [i for i, subject in enumerate(subjects) if subject == noun]
        same = judge.identifies([images[i] for i in rows], DEMO_SUBJECTS[noun])
        said.loc[rows, "identity"] = ["yes" if right else "no" for right in same]
    return said


def agreement(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Question -> share of pictures with the same answer, and how many have a clear one in both."""
    found = {}
    for question in QUESTIONS:
        clear = (first[question] != UNCLEAR) & (second[question] != UNCLEAR)
        found[question] = (float((first[question] == second[question])[clear].mean()), int(clear.sum()))
    return found


def card_rows(judge: Judge) -> list[tuple[str, float, float | None, int]]:
    """Rows of the model card: the judge against the first pass of labels, and the second pass against the first."""
    table = labels()
    first, second = (table[table["labeller"] == k].sort_values("picture", ignore_index=True) for k in (1, 2))
    judged = answers(judge, pictures(), list(first["subject"]))
    rows = [
        (f"judge, {q}, generated pictures, agreement with labels", share, 0.9, n)
        for q, (share, n) in agreement(first, judged).items()
    ]
    return rows + [
        (f"labels of generated pictures, {q}, agreement of two passes", share, None, n)
        for q, (share, n) in agreement(first, second).items()
    ]
