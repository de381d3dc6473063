"""The committed results give the numbers that they gave when they were made, whatever the code around them becomes."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ibkit.cli import main
from ibkit.evaluate.stats import as_compared, check_scores
from ibkit.scorers.base import POCKET_WEIGHTS

REFERENCE = Path(__file__).parents[1] / "outputs" / "reference"
GOLDEN = json.loads(Path(__file__).with_name("golden_reference.json").read_text(encoding="utf-8"))


def test_claims_on_the_reference_keep_their_numbers_and_verdicts(capsys):
    main(["claims", str(REFERENCE), "--json"])
    found = {claim["id"]: claim for claim in json.loads(capsys.readouterr().out)}
    assert found.keys() == GOLDEN["claims"].keys()
    for name, golden in GOLDEN["claims"].items():
        for key, value in golden.items():
            wanted = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
            assert found[name][key] == wanted, (name, key)


def test_tables_of_the_reference_are_the_same_text(capsys):
    main(["tables", str(REFERENCE)])
    assert capsys.readouterr().out.splitlines() == GOLDEN["tables"]


def test_the_readme_has_the_action_sets_table(capsys):
    readme = (REFERENCE.parents[1] / "README.md").read_text(encoding="utf-8")
    compared = as_compared(check_scores(pd.read_csv(REFERENCE / "actions" / "scores.csv")))
    nouns = ["cat", "dog", "teddy bear", "monster toy", "pot", "cup", "bike", "motorbike"]
    assert f"| {' | '.join(nouns)} | mean |" in readme
    labels = {
        "base": "base model",
        "lora_dreambooth": "DreamBooth (LoRA)",
        "lora_dreambooth+ddpo": "InstructBooth (LoRA)",
    }
    for arm, label in labels.items():
        rows = compared[compared["arm"] == arm]
        assert (rows["class_noun"].value_counts() == 50).all() and set(rows["class_noun"]) == set(nouns)
        shares = 100 * rows.groupby("class_noun")[["judge_text", "judge_identity"]].mean().loc[nouns]
        cells = [f"{text:.0f} / {same:.0f} %" for text, same in [*shares.to_numpy(), shares.mean().to_numpy()]]
        assert f"| {label} | {' | '.join(cells)} |" in readme, label
    main(["claims", str(REFERENCE / "actions"), "--json"])
    found = {claim["id"]: claim for claim in json.loads(capsys.readouterr().out)}
    verdicts = {name: found[name]["verdict"] for name in ("C1", "C2", "C3")}
    assert verdicts == {"C1": "supported", "C2": "undecided", "C3": "undecided"}
    assert round(100 * found["C2"]["value"]) == 45 and found["C2"]["low"] < 0 and found["C2"]["high"] > 0.9


PERSONALIZATIONS = {
    "lora_dreambooth": "DreamBooth (LoRA)", "custom_diffusion": "Custom Diffusion",
    "textual_inversion": "Textual Inversion", "neti": "NeTI",
}  # fmt: skip


def claims(capsys, folder, letter):
    """The claims of one paper on a folder of reference, by id, as `ibkit claims --json` prints them."""
    main(["claims", str(REFERENCE / folder), "--json"])
    return {claim["id"]: claim for claim in json.loads(capsys.readouterr().out) if claim["id"].startswith(letter)}


def judged(folder):
    """Compared rows of a table of reference, with both shares in per cent."""
    compared = as_compared(check_scores(pd.read_csv(REFERENCE / folder / "scores.csv")))
    return compared.assign(text=100 * compared["judge_text"], same=100 * compared["judge_identity"])


def test_the_readme_has_the_table_of_the_personalizations(capsys):
    readme = (REFERENCE.parents[1] / "README.md").read_text(encoding="utf-8")
    compared = judged("methods")
    nouns = [noun for noun in compared["class_noun"].unique() if isinstance(noun, str)]
    shares = compared.groupby(["arm", "class_noun"])[["text", "same"]].mean()
    assert f"| prompt shown / same subject | {' | '.join(nouns)} | mean |" in readme
    for arm, label in PERSONALIZATIONS.items():
        for more, on_top in (("", ""), ("+ddpo", ", DDPO on top")):
            rows = [shares.loc[(arm + more, noun)] for noun in nouns]
            cells = ["{:.0f} / {:.0f} %".format(*row) for row in (*rows, sum(rows) / len(rows))]
            assert f"| {label}{on_top} | {' | '.join(cells)} |" in readme, label
    # What is said below it: of seeds, and of the paper's order.
    alone = shares.loc[[*PERSONALIZATIONS], "text"].unstack()
    assert "custom_diffusion" not in set(alone.idxmax()) and "textual_inversion" not in set(alone.idxmin())
    by_seed = compared.groupby(["arm", "class_noun", "seed"])[["text", "same"]].mean()
    better = by_seed.loc["neti", "same"].unstack().diff(axis=1)[1]
    assert f"by {better.min():.0f} to {better.max():.0f} points" in readme
    cost = (by_seed.loc[[f"{arm}+ddpo" for arm in PERSONALIZATIONS], "same"].to_numpy()
            - by_seed.loc[[*PERSONALIZATIONS], "same"].to_numpy()).reshape(len(PERSONALIZATIONS), -1)  # fmt: skip
    assert cost.std(axis=1).mean() > cost.mean(axis=1).std()
    verdicts = claims(capsys, "methods", "B")
    assert len(verdicts) == 5 and {claim["verdict"] for claim in verdicts.values()} == {"undecided"}


def test_the_readme_has_the_table_of_two_objectives():
    readme = " ".join((REFERENCE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    of_one, of_two = judged("methods"), judged("two_objectives")
    of_one = of_one[of_one["class_noun"] == "cat"]
    one, two = (rows.groupby("arm")[["text", "same"]].mean() for rows in (of_one, of_two))
    for arm, label in PERSONALIZATIONS.items():
        assert one.loc[arm].tolist() == two.loc[arm].tolist()  # the same personalizations
        cells = [
            "{:.0f} / {:.0f} %".format(*row) for row in (one.loc[arm], one.loc[f"{arm}+ddpo"], two.loc[f"{arm}+ddpo"])
        ]
        assert f"| {label} | {' | '.join(cells)} |" in readme, label
    same = of_two.groupby(["arm", "seed"])["same"].mean()
    won = {arm: (same[f"{arm}+ddpo"] - same[arm]).round().astype(int).tolist() for arm in PERSONALIZATIONS}
    assert "of Custom Diffusion {} and {} points with the two seeds".format(*won["custom_diffusion"]) in readme
    assert "of NeTI {} and {},".format(*won["neti"]) in readme
    assert "of Textual Inversion 32 and none" in readme and won["textual_inversion"] == [32, 0]


def test_the_page_of_human_feedback_has_its_tables(capsys):
    page = (REFERENCE.parents[1] / "docs" / "methods" / "feedback.md").read_text(encoding="utf-8")
    predicted = pd.read_csv(REFERENCE / "feedback" / "feedback_reward.csv").groupby("subset", sort=False)
    drawn = pd.read_csv(REFERENCE / "feedback" / "feedback.csv")
    shown = 100 * drawn.groupby(["subset", "arm"], sort=False)["judge_text"].mean().unstack()
    columns = ["fulfilled", "CLIP score right", "reward right", "without prompts right"]
    for subset, right in (100 * predicted[columns].mean()).iterrows():
        label = "seen, new pictures" if subset == "seen" else subset
        assert f"| {label} | {' | '.join(f'{share:.0f}' for share in right)} |" in page
        arms = shown.loc[subset, ["base", "best_of_8", "labelled", "scored", "pretrain"]]
        assert f"| {subset} | {' | '.join(f'{share:.0f}' for share in arms)} |" in page
    flat = " ".join(page.split())
    seen, combination, thing = predicted["reward"].mean()
    assert f"mean, {seen:.2f} on seen prompts, is {combination:.1f} and {thing:.1f} on unseen ones" in flat
    verdicts = claims(capsys, "feedback", "L")
    assert len(verdicts) == 8 and {claim["verdict"] for claim in verdicts.values()} == {"undecided"}
    help, low, high = (100 * verdicts["L2"][key] for key in ("value", "low", "high"))
    assert f"(L2: {help:.1f} [{low:.1f}, {high:+.1f}] points)" in flat
    right = json.loads((POCKET_WEIGHTS / "counting" / "counting.json").read_text())["right"]
    count, colour, place, everything = (100 * right[kind]["everything"] for kind in ("count", "colour", "place", "all"))
    assert (
        f"{count:.0f} % right for counts (the number always, the class in {100 * right['count']['class']:.0f} %" in flat
    )
    assert f"{colour:.0f} % for colours, {place:.0f} % for places, {everything:.0f} % for all three" in flat
