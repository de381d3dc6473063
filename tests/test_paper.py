"""The report of many runs, its pictures, and the material for a paper."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from ibkit.errors import ArtifactError, ParameterError, ScoreError
from ibkit.evaluate.stats import as_compared, check_scores
from ibkit.evaluate.tables import by_trainings
from ibkit.report import build_report
from ibkit.report.gather import gather
from ibkit.report.latex import best_arms, fidelity_table
from ibkit.report.overview import drawings
from ibkit.report.paper import export_paper
from ibkit.report.pictures import check_choice, hacked, walls
from tests.test_report import PROMPTS, Page, make_run, scene, score_table


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two main runs that differ by subject and seed."""
    outputs = tmp_path_factory.mktemp("two")
    make_run(outputs / "one")
    make_run(outputs / "two", subject="dog", seed=3)
    return [outputs / "one", outputs / "two"]


@pytest.fixture(scope="module")
def page(two_runs, tmp_path_factory):
    path = build_report(two_runs, tmp_path_factory.mktemp("page") / "both.html")
    return Page(path.read_text(encoding="utf-8"))


def words(page):
    return " ".join(" ".join(page.text).split()).replace("\u00a0", " ")


def seeds_of(pictures):
    return [int(re.search(r"seed (\d+)", picture.note)[1]) for picture in pictures]


def test_pictures_are_large_on_the_same_noise_and_enlarge_without_a_script(page):
    pictures = [image for image in page.all("img") if "noise seed" in image["alt"]]
    assert pictures and all(int(image["width"]) >= 96 for image in pictures)
    wall = [image["alt"] for image in pictures[3:21]]  # after the three of the summary
    assert [alt.split(", by ")[0] for alt in wall[::6]] == list(PROMPTS.values())
    assert [alt.split("seed ")[1][0] for alt in wall[:6]] == ["0", "1"] * 3
    assert [box["type"] for box in page.all("input")] == ["checkbox"] * len(page.all("img"))
    assert "chosen before anybody looked" in words(page) and "The worst pictures (8)" in words(page)


def test_the_summary_stands_first_with_its_number_and_facts(page, two_runs):
    means = as_compared(gather(two_runs).scores).groupby("arm")["judge_text"].mean()
    number = f"{100 * means['dreambooth']:.1f} % → {100 * means['dreambooth+ddpo']:.1f} %"
    text = words(page)
    assert text.index(number) < text.index("The paper's claims, tested on these runs")
    assert "2 subjects, 3 prompts, n = 120 images a method. Personalization seeds: 0, 3. Tuning seeds: 0, 3." in text


def test_one_page_for_many_runs(page, two_runs):
    for expected in (
        "Runs one, two", "subject cat, dog", "Every subject and training (6)", "While they learn: every training",
    ):  # fmt: skip
        assert expected in words(page), expected
    both = gather(two_runs)
    table = by_trainings(both.scores)
    assert list(zip(table["Subject"], table["Seed"], strict=True)).count(("dog", "3")) == 2
    drawn = drawings(both)
    assert set(drawn) == {"plane", "bars", "trainings"}
    means = as_compared(both.scores).groupby("arm")["judge_text"].mean()
    assert drawn["plane"][1].set_index("arm")["text_value"].to_dict() == pytest.approx(means.to_dict())
    assert drawn["trainings"][1][["subject", "seed"]].drop_duplicates().to_numpy().tolist() == [["cat", 0], ["dog", 3]]
    with pytest.raises(ArtifactError, match="given twice"):
        gather([two_runs[0], two_runs[0]])


