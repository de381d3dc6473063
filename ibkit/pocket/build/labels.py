"""Generated pictures that were labelled by looking at them, and the judge's agreement with the labels.

Renders and reconstructions measure what the judge can see, but it is used on generated pictures. `labelled/` holds such
pictures as one sheet, row by row, and `labels.csv` with a row for each picture and labeller. The labellers saw the
photos of the subject, but neither model nor prompt. The agreement of the two shows how far the labels can be trusted;
both are passes of a vision-language model that knew nothing of each other, so people may agree less.
The sheet is a JPEG, for its size; the judge is measured on these very pixels.
"""

from pathlib import Path

import pandas as pd
from PIL import Image

from ibkit.pocket.build.common import Row
from ibkit.pocket.world import DEMO_SUBJECTS, IMAGE_PX
from ibkit.scorers.judge import Judge

FOLDER = Path(__file__).parent / "labelled"
COLUMNS = 20  # pictures in a row of the sheet
QUESTIONS = ("class", "pose", "things", "identity")
LYING = "lying on its side"
UNCLEAR = "unclear"  # the label where a picture shows no answer; such pictures are left out of the agreement


def pictures() -> list[Image.Image]:
    """The labelled pictures, in the order of their numbers."""
    sheet = Image.open(FOLDER / "pictures.jpg").convert("RGB")
    n = pd.read_csv(FOLDER / "labels.csv")["picture"].max() + 1
    corners = [(i % COLUMNS * IMAGE_PX, i // COLUMNS * IMAGE_PX) for i in range(n)]
    return [sheet.crop((x, y, x + IMAGE_PX, y + IMAGE_PX)) for x, y in corners]


def labels() -> pd.DataFrame:
    """A row for each picture and labeller: picture, model, subject, labeller (1, 2), and the answers to `QUESTIONS`."""
    return pd.read_csv(FOLDER / "labels.csv", keep_default_na=False)


def answers(judge: Judge, images: list[Image.Image], subjects: list[str]) -> pd.DataFrame:
    """The judge's answers for the same pictures, in the words of the labels; a column a question."""
    said = pd.DataFrame({question: judge.answers(images, question) for question in QUESTIONS[:-1]})
    for noun, rows in pd.RangeIndex(len(images)).groupby(subjects).items():
        same = judge.identifies([images[i] for i in rows], DEMO_SUBJECTS[noun])
        said.loc[rows, "identity"] = ["yes" if right else "no" for right in same]
    return said


def agreement(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Question -> share of pictures with the same answer, and the number with a clear answer in both."""
    found = {}
    for question in QUESTIONS:
        clear = (first[question] != UNCLEAR) & (second[question] != UNCLEAR)
        found[question] = (float((first[question] == second[question])[clear].mean()), int(clear.sum()))
    return found


def card_rows(judge: Judge) -> list[Row]:
    """Rows of the model card: the judge against the first labeller, of all pictures and of those that models after RL
    drew; the second labeller against the first; and how often the judge lays down what stands.
    """
    table = labels()
    first, second = (table[table["labeller"] == k].sort_values("picture", ignore_index=True) for k in (1, 2))
    judged = answers(judge, pictures(), list(first["subject"]))
    after_rl = first["model"].str.endswith("+ddpo")
    everything = pd.Series(True, first.index)
    compared: list[tuple[str, float | None, pd.DataFrame, pd.Series]] = [
        ("judge, {}, generated pictures, agreement with labels", 0.9, judged, everything),
        ("judge, {}, pictures of models after RL, agreement with labels", 0.9, judged, after_rl),
        ("labels of generated pictures, {}, agreement of two passes", None, second, everything),
    ]
    rows: list[Row] = [
        (name.format(q), share, target, n)
        for name, target, other, of in compared
        for q, (share, n) in agreement(first[of], other[of]).items()
    ]
    stands = first["class"].isin(["pot", "cup"]) & (first["pose"] == "none")
    lies = (judged["pose"] == LYING)[stands]
    return [
        *rows,
        ("judge, a pot or cup that stands taken for lying, generated pictures", float(lies.mean()), None, len(lies)),
    ]
