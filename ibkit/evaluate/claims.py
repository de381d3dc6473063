"""The paper's claims, each tested on the scores of a run.

Every claim is a difference between two models on the same prompts and the same noise, with a 95 % interval over
subjects, prompts and RL seeds (`ibkit.evaluate.intervals`), and it names one side of a threshold:

- supported: the whole interval lies on the claimed side;
- contradicted: it lies on the other side;
- undecided: the threshold is inside, or the pictures are too few to decide anything;
- not tested: the run lacks what the claim needs.

Each claim has one measure, fixed beforehand (`TEXT_METRICS`, `SUBJECT_METRICS`), so that none is chosen by its result.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd

from ibkit.errors import ScoreError, StudyError
from ibkit.evaluate.intervals import ROUNDING, Interval, bootstrap_statistic, difference_interval
from ibkit.evaluate.stats import METRICS, bootstrap_difference, check_scores, method_label, pair_up, unit_groups
from ibkit.runs import read_run, resolve

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTED = "supported", "contradicted", "undecided", "not tested"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTED)

# The first measure a run has is used: the judge knows the truth; the others stand in where there is no ground truth,
# ImageReward last, since it is usually what RL raised.
TEXT_METRICS = ("judge_text", "pick_score", "clip_t", "image_reward")
SUBJECT_METRICS = ("judge_identity", "dino", "clip_i")
# What the claims read: name -> the notebook that makes it, and the file in its run folder.
EVIDENCE = {
    "scores": ("03_evaluate", "scores.csv"),
    "description": ("04_attention_maps", "description.csv"),
    "changes": ("05_dino_metric", "changes.csv"),
    "prompt_kinds": ("06_prompt_ablation", "prompt_kinds.csv"),
    "votes": ("07_human_study", "votes.csv"),
}
# Below this many prompts × subjects the intervals are wide, and a claim says so.
FEW_PROMPTS = 5
# C3: the loss of subject fidelity that is allowed: 5 points of the judge's line-up. On the scale of DINO and CLIP-I the
# paper itself loses 0.05 and calls it competitive (table 2: .699 to .650).
MARGIN = 0.05
# C2: the share of the lost text fidelity that a good run wins back.
GOOD_SHARE = 2 / 3


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what this run says about it.

    Attributes:
        id: C1 … C9.
        claim: the claim in one sentence.
        source: where the paper makes it, and the paper's own number.
        value: our figure, None where the claim was not tested; fractions are fractions of 1.
        low, high: its 95 % interval; None where nothing varies that could be resampled.
        n: pairs of images behind it.
        seeds: RL seeds behind it (0 where no RL-tuned model takes part).
        verdict: "supported", "contradicted", "undecided" or "not tested".
        reason: why, in words.
        metric: the score it was measured with.
        unit: "fraction of images", "fraction of the loss", "fraction of pairs", "times as many images" or "score".
        quantity: what `value` is, in words.
        detail: the numbers behind the figure; empty where the claim was not tested.
    """

    id: str
    claim: str
    source: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    seeds: int
    verdict: str
    reason: str
    metric: str
    unit: str
    quantity: str
    detail: str

    def figure(self) -> str:
        """Write the value with its interval: a difference of shares in points, a share of the loss in per cent."""
        if self.value is None:
            return "–"
        if self.low is None:
            return f"{METRICS[self.metric].show(self.value, sign=True)}, interval unknown"
        if self.unit == "times as many images":
            return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] times"
        if self.unit in ("fraction of the loss", "fraction of pairs"):
            return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        points = " points" if self.unit == "fraction of images" else ""
        return _signed(self.metric, Interval(self.value, self.low, self.high, self.n)) + points


@dataclass(frozen=True)
class _Views:
    """The rows of each model that the claims compare: with the identifier, or with the class prompt."""

    base_class: pd.DataFrame
    dreambooth: pd.DataFrame
    dreambooth_class: pd.DataFrame
    instructbooth: pd.DataFrame

    @classmethod
    def of(cls, scores: pd.DataFrame) -> "_Views":
        def rows(method: str, identifier: bool) -> pd.DataFrame:
            return scores[(scores["method"] == method) & (scores["identifier"] == identifier)]

        return cls(
            rows("base", False), rows("dreambooth", True), rows("dreambooth", False), rows("instructbooth", True)
        )


