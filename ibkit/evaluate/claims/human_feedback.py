"""The claims of Lee et al. 2023 (arXiv 2302.12192), on the tables of notebook 09 and of `benchmarks/feedback.py`.

Their scores are of the counter, which simulated raters repeat with errors; how natural pictures are is the precision.
"""

import fnmatch
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pandas as pd

from ibkit.evaluate.claims import CannotTest, Claim, Outcome, cells_of, levels
from ibkit.evaluate.columns import SHARE, TEXT, WHOLE, check_table
from ibkit.evaluate.intervals import difference_interval
from ibkit.evaluate.stats import METRICS, bootstrap_difference, check_scores, n_trainings, pair_up

PAPER = "Lee et al."
UNSEEN = ("unseen combination", "unseen object")
REWARDS = {"reward": "reward", "plain": "without prompts", "clip": "CLIP score"}  # columns of feedback_reward.csv
PREDICTED = {"seed": WHOLE, "subset": TEXT, "prompt": TEXT, "image_seed": WHOLE}
RIGHT = {f"{name} right": SHARE for name in REWARDS.values()}
ARMS = {"base": "base", "labelled": "labelled", "scored": "scored", "tuned": "pretrain", "best": "best_of_*"}


def predicts(claim: Claim, table: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """How much more often the treatment predicts what pictures of unseen prompts show than the control does."""
    names = [arms[claim.treatment], arms[claim.control]]
    if not set(PREDICTED) <= set(table.columns):
        raise CannotTest(f"{claim.file} lacks its columns: run 09_human_feedback again.")
    if missing := [name for name in names if f"{name} right" not in table]:
        raise CannotTest(f"{claim.file} has no predictions of {missing[0]}.")
    rows = table[table["subset"].isin(UNSEEN)]
    if rows.empty:
        raise CannotTest(f"{claim.file} has no pictures of unseen prompts.")
    mine, other = (
        rows.pivot_table(index="seed", columns=["prompt", "image_seed"], values=f"{name} right") for name in names
    )
    prompts = mine.columns.get_level_values("prompt")
    interval = difference_interval(mine.to_numpy(), other.to_numpy(), prompts.to_numpy())
    of = "; ".join(
        f"{subset}: " + ", ".join(f"{name} {METRICS['agreement'].show(part[f'{name} right'].mean())}" for name in names)
        for subset, part in rows.groupby("subset", sort=False)
    )
    cells = pd.Series(np.ones(len(prompts))).groupby(prompts).size()
    return Outcome("agreement", interval, of, cells, len(mine))


def on_prompts(
    claim: Claim, table: pd.DataFrame, arms: Mapping[str, str], metric: str = "judge_text", subset: str = ""
) -> Outcome:
    """The treatment's pictures minus the control's, on the same prompts: all, or those of one subset."""
    scores = check_scores(table, claim.file)
    if not {"subset", metric} <= set(scores.columns):
        raise CannotTest(f"{claim.file} lacks its columns: run 09_human_feedback again.")
    if subset:
        scores = scores[scores["subset"] == subset]
    drawn = set(scores["arm"])
    names = [max(fnmatch.filter(drawn, arms[role]), default=arms[role]) for role in (claim.treatment, claim.control)]
    of = {arm: scores[scores["arm"] == arm] for arm in names}
    if absent := [arm for arm, rows in of.items() if rows.empty]:
        raise CannotTest(f"{claim.file} holds no {subset + ' ' if subset else ''}pictures of {' or '.join(absent)}.")
    pairs = pair_up(of, metric)
    one, other = of.values()
    return Outcome(
        metric, bootstrap_difference(one, other, metric), levels(metric, pairs), cells_of(pairs), n_trainings(pairs)
    )


def _claim(number: int, statement: str, quantity: str, source: str, test: Callable, **more) -> Claim:
    return Claim(
        f"L{number}", PAPER, statement, quantity, source, test=test, only_with=("labelled", "pretrain"),
        **{"treatment": "tuned", "control": "base", "roles": ARMS, "file": "feedback.csv",
           "notebook": "09_human_feedback", **more},
    )  # fmt: skip


def _of_reward(number: int, statement: str, quantity: str, source: str, control: str) -> Claim:
    return _claim(
        number, statement, quantity, source, predicts, treatment="reward", control=control, roles=REWARDS,
        file="feedback_reward.csv", check=partial(check_table, keys=PREDICTED, measured=RIGHT),
    )  # fmt: skip


CLAIMS = (
    _of_reward(
        1, "A reward that was learned from feedback predicts it better than CLIP's score.",
        "share of unseen prompts' pictures predicted right, reward minus CLIP's score", "§4.2", "clip",
    ),
    _of_reward(
        2, "The prompt classification helps the reward on unseen prompts.",
        "share of unseen prompts' pictures predicted right, with minus without it", "§4.2, the ablation of λ", "plain",
    ),
    _claim(
        3, "Fine-tuning by the reward raises the share of pictures that show their prompt.",
        "tuned minus base, prompts that were rated", "Alignment 50 % tuned, 3 % base (two thirds of nine raters)",
        partial(on_prompts, subset="seen"),
    ),
    _claim(
        4, "It raises it for unseen combinations too.", "tuned minus base, unseen combinations",
        "60 of its 120 prompts are unseen", partial(on_prompts, subset="unseen combination"),
    ),
    _claim(
        5, "It raises it for unseen objects too.", "tuned minus base, unseen objects",
        "five held-out objects", partial(on_prompts, subset="unseen object"),
    ),
    _claim(
        6, "Unlabelled pictures protect fidelity.", "with minus without them, pictures among true ones",
        "FID 26.59 labelled only, 21.02 with scored pictures", partial(on_prompts, metric="precision"),
        treatment="scored", control="labelled",
    ),
    _claim(
        7, "The pre-training term protects fidelity.", "with minus without it, pictures among true ones",
        "FID 21.02 without, 16.76 with it", partial(on_prompts, metric="precision"), control="scored",
    ),
    _claim(
        8, "The best of n by the same reward show the prompt more often than the tuned model.",
        "the best of n minus tuned", "Tuned against the best of 16: 20 and 10 % of wins", on_prompts,
        treatment="best", control="tuned",
    ),
)  # fmt: skip
