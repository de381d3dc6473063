"""Papers' claims, each tested on the scores of a run.

A claim is a difference between two arms on the same prompts and the same noise, with a 95 % interval over subjects,
prompts and trainings (`ibkit.evaluate.intervals`), and it names one side of a threshold:

- supported: the whole interval lies on the claimed side;
- contradicted: it lies on the other side;
- undecided: the threshold is inside, or the pictures are too few to decide anything;
- not tested: the run lacks what the claim needs.

A claim compares roles, such as "personalized" and "tuned", played by the paper's arms or by others that a user names.
The metric of each axis is fixed beforehand (`stats.PRIMARY`), so that none is chosen by its result. A paper, or an
experiment, is a file with a tuple of claims and a line in `CLAIMS`.
"""

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ibkit.errors import ParameterError, ScoreError
from ibkit.evaluate.arms import BASE, REAL, arms_of, label_of
from ibkit.evaluate.columns import read_table
from ibkit.evaluate.intervals import ROUNDING, Interval
from ibkit.evaluate.stats import METRICS, PRIMARY, bootstrap_difference, check_scores, metrics_in, n_trainings, pair_up
from ibkit.fields import nearest
from ibkit.registry import Registry
from ibkit.runs import MANIFEST, notebook_runs, read_run

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTED = "supported", "contradicted", "undecided", "not tested"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTED)
SCORES = "scores.csv"
FEW_PROMPTS = 5  # below this many prompts × subjects the intervals are wide, and a claim says so
INSTRUCTBOOTH = "InstructBooth"
ROLES = {"base": BASE, "personalized": "dreambooth", "tuned": "dreambooth+ddpo"}  # the arms of InstructBooth
BEST_OF = "*+best_of_*"  # arms that train nothing, see `evaluate.best_of`
COMPARED = ("textual_inversion", "custom_diffusion", "neti")  # methods that it is compared with; no role of `ROLES`


class CannotTest(Exception):
    """The run lacks what a claim needs; the message says what."""


@dataclass(frozen=True)
class Outcome:
    """The numbers that a test found; metric, seeds, unit and detail are as in `Finding`.

    Attributes:
        interval: of the figure.
        cells: number of pictures of each prompt of each subject; None where the claim is not about prompts.
        unit: empty = that of the metric.
        decisive: the interval that decides, where it is not the figure's; `named` says of what it is.
    """

    metric: str
    interval: Interval
    detail: str
    cells: pd.Series | None = None
    seeds: int = 0
    unit: str = ""
    decisive: Interval | None = None
    named: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and how it is tested.

    Attributes:
        id: unique within the paper, "C1".
        paper: that makes it.
        statement, quantity: the claim, and what the figure is, in a sentence; "{tuned}" stands for the label of the arm
            in that role.
        source: where the paper makes it, and the paper's own number.
        axis: "text" or "subject" fidelity.
        treatment, control: the roles whose difference is the figure.
        identifier: whether both arms draw prompts with the identifier (the base model never does).
        unseen: whether to use only prompts that RL was not trained on.
        side: the claimed side of the threshold, 1 above or −1 below.
        threshold, border: what the decisive interval is compared with, and the same in words.
        file, notebook: the table to read, and the notebook that makes it, or those of its arms that 03 does not draw.
        check: (table, where) -> the table, its values checked (`evaluate.columns`) and nothing left out.
        test: (claim, table, role -> arm) -> `Outcome`, where the figure is not treatment − control.
        roles: role -> arm, as in the paper; "{personalized}+dpok" is a tuning of whatever plays that role, and * stands
            for anything in a name.
        only_with: arms without any of which a run is not about the claim, and does not list it, * as above; empty =
            always.
    """

    id: str
    paper: str
    statement: str
    quantity: str
    source: str
    axis: str = ""
    treatment: str = "tuned"
    control: str = "personalized"
    identifier: bool = True
    unseen: bool = False
    side: int = 1
    threshold: float = 0.0
    border: str = "zero"
    file: str = SCORES
    notebook: str = "03_evaluate"
    check: Callable[[pd.DataFrame, str], pd.DataFrame] = check_scores
    test: Callable[["Claim", pd.DataFrame, Mapping[str, str]], Outcome] | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    only_with: Collection[str] = ()


@dataclass(frozen=True)
class Finding:
    """What a run says about a claim.

    Attributes:
        id, paper, claim, source, quantity: of the claim, in words.
        value: our figure, None where the claim was not tested; fractions are fractions of 1.
        low, high: its 95 % interval; None where nothing varies that could be resampled.
        n: number of pairs of images.
        seeds: number of trainings (0 where no trained model takes part).
        verdict: one of `VERDICTS`.
        reason: why, in words.
        metric: the column of scores that measured it.
        unit: "fraction of images", "fraction of the loss", "fraction of pairs", "times as many images" or "score".
        detail: the numbers behind the figure; empty where the claim was not tested.
    """

    id: str
    paper: str
    claim: str
    source: str
    quantity: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    seeds: int = 0
    verdict: str = NOT_TESTED
    reason: str = ""
    metric: str = ""
    unit: str = ""
    detail: str = ""

    def figure(self) -> str:
        """The value with its interval, as text: a difference of shares in points, a share of the loss in per cent."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{METRICS[self.metric].show(self.value, sign=True)}, interval unknown"
        if self.unit == "times as many images":
            return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] times"
        if self.unit in ("fraction of the loss", "fraction of pairs"):
            return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        points = " points" if self.unit == "fraction of images" else ""
        return signed(self.metric, Interval(self.value, self.low, self.high, self.n)) + points


