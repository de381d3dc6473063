"""The claims of DPG (Wei et al. 2024, arXiv:2407.06642); its tables were not open to us, see `shared/METHODS.md`."""

from ibkit.evaluate.claims import Claim

PAPER = "DPG"
ROLES = {"dpg": "dpg", "plain": "lora_dreambooth", "mean": "dpg_no_critic"}
MARGIN = 0.05  # D2: the loss of text fidelity that is allowed, as that of the subject in InstructBooth's C3
SOURCE = "Abstract: higher visual fidelity at the text's alignment of before"


def _claim(number: int, statement: str, quantity: str, source: str, **more) -> Claim:
    return Claim(
        f"D{number}", PAPER, statement, quantity, source, roles=ROLES, control="plain", only_with=("dpg*",),
        **{"treatment": "dpg", **more},
    )  # fmt: skip


CLAIMS = (
    _claim(
        1, "{dpg} keeps more of the subject than {plain}.", "{dpg} minus {plain}, subject fidelity", SOURCE,
        axis="subject",
    ),
    _claim(
        2, "{dpg} keeps the text as {plain} does.", "{dpg} minus {plain}, text fidelity", SOURCE, axis="text",
        threshold=-MARGIN, border=f"−{MARGIN}, the loss that is allowed",
    ),
    _claim(
        3, "Looking forward keeps more of the subject than the noise's loss, with the mean in Q's place.",
        "{mean} minus {plain}, subject fidelity", "The look-forward loss of its code; no number open to us",
        axis="subject", treatment="mean", notebook="10_deterministic_pg",
    ),
)  # fmt: skip
