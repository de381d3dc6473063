"""The claims of RPO (Miao et al. 2024, arXiv:2407.12164) and its review's ablations, on the variants of notebook 11."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ibkit.evaluate.claims import CannotTest, Claim, Outcome, cells_of, levels, pairs_of, rows_of
from ibkit.evaluate.intervals import bootstrap_statistic
from ibkit.evaluate.stats import n_trainings, seed_groups, unit_groups

PAPER = "RPO"
ROLES = {
    name: name for name in (
        "rpo", "rpo_last", "rpo_no_preference", "rpo_similarity", "rpo_val_7", "rpo_train_7", "rpo_arithmetic",
    )
} | {"plain": "lora_dreambooth"}  # fmt: skip


def balance(claim: Claim, scores: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """The treatment's harmonic mean of the shares of text and subject, minus the control's.

    The harmonic mean of two means, not of each picture's answers, is 0 where one of the two is lost altogether.
    """
    chosen = {role: arms[role] for role in (claim.treatment, claim.control)}
    of = {arm: rows_of(scores, arm) for arm in chosen.values()}
    found = {axis: pairs_of(of, axis) for axis in ("text", "subject")}
    if found["text"][0] != "judge_text" or found["subject"][0] != "judge_identity":
        raise CannotTest("A balance needs shares of one scale, as the judge's: only the pocket world has one.")
    columns = {
        (axis, role): found[axis][1][arm].to_numpy() for axis in ("text", "subject") for role, arm in chosen.items()
    }
    pairs = found["text"][1]

    def difference(**means: np.ndarray) -> np.ndarray:
        both = [
            2 * means[f"text_{i}"] * means[f"subject_{i}"]
            / np.maximum(means[f"text_{i}"] + means[f"subject_{i}"], 1e-12)
            for i in (0, 1)
        ]  # fmt: skip
        return both[0] - both[1]

    named = {f"{axis}_{i}": columns[axis, role] for axis in ("text", "subject") for i, role in enumerate(chosen)}
    interval = bootstrap_statistic(
        named, difference, unit_groups(next(iter(pairs.values()))),
        seeds=seed_groups(*(found[axis][1][arm] for axis in ("text", "subject") for arm in chosen.values())),
    )  # fmt: skip
    steps = "; ".join(f"{arm} {rows['steps'].mean():.0f} steps" for arm, rows in of.items() if "steps" in rows)
    detail = "; ".join([levels(*found["text"]), levels(*found["subject"]), *([steps] if steps else [])])
    return Outcome("judge_text", interval, detail, cells_of(pairs), n_trainings(pairs), "fraction of images")


def _claim(number: int, statement: str, quantity: str, source: str, **more) -> Claim:
    return Claim(
        f"R{number}", PAPER, statement, quantity, source, roles=ROLES, only_with=("rpo*",),
        **{"treatment": "rpo", "notebook": "11_rpo", **more},
    )  # fmt: skip


CLAIMS = (
    _claim(
        1, "{rpo} balances text and subject better than {plain}, with fewer steps and generated pictures.",
        "{rpo} minus {plain}, harmonic mean of text and subject", "Table 1 of the paper", control="plain", test=balance,
        notebook="03_evaluate",
    ),
    _claim(
        2, "Without early stopping the text is lost.", "{rpo} minus {rpo_last}, text fidelity", "Ablation of the paper",
        axis="text", control="rpo_last",
    ),
    _claim(
        3, "The preference loss keeps text.", "{rpo_last} minus {rpo_similarity}, text fidelity",
        "Ablation of the paper", axis="text", treatment="rpo_last", control="rpo_similarity",
    ),
    _claim(
        4, "{rpo} balances better than pure similarity.", "{rpo} minus {rpo_similarity}, harmonic mean",
        "Ablation of the paper", control="rpo_similarity", test=balance,
    ),
    _claim(
        5, "A larger λ_val keeps more of the subject.", "{rpo_val_7} minus {rpo}, subject fidelity",
        "Ablation of λ_val (0.3, 0.5, 0.7)", axis="subject", treatment="rpo_val_7", control="rpo",
    ),
    _claim(
        6, "A larger λ_train keeps more of the subject.", "{rpo_train_7} minus {rpo}, subject fidelity",
        "Ablation of λ_train (0, 0.3, 0.5, 0.7; best CLIP-I at 0.7)", axis="subject", treatment="rpo_train_7",
        control="rpo",
    ),
    _claim(
        7, "The harmonic mean balances better than the arithmetic one.",
        "{rpo} minus {rpo_arithmetic}, harmonic mean", "Ablation of the reward", control="rpo_arithmetic", test=balance,
    ),
)  # fmt: skip