CLAIMS: Registry[Sequence[Claim]] = Registry(
    "ibkit.claims",
    "set of claims",
    {
        "instructbooth": "ibkit.evaluate.claims.instructbooth:CLAIMS",
        "experiments": "ibkit.experiments.claims:CLAIMS",
        "baselines": "ibkit.evaluate.claims.baselines:CLAIMS",
        "dpg": "ibkit.evaluate.claims.dpg:CLAIMS",
        "rpo": "ibkit.evaluate.claims.rpo:CLAIMS",
        "feedback": "ibkit.evaluate.claims.human_feedback:CLAIMS",
        "tunings": "ibkit.evaluate.claims.tunings:CLAIMS",
    },
)


def all_claims() -> list[Claim]:
    """Every claim there is, paper by paper, by its id; those that few runs are about come last."""
    found = [claim for name in CLAIMS for claim in CLAIMS.find(name)]
    papers = list(dict.fromkeys(claim.paper for claim in found))
    return sorted(found, key=lambda claim: (papers.index(claim.paper), bool(claim.only_with), len(claim.id), claim.id))


def check_evidence(file: str, table: pd.DataFrame, where: str) -> pd.DataFrame:
    """A table that claims read, checked as those claims need it; an error names `where` and the line."""
    return next(claim.check for claim in all_claims() if claim.file == file)(table, where)


def evidence_files() -> dict[str, str]:
    """What claims read: file -> the notebook whose run folder it lies in."""
    return {claim.file: claim.notebook for claim in all_claims()}


def evaluate_claims(run_or_folder: str | Path, arms: Mapping[str, str] | None = None) -> list[Finding]:
    """Test every claim on a run: one finding for each, in the order of `all_claims`.

    Args:
        run_or_folder: a main run (`outputs/<run>`, with a folder for each notebook), a grid, one notebook's own folder,
            or a folder that holds the tables directly (`outputs/reference`).
        arms: role -> arm, instead of the paper's arm or of what `stand_ins` finds.

    Raises:
        ScoreError: there is no table in the folder that a claim reads, or one is malformed.
        ArtifactError: the run is incomplete, or a file was altered.
        ParameterError: no claim has that role.
    """
    folder, tables = _existing(run_or_folder), {}
    for file, notebook in (evidence_files() | {SCORES: "03_evaluate"}).items():
        if (table := _find_table(folder, notebook, file)) is not None:
            tables[file] = table
    if not tables:
        raise ScoreError(
            f"{folder} holds no table that a claim reads: expected 03_evaluate/scores.csv of a finished run, or one of "
            f"{', '.join(sorted(evidence_files()))}."
        )
    return claims_from(tables, arms)