@dataclass(frozen=True)
class _Outcome:
    """What a test found.

    Attributes:
        interval, metric, unit, seeds, detail: see `Claim`.
        cells: number of pictures of each prompt of each subject; None where the claim is not about prompts.
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


class _CannotTest(Exception):
    """The scores lack what the claim needs; the message says what."""


def evaluate_claims(run_or_folder: str | Path) -> list[Claim]:
    """Test every claim on a run.

    Args:
        run_or_folder: a main run (`outputs/<run>`, with a folder for each notebook), one notebook's own folder, or a
            folder that holds the tables directly (`outputs/reference`). What each claim reads stands in `EVIDENCE`.

    Returns:
        One `Claim` for each of C1 to C9, in order.

    Raises:
        ScoreError: there are no scores in the folder, or they are malformed.
        ArtifactError: the run is incomplete, or a file was altered.
    """
    evidence = {"scores": load_scores(run_or_folder)}
    for name in EVIDENCE:
        if name != "scores" and (table := _find_table(Path(run_or_folder), *EVIDENCE[name])) is not None:
            evidence[name] = table
    return claims_from(evidence)


def load_scores(run_or_folder: str | Path) -> pd.DataFrame:
    """Read and check the tidy score table of a run; see `evaluate_claims` for what a folder may be."""
    folder = Path(run_or_folder)
    if not folder.is_dir():
        raise ScoreError(f"There is no run folder {folder}: finish a run first, or give the path of one.")
    table = _find_table(folder, *EVIDENCE["scores"])
    if table is None:
        raise ScoreError(f"{folder} holds no scores: expected 03_evaluate/scores.csv of a finished run, or scores.csv.")
    return check_scores(table, f"scores.csv of {folder}")


def _find_table(folder: Path, notebook: str, file: str) -> pd.DataFrame | None:
    """A table of a notebook's run in or at the folder; None where there is none."""
    stage = folder / notebook if (folder / notebook).is_dir() else folder
    path = stage / file
    if not path.is_file():
        return None
    if (stage / "manifest.json").is_file():
        return read_run(stage).table(file)
    try:
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ScoreError(f"{path} is not a readable CSV table ({error}).") from error


