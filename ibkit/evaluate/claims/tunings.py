"""Claims about the ways to follow a reward from one personalized model, each against DDPO or against drawing more.

They compare what evaluation 03 drew; how many pictures and seconds each training took stands in costs.csv of notebook
12. The pocket presets of DDPO and DPOK draw equally many pictures. DRaFT's draws fewer.
"""

from ibkit.evaluate.claims import BEST_OF, ROLES, Claim

MARGIN = 0.05  # G1: the loss of text fidelity that is allowed
LINE_UP = (
    {"personalized": ROLES["personalized"]}
    | {name: f"{{personalized}}+{name}" for name in ("ddpo", "dpok", "draft", "refl")}
    | {"best_of": "{personalized}+best_of_*"}
)
DPOK, GRADIENT, LEE = "DPOK", "Reward gradient", "Lee et al."


def _claim(id: str, paper: str, about: str, statement: str, quantity: str, source: str, axis: str, **more) -> Claim:
    return Claim(
        id, paper, statement, quantity, source, axis=axis, roles=LINE_UP, only_with=(about,), **more,
    )  # fmt: skip


CLAIMS = (
    _claim(
        "P1", DPOK, "*+dpok", "At equal pictures {dpok} keeps more of the subject than {ddpo}.",
        "{dpok} minus {ddpo}, subject fidelity",
        "§4.2 (the KL term keeps the model before); its figures compare with supervised fine-tuning, not with DDPO",
        "subject", treatment="dpok", control="ddpo",
    ),
    _claim(
        "P2", DPOK, "*+dpok", "{dpok} follows the text better than {personalized}.",
        "{dpok} minus {personalized}, text fidelity",
        "ImageReward .22 → .55 on 104 COCO prompts, .13 → .58 on DrawBench (of the base model)",
        "text", treatment="dpok",
    ),
    _claim(
        "G1", GRADIENT, "*+draft", "{draft} follows the text as well as {ddpo}, with fewer pictures.",
        "{draft} minus {ddpo}, text fidelity", "DRaFT and AlignProp (more reward for fewer samples than DDPO)",
        "text", treatment="draft", control="ddpo", threshold=-MARGIN, border=f"−{MARGIN}, the loss that is allowed",
    ),
    _claim(
        "G2", GRADIENT, "*+draft", "{draft} hacks the reward sooner: it keeps less of the subject than {ddpo}.",
        "{draft} minus {ddpo}, subject fidelity", "DRaFT and AlignProp (over-optimised rewards, loss of diversity)",
        "subject", treatment="draft", control="ddpo", side=-1,
    ),
    _claim(
        "G3", GRADIENT, "*+refl", "{refl} follows the text better than {personalized}.",
        "{refl} minus {personalized}, text fidelity", "ReFL (of the base model)", "text", treatment="refl",
    ),
    _claim(
        "N1", LEE, BEST_OF, "{best_of} follows the text better than {ddpo} with the same reward.",
        "{best_of} minus {ddpo}, text fidelity",
        "Best of 16 is the stronger baseline: 46 % wins over random pictures; tuned against it 20 % and 10 %",
        "text", treatment="best_of", control="ddpo",
    ),
)  # fmt: skip
