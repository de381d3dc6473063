"""`ibkit export RUN... DIR` of evaluated runs: figures, LaTeX tables and captions for a paper."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from ibkit.errors import ArtifactError
from ibkit.evaluate.tables import all_tables, differences, in_all_formats
from ibkit.report.figures import FIGURE_KINDS
from ibkit.report.gather import gather
from ibkit.report.latex import default_columns, difference_table, escape, fidelity_table
from ibkit.report.overview import drawings, facts
from ibkit.report.pictures import FIRST, check_choice, grids

FORMATS = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # no dates: equal files
PREAMBLE = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,graphicx}
\begin{document}
"""


def export_paper(
    runs: Sequence[str | Path],
    folder: Path,
    columns: Sequence[str] = (),
    pictures: str = FIRST,
    titles: bool = False,
    against: str = "",
) -> list[str]:
    """Write the material of a paper into a new folder.

    `figures/` has each figure as PNG (300 dots an inch), SVG and PDF with real text, and its numbers as CSV; `tables/`
    the tables as LaTeX floats, CSV and Markdown; `captions.md` the captions; `paper.tex` shows how to include it all.

    Args:
        runs: folders of finished runs.
        folder: to write, which must not be there.
        columns: metrics of the LaTeX tables; empty = the primary ones and one more.
        pictures: which to show, as for the report.
        titles: whether figures have their titles burnt in.
        against: the arm of the differences; see `tables.differences`.

    Returns:
        Names of the files.

    Raises:
        ArtifactError: no such runs, or runs without scores, or the folder is there.
        ScoreError: a metric that the scores do not have.
    """
    gathered, choice = gather(runs), check_choice(pictures)
    scores = gathered.scores
    if scores is None:
        raise ArtifactError(f"{gathered.name} holds no scores, so there is no table to export: run 03_evaluate first.")
    if folder.exists():
        raise ArtifactError(f"{folder} is there already: name another folder.")
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    for part in ("figures", "tables"):
        (building / part).mkdir(parents=True)
    said, columns = facts(gathered), list(columns or default_columns(scores))
    words = {kind.word: f"{kind.title}. {kind.caption}" for kind in FIGURE_KINDS}
    captions = {}
    # Text stays text.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "ibkit"}):
        found = {name: (*drawn, f"{words[name]} {said}") for name, drawn in drawings(gathered, titles).items()}
        found |= {
            f"grid-{name}": (figure, table, f"{words['grid']} {sentence} {said}")
            for name, figure, table, sentence in grids(scores, choice, titles)
        }
        for name, (figure, table, caption) in found.items():
            for suffix, metadata in FORMATS.items():
                path = building / "figures" / f"{name}.{suffix}"
                figure.savefig(path, dpi=300, bbox_inches="tight", metadata=metadata)
            table.to_csv(building / "figures" / f"{name}.csv", index=False)
            captions[name] = caption
    gaps = differences(scores, against)
    floats = {"fidelity": fidelity_table(scores, columns, said, "tab:fidelity")}
    if len(gaps):
        floats["differences"] = difference_table(gaps, columns, said, "tab:differences")
    for name, table in all_tables(scores, against).items():
        for suffix, text in in_all_formats(table).items():
            if suffix != "tex":
                (building / "tables" / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    for name, text in floats.items():
        (building / "tables" / f"{name}.tex").write_text(text, encoding="utf-8")
    scores.drop(columns="file").to_csv(building / "tables" / "scores.csv", index=False)
    lines = [f"## figures/{name}\n\n{caption}\n" for name, caption in captions.items()]
    (building / "captions.md").write_text("\n".join(lines), encoding="utf-8")
    (building / "paper.tex").write_text(_example(captions, list(floats)), encoding="utf-8")
    building.rename(folder)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _example(captions: dict[str, str], tables: Sequence[str]) -> str:
    """A document that includes every figure and table."""
    parts = [rf"\input{{tables/{name}.tex}}" for name in tables]
    for name, caption in captions.items():
        star = "*" if name.startswith(("grid", "trainings")) else ""
        width = r"\textwidth" if star else r"\columnwidth"
        parts.append(
            f"\\begin{{figure{star}}}\n\\centering\n\\includegraphics[width={width},height=0.8\\textheight,"
            f"keepaspectratio]{{figures/{name}.pdf}}\n\\caption{{{escape(caption)}}}\n\\label{{fig:{name}}}\n"
            f"\\end{{figure{star}}}"
        )
    return PREAMBLE + "\n\n".join(parts) + "\n\\end{document}\n"
