"""What table 2 of InstructBooth says of the systems it is compared with, as orders of arms."""

from collections.abc import Mapping

import pandas as pd

from ibkit.evaluate import claims
from ibkit.evaluate.arms import label_of
from ibkit.evaluate.claims import Claim, Outcome
from ibkit.evaluate.stats import bootstrap_difference, n_trainings

BASELINES = ("personalized", *claims.COMPARED)  # roles
LINE_UP = claims.ROLES | {name: name for name in claims.COMPARED}


def stands_apart(claim: Claim, scores: pd.DataFrame, arms: Mapping[str, str]) -> Outcome:
    """The treatment against the other baselines that were drawn: its difference from the one that is nearest. Where its
    arm is missing, or all others are, it is not tested.

    All of their differences must lie on the claimed side, so the one that is least far on it decides (an
    intersection-union test, which needs no correction for their number).
    """
    mine, there = arms[claim.treatment], set(scores["arm"])
    others = [arms[role] for role in BASELINES if role != claim.treatment and arms[role] in there]
    if mine not in there or not others:
        missing = label_of(mine) if mine not in there else "another baseline"
        raise claims.CannotTest(f"The scores have no pictures of {missing}: personalize with that method, too.")
    rows = {arm: claims.rows_of(scores, arm) for arm in (mine, *others)}
    metric, pairs = claims.pairs_of(rows, claim.axis)
    found = {other: bootstrap_difference(rows[mine], rows[other], metric) for other in others}
    nearest = min(found, key=lambda other: min(claim.side * found[other].low, claim.side * found[other].high))
    against = "; ".join(f"− {label_of(other)} {claims.signed(metric, interval)}" for other, interval in found.items())
    detail = f"{claims.levels(metric, pairs)}; {label_of(mine)} {against}"
    named = f" of the difference from {label_of(nearest)}"
    return Outcome(metric, found[nearest], detail, claims.cells_of(pairs), n_trainings(pairs), named=named)


def _order(number: int, statement: str, quantity: str, axis: str, treatment: str, side: int, source: str) -> Claim:
    return Claim(
        f"B{number}", claims.INSTRUCTBOOTH, statement, quantity, source, axis=axis, treatment=treatment, side=side,
        test=stands_apart, roles=LINE_UP, only_with=claims.COMPARED,
    )  # fmt: skip


CLAIMS = (
    _order(
        1, "{custom_diffusion} follows the text best of the systems without RL.",
        "{custom_diffusion} minus the other that is nearest, text fidelity", "text", "custom_diffusion", 1,
        "Table 2 (ImageReward: Custom Diffusion 1.088, NeTI 0.480, DreamBooth 0.441, Textual Inversion −1.15)",
    ),
    _order(
        2, "{custom_diffusion} keeps least of the subject of the systems without RL.",
        "{custom_diffusion} minus the other that is nearest, subject fidelity", "subject", "custom_diffusion", -1,
        "Table 2 (DINO: DreamBooth 0.699, NeTI 0.643, Textual Inversion 0.576, Custom Diffusion 0.535)",
    ),
    _order(
        3, "{personalized} keeps most of the subject of the systems without RL.",
        "{personalized} minus the other that is nearest, subject fidelity", "subject", "personalized", 1,
        "Table 2 (DINO: DreamBooth 0.699, NeTI 0.643, Textual Inversion 0.576, Custom Diffusion 0.535)",
    ),
    _order(
        4, "{textual_inversion} follows the text least of the systems without RL.",
        "{textual_inversion} minus the other that is nearest, text fidelity", "text", "textual_inversion", -1,
        "Table 2 (ImageReward: Custom Diffusion 1.088, NeTI 0.480, DreamBooth 0.441, Textual Inversion −1.15)",
    ),
    _order(
        5, "{tuned} follows the text better than every system without RL.",
        "{tuned} minus the one that is nearest, text fidelity", "text", "tuned", 1,
        "Table 2 (ImageReward: InstructBooth 1.196, Custom Diffusion 1.088; CLIP-T 0.323 and 0.323)",
    ),
)  # fmt: skip