def claims_from(evidence: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Test every claim on the tables that are there, by the names of `EVIDENCE`; `scores` must be checked.

    A claim whose table is missing is not tested, and says which notebook makes it.
    """
    claims = []
    for test in _TESTS:
        try:
            if test.evidence not in evidence:
                raise _CannotTest(f"Needs {EVIDENCE[test.evidence][1]} of notebook {EVIDENCE[test.evidence][0]}.")
            table = evidence[test.evidence]
            outcome = test.function(_Views.of(table) if test.evidence == "scores" else table)
        except _CannotTest as reason:
            claims.append(
                Claim(
                    test.id, test.claim, test.source, None, None, None, 0, 0, NOT_TESTED, str(reason), "", "",
                    test.quantity, "",
                )
            )  # fmt: skip
            continue
        interval, (verdict, why) = outcome.interval, _verdict(test, outcome)
        is_known = np.isfinite([interval.low, interval.high]).all()
        claims.append(
            Claim(
                id=test.id,
                claim=test.claim,
                source=test.source,
                value=interval.value,
                low=interval.low if is_known else None,
                high=interval.high if is_known else None,
                n=interval.n,
                seeds=outcome.seeds,
                verdict=verdict,
                reason=why,
                metric=outcome.metric,
                unit=outcome.unit or ("fraction of images" if METRICS[outcome.metric].is_share else "score"),
                quantity=test.quantity,
                detail=outcome.detail,
            )
        )
    return claims


def _verdict(test: "_Test", outcome: _Outcome) -> tuple[str, str]:
    """The verdict on a claim, and why."""
    interval, cells = outcome.decisive or outcome.interval, outcome.cells
    if cells is not None and cells.max() == 1:
        return UNDECIDED, "One picture of each prompt decides nothing: draw more."
    if cells is not None and len(cells) == 1:
        return UNDECIDED, "All pictures are of one prompt of one subject and say nothing about others."
    if not np.isfinite([interval.low, interval.high]).all():
        return UNDECIDED, "Nothing varies that could be resampled."
    are_few = cells is not None and len(cells) < FEW_PROMPTS
    if are_few and interval.high - interval.low < ROUNDING:
        return (
            UNDECIDED,
            f"On {len(cells)} prompts × subjects all pairs differ by the same: how others vary is unknown.",
        )
    side = interval.side(test.threshold)
    verdict = UNDECIDED if side == 0 else SUPPORTED if side == test.side else CONTRADICTED
    lies = f"holds {test.border}" if side == 0 else f"lies {'above' if side > 0 else 'below'} {test.border}"
    said = [f"The {'' if side == 0 else 'whole '}interval{outcome.named} {lies}."]
    if are_few:
        said.append(f"Only {len(cells)} prompts × subjects" + (", but they decide." if side else "; draw more."))
    if outcome.seeds == 1:
        said.append("Of one RL seed: it speaks of this training alone.")
    return verdict, " ".join(said)


def claims_from_scores(scores: pd.DataFrame) -> list[Claim]:
    """Test those claims that a checked score table alone can test."""
    ids = {test.id for test in _TESTS if test.evidence == "scores"}
    return [claim for claim in claims_from({"scores": scores}) if claim.id in ids]


def _text_is_lost(views: _Views) -> _Outcome:
    """C1: DreamBooth − base, text."""
    metric, pairs = _pairs({"dreambooth": views.dreambooth, "base": views.base_class}, TEXT_METRICS)
    difference = bootstrap_difference(views.dreambooth, views.base_class, metric)
    return _Outcome(metric, difference, _levels(metric, pairs), _cells(pairs))


def _text_is_won_back(views: _Views) -> _Outcome:
    """C2: InstructBooth − DreamBooth, text.

    The figure is the share of the loss won back; whether it reaches two thirds is stated in the detail. Where nothing
    was lost for certain there is nothing to win back, and the claim is not tested.
    """
    tables = {"instructbooth": views.instructbooth, "dreambooth": views.dreambooth, "base": views.base_class}
    metric, pairs = _pairs(tables, TEXT_METRICS)
    columns = {name: table.to_numpy() for name, table in pairs.items()}
    groups = unit_groups(pairs["instructbooth"])
    if difference_interval(columns["base"], columns["dreambooth"], groups).side() <= 0:
        raise _CannotTest(
            f"On these prompts it is not certain that DreamBooth lost text fidelity ({_levels(metric, pairs)}), so "
            "there is nothing to win back: personalize for more steps or choose harder prompts."
        )
    gain = difference_interval(columns["instructbooth"], columns["dreambooth"], groups)
    try:
        share = bootstrap_statistic(columns, _share_won_back, groups)
    except ScoreError as error:
        raise _CannotTest(f"{error} InstructBooth − DreamBooth is {_signed(metric, gain)}.") from None
    detail = (
        f"{_levels(metric, pairs)}; InstructBooth − DreamBooth {_signed(metric, gain)}; "
        f"two thirds won back: {'yes' if share.value >= GOOD_SHARE else 'no'}"
    )
    return _Outcome(
        metric, share, detail, _cells(pairs), _n_seeds(pairs), "fraction of the loss", gain,
        " of InstructBooth − DreamBooth",
    )  # fmt: skip


def _share_won_back(instructbooth: np.ndarray, dreambooth: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Shares of the loss, (R,); NaN for a resample in which nothing was lost."""
    lost = base - dreambooth
    return (instructbooth - dreambooth) / np.where(lost > 0, lost, np.nan)


def _subject_is_kept(views: _Views) -> _Outcome:
    """C3: InstructBooth − DreamBooth, subject, against minus the margin (non-inferiority)."""
    tables = {"instructbooth": views.instructbooth, "dreambooth": views.dreambooth}
    metric, pairs = _pairs(tables, SUBJECT_METRICS)
    difference = bootstrap_difference(views.instructbooth, views.dreambooth, metric)
    margin = f"{100 * MARGIN:.0f} points" if METRICS[metric].is_share else f"{MARGIN}"
    detail = f"{_levels(metric, pairs)}; allowed loss {margin}"
    return _Outcome(metric, difference, detail, _cells(pairs), _n_seeds(pairs))


def _class_noun_drifts(views: _Views) -> _Outcome:
    """C4: DreamBooth − base, both without identifier, subject."""
    tables = {"dreambooth": views.dreambooth_class, "base": views.base_class}
    metric, pairs = _pairs(tables, SUBJECT_METRICS, "with the class prompt (no identifier)")
    difference = bootstrap_difference(views.dreambooth_class, views.base_class, metric)
    detail = _levels(metric, pairs)
    try:
        text_metric, _ = _pairs(tables, TEXT_METRICS)
        text = bootstrap_difference(views.dreambooth_class, views.base_class, text_metric)
        detail += f"; text fidelity of the class prompt changed by {_signed(text_metric, text)}"
    except _CannotTest:
        detail += "; text fidelity of the class prompt was not scored"
    return _Outcome(metric, difference, detail, _cells(pairs))


def _text_is_won_back_on_unseen(views: _Views) -> _Outcome:
    """C8: InstructBooth − DreamBooth, text, on prompts that RL was not trained on."""
    tables = {"instructbooth": views.instructbooth, "dreambooth": views.dreambooth}
    if any("seen" not in table.columns for table in tables.values()):
        raise _CannotTest("The scores do not say which prompts RL was trained on.")
    unseen = {name: table[~table["seen"].fillna(True).astype(bool)] for name, table in tables.items()}
    if any(table.empty for table in unseen.values()):
        raise _CannotTest("RL was trained on all prompts that were drawn: evaluate on others, too (--protocol).")
    metric, pairs = _pairs(unseen, TEXT_METRICS, "on unseen prompts")
    gain = bootstrap_difference(unseen["instructbooth"], unseen["dreambooth"], metric)
    detail = f"Unseen prompts: {_levels(metric, pairs)}"
    seen = {name: table[table["seen"].fillna(False).astype(bool)] for name, table in tables.items()}
    if all(len(table) for table in seen.values()):
        on_seen = bootstrap_difference(seen["instructbooth"], seen["dreambooth"], metric)
        detail += f"; on seen prompts the gain is {_signed(metric, on_seen)}"
    return _Outcome(metric, gain, detail, _cells(pairs), _n_seeds(pairs))


def _description_helps(table: pd.DataFrame) -> _Outcome:
    """C5: with − without description, subject.

    The judge's question for the shape alone stands in the detail: it is right less often (notebook 04).
    """
    from ibkit.experiments.detailed_description import MEASURED, compare

    metric = next((name for name in SUBJECT_METRICS if name in table.columns), None)
    if metric is None or not {"description", "train_seed"} <= set(table.columns):
        raise _CannotTest("description.csv lacks its columns: run 04_attention_maps again.")
    rows = compare(table).set_index("metric")
    row = rows.loc[metric]
    interval = Interval(row["difference"], row["difference_low"], row["difference_high"], int(row["n"]))
    show = METRICS[metric].show
    detail = f"{METRICS[metric].label}: with {show(row['with'])}, without {show(row['without'])}"
    for other in (name for name in MEASURED if name in rows.index and name != metric):
        gap = Interval(*rows.loc[other, ["difference", "difference_low", "difference_high"]], n=0)
        detail += f"; {METRICS[other].label} {_signed(other, gap)}"
    cells = table.groupby(["subject", "prompt_id"])["image_seed"].nunique()
    return _Outcome(metric, interval, detail, cells, int(row["seeds"]))


def _pose_lowers_dino(table: pd.DataFrame) -> _Outcome:
    """C6: DINO of the same subject in another pose, minus that under a mere change of view."""
    from ibkit.experiments.subject_analysis import fall, misranked, pose_cost

    if not {"change", "pair", "subject", "dino"} <= set(table.columns):
        raise _CannotTest("changes.csv lacks its columns: run 05_dino_metric again.")
    if not {"view", "pose", "identity"} <= set(table["change"]):
        raise _CannotTest("changes.csv has no change of view, pose and identity: photos of a user have no truth.")
    lost = fall(table, "dino", "pose")
    interval = Interval(-lost.value, -lost.high, -lost.low, lost.n)
    place = fall(table, "dino", "place")
    cost, wrong = pose_cost(table, "dino"), misranked(table, "dino")
    seen = table[table["change"] == "pose"]["judge_identity"].mean()
    detail = (
        f"a change of place alone costs {place.value:.3f}, a change of pose {cost.value:.2f} [{cost.low:.2f}, "
        f"{cost.high:.2f}] times what another individual costs; in {100 * wrong.value:.0f} % [{100 * wrong.low:.0f}, "
        f"{100 * wrong.high:.0f}] of the pairs the same individual in another pose scores below another individual in "
        f"the same pose; the judge (simulated) knows the individual in {100 * seen:.0f} % of the new poses"
    )
    return _Outcome("dino", interval, detail)


def _both_kinds_learn_faster(table: pd.DataFrame) -> _Outcome:
    """C7: images that identifier prompts alone need / images that both kinds need.

    Compared at equal totals, from the most overfitted model of the table.
    """
    from ibkit.experiments.prompt_ablation import efficiency, kept_by_class

    rows = efficiency(table)
    rows = rows[rows["arm"] == "identifier_equal_totals"].sort_values("dreambooth_steps")
    if rows.empty:
        raise _CannotTest("prompt_kinds.csv has no pair of finished runs of both arms.")
    told = [
        f"{row.dreambooth_steps} DreamBooth steps: ratio {row.ratio:.2f} ({row.reached_both} of {row.n_pairs} runs "
        f"with both kinds and {row.reached_other} with the identifier alone got there), {row.verdict}"
        for row in rows.itertuples()
    ]
    last = rows.iloc[-1]
    if np.isnan(last["ratio_low"]):
        raise _CannotTest(f"Too few runs for an interval. {'; '.join(told)}.")
    interval = Interval(last["ratio"], last["ratio_low"], last["ratio_high"], int(last["n_pairs"]))
    shown, low, high = (100 * last[f"activity_{which}"] for which in ("difference", "low", "high"))
    told.append(
        f"{last['dreambooth_steps']} steps, on the way: the activity (simulated judge) {shown:+.0f} points "
        f"[{low:+.0f}, {high:+.0f}] more often with both kinds"
    )
    kept = [
        f"{row.class_noun} {100 * row.kept:.0f} % ({row.dreambooth_steps} steps)"
        for row in kept_by_class(table).dropna(subset="kept").itertuples()
    ]
    told.append(f"of the lost reward the class prompts still had before RL: {', '.join(kept)}")
    seeds = table["rl_seed"].nunique()
    return _Outcome("reward_identifier", interval, "; ".join(told), None, seeds, "times as many images")


def _raters_prefer_instructbooth(votes: pd.DataFrame) -> _Outcome:
    """C9: how often most raters prefer InstructBooth."""
    from ibkit.evaluate.study.votes import check_votes, kappas, preference_rate

    votes = check_votes(votes)
    try:
        rate = preference_rate(votes)
    except StudyError as error:
        raise _CannotTest(str(error)) from None
    simulated = votes.groupby("rater")["simulated"].first()
    kind = f"raters, {'all' if simulated.all() else int(simulated.sum())} simulated"
    agreement = ", ".join(
        f"{row.question} {row.kappa:.2f}"
        for row in kappas(votes).itertuples()
        if not row.methods or set(row.methods.split(" – ")) == {"instructbooth", "dreambooth"}
    )
    detail = f"{len(simulated)} {kind}, majority; agreement by Fleiss' kappa: {agreement}"
    asked = votes[votes["question"] == "preference"]
    seeds = asked.loc[asked["rl_seed"] >= 0, "rl_seed"].nunique()  # below 0: pairs without RL
    pair = asked[[{a, b} == {"instructbooth", "dreambooth"} for a, b in asked[["method_a", "method_b"]].to_numpy()]]
    cells = pair.groupby(["subject", "prompt_id"])["image_seed"].nunique()
    return _Outcome("preference", rate, detail, cells, seeds, "fraction of pairs")


@dataclass(frozen=True)
class _Test:
    """A claim and how it is tested.

    Attributes:
        id, claim, source: see `Claim`.
        quantity: what the figure is.
        evidence: the table it reads, a name of `EVIDENCE`.
        function: from that table (from `_Views` of the scores) to the outcome.
        side: the claimed side of the threshold, 1 above or −1 below.
        threshold, border: of the interval that decides; and the threshold in words.
    """

    id: str
    claim: str
    quantity: str
    source: str
    evidence: str
    function: Callable[..., _Outcome]
    side: int = 1
    threshold: float = 0.0
    border: str = "zero"


_TESTS: tuple[_Test, ...] = (
    _Test(
        "C1",
        "DreamBooth loses text fidelity against the base model.",
        "DreamBooth (with identifier) minus base model (class prompt), text fidelity",
        "§1, §2.2 and figure 3 (overfitting, low text fidelity); the paper gives no number for the base model",
        "scores",
        _text_is_lost,
        side=-1,
    ),
    _Test(
        "C2",
        "RL fine-tuning wins the lost text fidelity back.",
        "Share of the loss won back, (InstructBooth − DreamBooth) / (base − DreamBooth)",
        "Table 1 (people: text 81.3 % → 97.3 %), table 2 (ImageReward 0.441 → 1.196, CLIP-T 0.310 → 0.323)",
        "scores",
        _text_is_won_back,
    ),
    _Test(
        "C3",
        "RL fine-tuning keeps subject fidelity.",
        "InstructBooth minus DreamBooth, subject fidelity",
        "Table 1 (people: subject 97.0 % and 97.0 %), table 2 (DINO 0.699 → 0.650)",
        "scores",
        _subject_is_kept,
        threshold=-MARGIN,
        border=f"−{MARGIN}, the loss that is allowed",
    ),
    _Test(
        "C4",
        "Personalization makes the plain class noun drift towards the subject.",
        "DreamBooth minus base model, both with the class prompt: looks like the subject",
        "§2.1, the reason for the prior-preservation loss (language drift, Ruiz et al. 2023); no number in the paper",
        "scores",
        _class_noun_drifts,
    ),
    _Test(
        "C5",
        "A detailed description helps to learn a rare subject.",
        "With minus without the description, at the end of training: subject fidelity",
        "§2.1 and figure 15 (pictures only; no number in the paper)",
        "description",
        _description_helps,
    ),
    _Test(
        "C6",
        "DINO falls when the same subject changes its pose.",
        "DINO to the reference: other pose minus other view, the individual the same",
        "Appendix D and E, figure 11 (single pictures), table 2 (DINO 0.699 → 0.650, while people see no loss)",
        "changes",
        _pose_lowers_dino,
        side=-1,
    ),
    _Test(
        "C7",
        "RL learns faster with both kinds of prompts than with the identifier alone.",
        "Images until half of the lost reward is won back: identifier alone / both kinds, at equal totals",
        "§2.2 and figure 16 (learning curves of three seeds; no number in the paper)",
        "prompt_kinds",
        _both_kinds_learn_faster,
        threshold=1.0,
        border="1, equally many images",
    ),
    _Test(
        "C8",
        "What RL teaches carries over to prompts that it never saw.",
        "InstructBooth minus DreamBooth, text fidelity on unseen prompts",
        "Appendix D: figures 6, 8 and 9 (pictures), table 3 (DreamBench, all unseen: ImageReward 0.052 → 0.651)",
        "scores",
        _text_is_won_back_on_unseen,
    ),
    _Test(
        "C9",
        "Raters prefer InstructBooth's pictures to DreamBooth's.",
        "Pairs of pictures (same prompt and noise) in which most raters prefer InstructBooth's",
        "§3.3 and figure 4 (preferred at least twice as often as each baseline)",
        "votes",
        _raters_prefer_instructbooth,
        threshold=0.5,
        border="one half",
    ),
)


def _pairs(
    tables: dict[str, pd.DataFrame], metrics: tuple[str, ...], how: str = "on the same prompts and image seeds"
) -> tuple[str, dict[str, pd.DataFrame]]:
    """Pick the first metric that all tables have on shared units, and lay them out on those."""
    absent = [name for name, table in tables.items() if table.empty]
    if absent:
        raise _CannotTest(f"The scores hold no images of {' or '.join(absent)} {how}.")
    for metric in metrics:
        if all(metric in table.columns and table[metric].notna().any() for table in tables.values()):
            pairs = pair_up(tables, metric)
            if all(table.size for table in pairs.values()):
                return metric, pairs
    raise _CannotTest(f"None of {', '.join(metrics)} was scored for {', '.join(tables)} {how}.")


def primary_metrics(scores: pd.DataFrame) -> list[str]:
    """The one measure of text fidelity and the one of subject fidelity that the claims read, where scores have them."""
    orders = (TEXT_METRICS, SUBJECT_METRICS)
    found = [[name for name in order if name in scores.columns and scores[name].notna().any()] for order in orders]
    return [there[0] for there in found if there]


def _cells(pairs: dict[str, pd.DataFrame]) -> pd.Series:
    """Number of image seeds of each prompt of each subject."""
    units = next(iter(pairs.values())).columns.to_frame(index=False)
    return units.groupby(["subject", "prompt_id"]).size()


def _levels(metric: str, pairs: dict[str, pd.DataFrame]) -> str:
    """Name the level of each model behind a difference."""
    names = ("base", "dreambooth", "instructbooth")
    levels = [f"{method_label(name)} {METRICS[metric].show(_mean(pairs[name]))}" for name in names if name in pairs]
    return f"{METRICS[metric].label}: " + ", ".join(levels)


def _mean(table: pd.DataFrame) -> float:
    return float(np.nanmean(table.to_numpy()))


def _signed(metric: str, interval: Interval) -> str:
    value, low, high = (METRICS[metric].show(x, sign=True) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _n_seeds(pairs: dict[str, pd.DataFrame]) -> int:
    return max(len(table) for table in pairs.values())


# --- words, and the command line -----------------------------------------------------------------------------------


def claims_as_json(claims: list[Claim]) -> str:
    """Write claims as a JSON list of objects; a claim that was not tested has null for its numbers."""
    return dumps([asdict(claim) for claim in claims], indent=2, ensure_ascii=False)


def claims_as_text(claims: list[Claim], width: int = 100) -> str:
    """Write claims as a plain table, with the claim, its source and the numbers behind it below each line."""
    lines = [f"{'':4}{'verdict':16}{'our figure, 95 % interval':38}{'n':>6}{'seeds':>7}"]
    for claim in claims:
        n, seeds = (claim.n, claim.seeds or "–") if claim.value is not None else ("–", "–")
        lines.append(f"{claim.id:4}{claim.verdict:16}{claim.figure():38}{n:>6}{seeds:>7}")
        texts = claim.claim, f"{claim.quantity}.", claim.reason, claim.detail, f"Paper: {claim.source}."
        for text in filter(None, texts):
            lines.append(fill(text, width, initial_indent=" " * 4, subsequent_indent=" " * 6))
        lines.append("")
    return "\n".join(lines).rstrip()


def summary(claims: list[Claim]) -> str:
    """Say in one sentence per verdict which claims got it."""
    sentences = []
    for verdict in VERDICTS:
        those = [f"{claim.id} ({claim.claim.rstrip('.')})" for claim in claims if claim.verdict == verdict]
        if those:
            sentences.append(f"{verdict.capitalize()}, {len(those)} of {len(claims)}: {'; '.join(those)}.")
    return " ".join(sentences)


def claims_command(path: str | Path = "", json: bool = False) -> int:
    """Print the claims of a run.

    Args:
        path: see `evaluate_claims`; empty = the newest evaluated run in outputs/, or outputs/reference without one.
        json: print a JSON list instead of a table.

    Returns:
        0: the claims could be evaluated, whatever the verdicts.
    """
    folder = Path(path) if path else _newest_run()
    claims = evaluate_claims(folder)
    print(claims_as_json(claims) if json else f"Claims of the paper, tested on {folder}\n\n{claims_as_text(claims)}")
    return 0


def _newest_run() -> Path:
    outputs = resolve("outputs")
    evaluated = [table.parent for table in outputs.glob("*/03_evaluate/scores.csv")]
    newest = max(evaluated, key=lambda stage: (stage / "scores.csv").stat().st_mtime_ns, default=None)
    return newest.parent if newest else outputs / "reference"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `ibkit claims`."""
    parser.add_argument(
        "run", nargs="?", default="", metavar="RUN",
        help="folder of a run, or outputs/reference for the committed results (default: the newest run in outputs/)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON list of the claims")


def main(arguments: Namespace) -> int:
    """Run `ibkit claims`."""
    return claims_command(arguments.run, arguments.json)