def load_scores(run_or_folder: str | Path) -> pd.DataFrame:
    """Read and check the tidy score table of a run; see `evaluate_claims` for what a folder may be."""
    folder = _existing(run_or_folder)
    table = _find_table(folder, "03_evaluate", SCORES)
    if table is None:
        raise ScoreError(f"{folder} holds no scores: expected 03_evaluate/scores.csv of a finished run, or scores.csv.")
    return table


def _existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise ScoreError(f"There is no run folder {folder}: finish a run first, or give the path of one.")
    return Path(folder)


def _find_table(folder: Path, notebook: str, file: str) -> pd.DataFrame | None:
    """A checked table of a notebook's runs in the folder, or of the folder itself; None where there is none."""
    runs = [run for run in notebook_runs(folder, notebook)[0] if file in run.outputs]
    paths = [run.path(file) for run in runs] or [folder / file] * (folder / file).is_file()
    if not runs and paths and (folder / MANIFEST).is_file():
        paths = [read_run(folder).path(file)]
    tables = [check_evidence(file, read_table(path), str(path)) for path in paths]
    if len(tables) > 1:
        return check_evidence(file, pd.concat(tables, ignore_index=True), f"the runs in {folder}")
    return tables[0] if tables else None


def claims_from(tables: Mapping[str, pd.DataFrame], arms: Mapping[str, str] | None = None) -> list[Finding]:
    """Test every claim, in the order of `all_claims`; one whose table is missing says which notebook makes it.

    Args:
        tables: name of the file -> table; the scores must be checked.
        arms: as in `evaluate_claims`; a role that no claim has is a ParameterError.
    """
    roles = list(dict.fromkeys(role for claim in all_claims() for role in claim.roles))
    for role in arms or ():
        if role not in roles:
            raise ParameterError(f"No claim has the role {role!r}{nearest(role, roles)}")
    there = set(tables[SCORES]["arm"]) if SCORES in tables else set()
    cast = stand_ins(there) | dict(arms or {})
    return [_test(claim, tables, cast, there) for claim in all_claims() if _listed(claim, there, tables)]


def _listed(claim: Claim, there: Collection[str], tables: Collection[str]) -> bool:
    """Whether the run is about the claim: it has one of its arms, or a table that is made for it."""
    has_own = claim.file != SCORES and claim.file in tables
    return not claim.only_with or has_own or any(fnmatch.filter(there, arm) for arm in claim.only_with)


def _cast(claim: Claim, arms: Mapping[str, str], there: Collection[str]) -> dict[str, str]:
    """The arm of each role of a claim; of several that a name with * fits, the last."""
    cast = dict(claim.roles) | {role: arm for role, arm in arms.items() if role in claim.roles}
    named = {role: arm.format(personalized=cast.get("personalized", "")) for role, arm in cast.items()}
    return {role: max(fnmatch.filter(there, arm), default=arm) for role, arm in named.items()}


def stand_ins(there: Collection[str]) -> dict[str, str]:
    """Role -> arm, for roles whose paper's arm is missing in a run that has only one other candidate; the methods that
    InstructBooth is compared with are none while there are others.

    A tuned arm is a chain of two or more methods, of several the only one by DDPO, and none that draws the best of n;
    the personalized arm is what it started from, else the only method.
    """
    arms = set(there) - {BASE, REAL}
    arms = {arm for arm in arms if arm.partition("+")[0] not in COMPARED} or arms
    chains = {arm for arm in arms if "+" in arm}
    tuned = [arm for arm in chains if not fnmatch.fnmatchcase(arm, BEST_OF)]
    tuned = [arm for arm in tuned if arm.endswith("+ddpo")] or tuned
    cast = {}
    if ROLES["tuned"] not in arms and len(tuned) == 1:
        cast["tuned"] = tuned[0]
    below = cast.get("tuned", ROLES["tuned"]).rpartition("+")[0]
    alone = [below] if below in arms else sorted(arms - chains)
    if ROLES["personalized"] not in arms and len(alone) == 1:
        cast["personalized"] = alone[0]
    return cast


