"""What is said of a whole grid: arms as rows, subject by subject, against a chosen arm."""

import json

import pandas as pd
import pytest

from ibkit import cli
from ibkit.evaluate.claims import evaluate_claims, load_scores
from ibkit.evaluate.stats import as_compared, check_scores
from ibkit.evaluate.tables import by_subjects, differences
from ibkit.report import build_report, pictures
from ibkit.report.gather import gather
from ibkit.report.pictures import walls
from ibkit.runs import GRID, Run
from tests.test_report import scene, score_table

SUBJECTS = ("cat", "dog", "pot")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid's folder of three subjects, one of which has a cell that failed."""
    folder = tmp_path_factory.mktemp("outputs") / "all"
    for seed, subject in enumerate(SUBJECTS):
        scores = score_table(20).assign(subject=subject, class_noun=subject)
        for column in ("seed", "tune_seed"):
            scores.loc[scores[column].notna(), column] = seed
        run = Run.open(folder / subject / "03_evaluate", "03_evaluate", {"model": "pocket"})
        run.write_table("scores.csv", scores)
        compared = as_compared(check_scores(scores))
        for row in compared[compared["image_seed"] < 2].itertuples():
            scene(row.arm, row.prompt_id, row.image_seed).save(run.path(row.image))
        run.note_output("images")
        run.finish()
    Run.open(folder / "cat/02_rl_finetune-dpok", "02_rl_finetune", {"model": "pocket"}).fail("for the test")
    (folder / GRID).write_text("{}")
    return folder


def test_all_runs_of_a_grid_are_read_as_one(grid):
    gathered = gather([grid])
    assert gathered.many and len(gathered.stages) == 3 and gathered.unfinished == ("cat/02_rl_finetune-dpok",)
    assert set(load_scores(grid)["subject"]) == set(SUBJECTS)
    (c1,) = (found for found in evaluate_claims(grid) if found.id == "C1")
    assert c1.verdict == "supported" and c1.seeds == 3
    table = by_subjects(load_scores(grid))
    assert list(table["Subject"]) == [*SUBJECTS] * 3 and table["Method"].nunique() == 3


def test_differences_against_a_chosen_arm(grid, capsys, tmp_path):
    gaps = differences(load_scores(grid), against="dreambooth+ddpo")
    assert set(gaps["arm"]) == {"base", "dreambooth"} and set(gaps["against"]) == {"dreambooth+ddpo"}
    text = gaps.set_index(["arm", "metric"]).loc[("dreambooth", "judge_text")]
    assert text["value"] < -0.3 and text["verdict"] == "lower"
    assert cli.main(["tables", str(grid), "--against", "dreambooth+ddpo", "--out", str(tmp_path / "tables")]) == 0
    assert "Subjects" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "tables/differences.csv")["Against"]) == {"InstructBooth"}
    assert cli.main(["tables", str(grid), "--against", "dreamboth"]) == 2
    assert "there are: base, dreambooth" in capsys.readouterr().err


def test_the_page_of_a_grid(grid, tmp_path):
    page = build_report(grid, tmp_path / "page.html", against="dreambooth").read_text(encoding="utf-8")
    assert "Not finished, and left out:</strong> cat/02_rl_finetune-dpok." in page
    assert "Differences against DreamBooth" in page and "Subject by subject (9)" in page


def test_a_page_shows_a_sample_where_all_pictures_are_too_many(grid, monkeypatch):
    scores = gather([grid]).scores
    whole = walls(scores)
    assert [wall.title for wall in whole] == [*SUBJECTS] and "sample" not in whole[0].choice
    n = sum(len(shown) for wall in whole for _, cells in wall.rows for _, shown in cells)
    assert n == 3 * 3 * 3 * 2
    one = len(whole[0].rows[0][1][0][1][0].uri)
    for room, n_subjects, n_prompts, each in ((54, 3, 3, 2), (53, 3, 3, 1), (18, 3, 2, 1), (9, 3, 1, 1), (6, 2, 1, 1)):
        monkeypatch.setattr(pictures, "MOST_BYTES", room * one)
        shown = walls(scores)
        assert len(shown) == n_subjects, room
        assert {len(wall.rows) for wall in shown} == {n_prompts}, room
        assert {len(p) for wall in shown for _, cells in wall.rows for _, p in cells} == {each}, room
    assert "A sample of 2 of 3 subjects" in shown[0].choice and "The first 1 prompts; 2 more" in shown[0].choice


def test_a_lone_run_reads_as_before(grid):
    assert not gather([grid / "dog"]).many
    assert set(load_scores(grid / "dog")["subject"]) == {"dog"}
    assert json.loads((grid / GRID).read_text()) == {}
