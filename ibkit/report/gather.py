"""What a report or a paper's material is made of: finished notebook runs, of one main run or of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from ibkit.errors import ArtifactError
from ibkit.evaluate.claims import SCORES, check_evidence, evidence_files
from ibkit.evaluate.stats import check_scores
from ibkit.runs import GRID, CompletedRun, input_of, notebook_runs, read_json, read_run

ADAPTED = "adapted.json"


@dataclass(frozen=True)
class Gathered:
    """Finished notebook runs, in the order they ran.

    Attributes:
        name: of the main run, or of all of them, for people.
        stages: the notebooks' runs.
        many: whether they are of several main runs.
        unfinished: names of a grid's runs that are left out.
    """

    name: str
    stages: list[CompletedRun]
    many: bool = False
    unfinished: tuple[str, ...] = ()

    @cached_property
    def evaluations(self) -> list[CompletedRun]:
        """The runs that hold scores."""
        return [stage for stage in self.stages if SCORES in stage.outputs]

    @cached_property
    def scores(self) -> pd.DataFrame | None:
        """The score tables as one, with a column `file`: where the row's picture is, empty where it was not kept.

        Raises:
            ScoreError: a table is malformed, or two evaluations score one image differently.
        """
        tables = []
        for run in self.evaluations:
            table, kept = run.table(SCORES), set(run.outputs)
            images = table["image"].fillna("") if "image" in table else pd.Series("", index=table.index)
            tables.append(table.assign(file=[str(run.folder / name) if name in kept else "" for name in images]))
        if not tables:
            return None
        where = "the runs together" if len(tables) > 1 else f"{self.evaluations[0].folder.name}/{SCORES}"
        return check_scores(pd.concat(tables, ignore_index=True), where)

    @cached_property
    def evidence(self) -> dict[str, pd.DataFrame]:
        """The tables that claims are read from, by file name; of several runs that hold one, the rows of all."""
        found = {SCORES: self.scores} if self.scores is not None else {}
        for file, notebook in evidence_files().items():
            made = [
                check_evidence(file, stage.table(file), str(stage.folder / file))
                for stage in self.stages
                if stage.kind == notebook and file in stage.outputs
            ]
            if made and file != SCORES:
                found[file] = pd.concat(made, ignore_index=True)
        return found

    @cached_property
    def histories(self) -> pd.DataFrame:
        """The epochs of all tunings: their `history.csv` with arm, subject, seed, tune_seed and run; may be empty."""
        tables = []
        for stage in self.stages:
            if stage.kind == "02_rl_finetune" and {"history.csv", ADAPTED} <= set(stage.outputs):
                deltas = read_json(stage.path(ADAPTED))["deltas"]
                subject = stage.json("subject.json")["name"] if "subject.json" in stage.outputs else ""
                named = {
                    "arm": "+".join(delta["method"] for delta in deltas),
                    "subject": subject,
                    "seed": deltas[0]["seed"],
                    "tune_seed": deltas[-1]["seed"],
                    "run": stage.folder.parent.name,
                }
                tables.append(stage.table("history.csv").assign(**named))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    @property
    def models(self) -> list[str]:
        """The models that the runs used."""
        return sorted({str(stage.parameters["model"]) for stage in self.stages if "model" in stage.parameters})

    @property
    def subjects(self) -> list[str]:
        """The names of the subjects."""
        if self.scores is not None:
            return [str(name) for name in self.scores["subject"].unique()]
        return list(dict.fromkeys(str(s.parameters["subject"]) for s in self.stages if "subject" in s.parameters))


def gather(folders: Sequence[str | Path]) -> Gathered:
    """Read the finished notebook runs of main runs or grids, or of lone notebooks and what they started from.

    Args:
        folders: `outputs/<run>`, whose subfolders are the runs of its notebooks; a grid's; or a notebook's own run.

    Raises:
        ArtifactError: there is no finished notebook run in a folder, one is incomplete or altered, or a folder is
            given twice.
    """
    places = [Path(folder).resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ArtifactError(f"A run is given twice: {', '.join(sorted(place.name for place in places))}.")
    stages: dict[Path, CompletedRun] = {}
    unfinished: list[str] = []
    for place in places:
        found, others = notebook_runs(place)
        unfinished += others
        if not found and (place / "manifest.json").is_file() and read_run(place).kind != "run":
            found = _with_origins(read_run(place))
        if not found:
            raise ArtifactError(f"{place} has no finished run, so there is nothing to report: finish one first.")
        stages |= {stage.folder: stage for stage in found}
    many = len(places) > 1 or any((place / GRID).is_file() for place in places)
    return Gathered(", ".join(place.name for place in places), list(stages.values()), many, tuple(unfinished))


def _with_origins(run: CompletedRun) -> list[CompletedRun]:
    """A notebook's run after those that it started from."""
    before: dict[Path, CompletedRun] = {}
    for name in run.manifest["inputs"]:
        if name.startswith("run"):
            origin = input_of(run, name)
            before |= {stage.folder: stage for stage in _with_origins(origin)} | {origin.folder: origin}
    return [*before.values(), run]