def claims_from_scores(scores: pd.DataFrame, arms: Mapping[str, str] | None = None) -> list[Finding]:
    """Test those claims that read nothing but the score table, which must be checked."""
    files = {(claim.paper, claim.id): claim.file for claim in all_claims()}
    return [found for found in claims_from({SCORES: scores}, arms) if files[found.paper, found.id] == SCORES]


def _test(claim: Claim, tables: Mapping[str, pd.DataFrame], arms: Mapping[str, str], there: Collection[str]) -> Finding:
    cast = _cast(claim, arms, there)
    labels = {role: label_of(arm) for role, arm in cast.items()}
    statement, quantity = (words.format(**labels) for words in (claim.statement, claim.quantity))
    finding = Finding(claim.id, claim.paper, statement, claim.source, quantity)
    try:
        if claim.file not in tables:
            raise CannotTest(f"Needs {claim.file} of notebook {claim.notebook}.")
        outcome = (claim.test or compare)(claim, tables[claim.file], cast)
    except CannotTest as reason:
        elsewhere = claim.file == SCORES and claim.notebook != Claim.notebook
        where = f" Notebook {claim.notebook} trains its arms." if elsewhere else ""
        return replace(finding, reason=f"{reason}{where}")
    interval, (verdict, why) = outcome.interval, _verdict(claim, outcome)
    is_known = np.isfinite([interval.low, interval.high]).all()
    return replace(
        finding,
        value=interval.value,
        low=interval.low if is_known else None,
        high=interval.high if is_known else None,
        n=interval.n,
        seeds=outcome.seeds,
        verdict=verdict,
        reason=why,
        metric=outcome.metric,
        unit=outcome.unit or ("fraction of images" if METRICS[outcome.metric].is_share else "score"),
        detail=outcome.detail,
    )


def _verdict(claim: Claim, outcome: Outcome) -> tuple[str, str]:
    """The verdict on a claim, and why."""
    interval, cells = outcome.decisive or outcome.interval, outcome.cells
    n_cells = math.inf if cells is None else len(cells)
    if cells is not None and cells.max() == 1:
        return UNDECIDED, "One picture of each prompt decides nothing: draw more."
    if n_cells == 1:
        return UNDECIDED, "All pictures are of one prompt of one subject and say nothing about others."
    if not np.isfinite([interval.low, interval.high]).all():
        return UNDECIDED, "Nothing varies that could be resampled."
    are_few = n_cells < FEW_PROMPTS
    if are_few and interval.high - interval.low < ROUNDING:
        why = f"On {n_cells} prompts × subjects all pairs differ by the same: how others vary is unknown."
        return UNDECIDED, why
    side = interval.side(claim.threshold)
    verdict = UNDECIDED if side == 0 else SUPPORTED if side == claim.side else CONTRADICTED
    lies = f"holds {claim.border}" if side == 0 else f"lies {'above' if side > 0 else 'below'} {claim.border}"
    said = [f"The {'' if side == 0 else 'whole '}interval{outcome.named} {lies}."]
    if are_few:
        said.append(f"Only {n_cells} prompts × subjects" + (", but they decide." if side else "; draw more."))
    if outcome.seeds == 1:
        said.append("Of one training: it speaks of that one alone.")
    return verdict, " ".join(said)


# --- the difference between two arms -------------------------------------------------------------------------------