def test_the_choice_of_pictures(two_runs):
    scores = gather(two_runs[:1]).scores
    last = scores[(scores["arm"] == "dreambooth+ddpo") & (scores["file"] != "")]
    # Among the pictures of the arm, over all prompts, as `goodness` ranks them.
    good = last[["judge_text", "judge_identity"]].rank(pct=True).mean(axis=1)[last["prompt_id"] == "bike"]
    for choice, expected in (("best", good.max()), ("worst", good.min())):
        wall = walls(scores, choice)[0]
        shown = dict(wall.rows)["a cat riding a bike"]
        seeds = seeds_of(shown[-1][1])
        assert good[last["image_seed"] == seeds[0]].item() == expected
        assert all(seeds_of(pictures) == seeds for _, pictures in shown)
        assert f"is {choice} by" in wall.choice
    assert seeds_of(walls(scores, "3,1")[0].rows[0][1][0][1]) == [3, 1]
    with pytest.raises(ParameterError, match="no picture of cat has that seed"):
        walls(scores, "77")
    with pytest.raises(ParameterError, match="none of first, best, worst"):
        check_choice("prettiest")


def test_hacked_pictures_are_high_by_the_reward_and_low_by_the_rest(tmp_path):
    rows = score_table(4)
    rows = rows[rows["arm"] == "dreambooth+ddpo"].assign(judge_text=1, judge_identity=1)
    rows["image_reward"] = np.arange(len(rows)) / 100
    rows.loc[rows.index[-1], ["judge_text", "judge_identity"]] = 0
    scene("dreambooth+ddpo", "bike", 0).save(tmp_path / "picture.png")
    rows = check_scores(rows).assign(file=str(tmp_path / "picture.png"))
    first = hacked(rows, "image_reward")[0].note
    assert f"ImageReward: {rows['image_reward'].max():.3f}" in first and "judge): 0.0 %" in first
    assert hacked(rows, "judge_text") == []  # a primary metric cannot tell on itself


def test_export_has_every_figure_in_three_formats_with_real_text(two_runs, tmp_path):
    files = export_paper(two_runs, tmp_path / "paper")
    names = {name.split("/")[1].split(".")[0] for name in files if name.startswith("figures/")}
    assert names == {"plane", "bars", "trainings", "grid-cat", "grid-dog"}
    assert all(f"figures/{name}.{kind}" in files for name in names for kind in ("png", "svg", "pdf", "csv"))
    svg = (tmp_path / "paper/figures/plane.svg").read_text(encoding="utf-8")
    assert "InstructBooth</text>" in svg and "Text against" not in svg
    captions = (tmp_path / "paper/captions.md").read_text(encoding="utf-8")
    for expected in ("Model: pocket.", "n = 120 images", "seeds: 0, 3", "95 %", "chosen before anybody looked"):
        assert expected in captions
    with pytest.raises(ArtifactError, match="is there already"):
        export_paper(two_runs, tmp_path / "paper")
    assert not list(tmp_path.glob(".paper*"))
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed: the LaTeX was not compiled")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    made = subprocess.run(command, cwd=tmp_path / "paper", capture_output=True, text=True, errors="replace")
    assert made.returncode == 0 and (tmp_path / "paper/paper.pdf").stat().st_size > 20_000, made.stdout[-2000:]
    assert "Overfull" not in made.stdout


def test_bold_only_where_the_interval_says_so():
    scores = check_scores(score_table())
    assert "judge_identity" not in best_arms(scores, ["judge_identity"])  # two are alike
    clear = scores.assign(clip_t=scores["arm"].map({"base": 0.1, "dreambooth": 0.2, "dreambooth+ddpo": 0.9}))
    clear["clip_t"] += scores["image_seed"] / 1000
    assert best_arms(clear, ["clip_t"]) == {"clip_t": "dreambooth+ddpo"}
    table = fidelity_table(clear, ["clip_t"], "n = 60.", "tab:x")
    assert table.count(r"\textbf") == 1 and r"\label{tab:x}" in table and "n = 60." in table and "judge" not in table
    assert r"\textbf" in table.split("InstructBooth &")[1]
    with pytest.raises(ScoreError, match="did you mean 'clip_t'"):
        fidelity_table(clear, ["clipt"], "", "tab:x")
