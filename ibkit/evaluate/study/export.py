"""A study as one HTML file for raters without Jupyter: it works offline and hands back the ratings file that notebook
07 merges.

The file holds the pictures, each once, the questions, and names of items that are hashes: not which arm made what.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import pandas as pd
from PIL import Image

from ibkit.data.photos import png, read_rgb
from ibkit.errors import StudyError
from ibkit.evaluate.study.items import QUESTIONS, study_name
from ibkit.runs import write_atomically

MOST_BYTES = 200 * 2**20  # what a browser opens in a few seconds, and a mail service may refuse already


def export_page(items: pd.DataFrame, references: Mapping[str, Sequence[Image.Image]], path: Path) -> int:
    """Write the page of a study, of the items of `items.make_items` and each subject's photos, and return how many
    items it has.

    Raises:
        StudyError: no items, or pictures that are too many for one page.
        ArtifactError: the file cannot be written.
    """
    if items.empty:
        raise StudyError("The study has no items: name a finished run of 03_evaluate that kept its pictures.")
    pictures: list[str] = []
    numbers: dict[str, int] = {}

    def number_of(key: str, picture: Image.Image | None = None) -> int:
        if key not in numbers:
            numbers[key] = len(pictures)
            data = png(picture or read_rgb(key), optimize=True)  # no file name and no metadata that tells the arm
            pictures.append("data:image/png;base64," + base64.b64encode(data).decode())
            if sum(map(len, pictures)) > MOST_BYTES:
                raise StudyError(f"The pictures take more than {MOST_BYTES // 2**20} MiB: make it fewer by --n-items.")
        return numbers[key]

    rows = [
        {
            "item": row.item,
            "question": row.question,
            "subject": row.subject,
            "text": row.text,
            "pictures": [number_of(place) for place in (row.image_a, row.image_b) if place],
        }
        for row in items.sort_values("item").itertuples()  # the order of arms would tell them
    ]
    photos = {
        subject: [number_of(f"{subject} {i}", photo) for i, photo in enumerate(references[subject])]
        for subject in items["subject"].unique()
    }
    study = {
        "name": study_name(items),
        "questions": {name: asdict(asked) for name, asked in QUESTIONS.items()},
        "items": rows,
        "references": photos,
        "pictures": pictures,
    }
    text = json.dumps(study, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script element
    page = files("ibkit.evaluate.study").joinpath("study.html").read_text(encoding="utf-8").replace("STUDY", text, 1)
    data = page.encode()
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))
    return len(items)