def compare(claim: Claim, scores: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """The treatment's arm minus the control's, on the claim's axis."""
    treatment, control = arms[claim.treatment], arms[claim.control]
    tables = {arm: rows_of(scores, arm, claim.identifier) for arm in (treatment, control)}
    how = "on the same prompts and image seeds" if claim.identifier else "with the class prompt (no identifier)"
    before, seen = "", {}
    if claim.unseen:
        if "seen" not in scores.columns or any(table["seen"].isna().all() for table in tables.values()):
            raise CannotTest("The scores do not say which prompts RL was trained on.")
        seen = {arm: table[table["seen"].fillna(False).astype(bool)] for arm, table in tables.items()}
        tables = {arm: table[~table["seen"].fillna(True).astype(bool)] for arm, table in tables.items()}
        if any(table.empty for table in tables.values()):
            raise CannotTest("RL was trained on all prompts that were drawn: evaluate on others, too (--protocol).")
        how, before = "on unseen prompts", "Unseen prompts: "
    metric, pairs = pairs_of(tables, claim.axis, how)
    difference = bootstrap_difference(tables[treatment], tables[control], metric)
    details = [before + levels(metric, pairs)]
    if claim.threshold < 0:
        loss = f"{-100 * claim.threshold:.0f} points" if METRICS[metric].is_share else f"{-claim.threshold}"
        details.append(f"allowed loss {loss}")
    if not claim.identifier and claim.axis == "subject":
        try:
            other, _ = pairs_of(tables, "text")
            text = bootstrap_difference(tables[treatment], tables[control], other)
            details.append(f"text fidelity of the class prompt changed by {signed(other, text)}")
        except CannotTest:
            details.append("text fidelity of the class prompt was not scored")
    if seen and not any(table.empty for table in seen.values()):
        on_seen = bootstrap_difference(seen[treatment], seen[control], metric)
        details.append(f"on seen prompts the gain is {signed(metric, on_seen)}")
    return Outcome(metric, difference, "; ".join(details), cells_of(pairs), n_trainings(pairs))


def rows_of(scores: pd.DataFrame, arm: str, identifier: bool = True) -> pd.DataFrame:
    """The rows of an arm with the identifier, or with the class prompt; the base model has only the latter."""
    return scores[(scores["arm"] == arm) & (scores["identifier"] == (identifier and arm != BASE))]


def pairs_of(
    tables: dict[str, pd.DataFrame], axis: str, how: str = "on the same prompts and image seeds"
) -> tuple[str, dict[str, pd.DataFrame]]:
    """The first metric of an axis that the tables of all arms have on shared units, and its matrices (`pair_up`)."""
    if absent := [arm for arm, table in tables.items() if table.empty]:
        raise CannotTest(f"The scores hold no images of {' or '.join(absent)} {how}.")
    for metric in PRIMARY[axis]:
        if all(metrics_in(table, [metric]) for table in tables.values()):
            pairs = pair_up(tables, metric)
            if all(table.size for table in pairs.values()):
                return metric, pairs
    raise CannotTest(f"None of {', '.join(PRIMARY[axis])} was scored for {', '.join(tables)} {how}.")


def cells_of(pairs: Mapping[str, pd.DataFrame]) -> pd.Series:
    """Number of image seeds for each prompt of each subject."""
    units = next(iter(pairs.values())).columns.to_frame(index=False)
    return units.groupby(["subject", "prompt_id"]).size()


def levels(metric: str, pairs: Mapping[str, pd.DataFrame]) -> str:
    """The mean of each arm behind a difference, in words."""
    show = METRICS[metric].show
    shown = [f"{arm.label} {show(float(np.nanmean(pairs[name].to_numpy())))}" for name, arm in arms_of(pairs).items()]
    return f"{METRICS[metric].label}: {', '.join(shown)}"


def signed(metric: str, interval: Interval) -> str:
    """A difference with its interval, each with its sign."""
    value, low, high = (METRICS[metric].show(x, sign=True) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"
