"""Claims about tunings: who plays which role beside whom, and both sides of each verdict."""

import pandas as pd
import pytest

from ibkit.evaluate.claims import claims_from_scores, stand_ins
from ibkit.evaluate.stats import check_scores
from tests.test_claims import images, story

START = "lora_dreambooth"


def compared(start=START, **arms):
    """Scores of one personalization at 50 % text and 90 % subject, and tunings of it: name -> (text, subject)."""
    chains = [images(f"{start}+{name}", True, *levels, tune_seed=0) for name, levels in arms.items()]
    rows = pd.concat([images("base", False, 1.0, 0.05, seed=None), images(start, True, 0.5, 0.9), *chains])
    return {claim.id: claim for claim in claims_from_scores(check_scores(rows))}


ALL = {"ddpo": (0.7, 0.7), "dpok": (0.6, 0.85), "draft": (0.8, 0.4), "refl": (0.55, 0.9), "best_of_4": (0.9, 0.9)}
TURNED = {"ddpo": (0.9, 0.9), "dpok": (0.4, 0.5), "draft": (0.5, 1.0), "refl": (0.3, 0.9), "best_of_4": (0.6, 0.9)}


@pytest.mark.parametrize("start", [START, "dreambooth"])
@pytest.mark.parametrize("arms, verdict", [(ALL, "supported"), (TURNED, "contradicted")])
def test_each_claim_has_two_sides(start, arms, verdict):
    claims = compared(start, **arms)
    assert {id: claims[id].verdict for id in ("P1", "P2", "G1", "G2", "G3", "N1")} == dict.fromkeys(
        ("P1", "P2", "G1", "G2", "G3", "N1"), verdict
    )
    assert claims["P1"].value == pytest.approx(arms["dpok"][1] - arms["ddpo"][1])
    assert claims["N1"].value == pytest.approx(arms["best_of_4"][0] - arms["ddpo"][0])
    assert "+ best of 4 follows the text better than InstructBooth" in claims["N1"].claim


def test_a_run_without_such_a_tuning_does_not_list_its_claims():
    assert not {"P1", "P2", "G1", "G2", "G3", "N1"} & {c.id for c in claims_from_scores(check_scores(story()))}
    alone = compared(dpok=(0.6, 0.85))
    assert not {"G1", "G3", "N1"} & set(alone)
    assert alone["P1"].verdict == "not tested" and "no images of" in alone["P1"].reason
    assert alone["P2"].verdict == "supported"


def test_best_of_n_and_other_tunings_do_not_take_instructbooths_place():
    """C2 and C3 are about DDPO, whatever stands beside it."""
    beside = [START, *(f"{START}+{name}" for name in ALL)]
    assert stand_ins(beside) == {"tuned": f"{START}+ddpo", "personalized": START}
    assert stand_ins([START, f"{START}+dpok", f"{START}+best_of_4"]) == {
        "tuned": f"{START}+dpok",
        "personalized": START,
    }
    assert "tuned" not in stand_ins([START, f"{START}+best_of_4"])
    assert compared(**ALL)["C3"].value == pytest.approx(ALL["ddpo"][1] - 0.9)
