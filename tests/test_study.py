"""The human study: items, files of ratings, the page, votes, and statistics worked out by hand."""

import io
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import torch

from ibkit.data.subject import PersonalizedSubject, demo_subject, world_photos
from ibkit.errors import ArtifactError, ParameterError, StudyError
from ibkit.evaluate import score as evaluation
from ibkit.evaluate.published import EVALUATORS
from ibkit.evaluate.stats import mean_interval
from ibkit.evaluate.study.agreement import (
    bradley_terry,
    fleiss_kappa,
    kappas,
    separated_groups,
    strengths,
    win_matrix,
)
from ibkit.evaluate.study.items import QUESTIONS, make_items, read_evaluated, study_name
from ibkit.evaluate.study.page import RatingPage
from ibkit.evaluate.study.ratings import RatingSession, append_line, merge_ratings, ratings_file, read_ratings, tasks_of
from ibkit.evaluate.study.simulated import Sight, _prefer, load_raters, simulate
from ibkit.evaluate.study.votes import (
    VOTE_COLUMNS,
    check_votes,
    load_votes,
    majority,
    preference_rate,
    preferences,
    shares,
)
from ibkit.pocket.build.autoencoder import new_autoencoder, redraw
from ibkit.pocket.build.common import Budget
from ibkit.pocket.build.data import Pictures
from ibkit.pocket.build.judge import jitter, train
from ibkit.pocket.draw import render
from ibkit.pocket.world import NO_ACTIVITY, sample_scene, sample_subject
from ibkit.runs import Run, project_root, read_run
from ibkit.scorers.judge import RATERS, Judge

ROOT = project_root()
SUBJECT = PersonalizedSubject("orange cat", "cat", "sks", "", "pocket", "", demo_subject("cat"))
ACTIVITIES = ["playing soccer", "riding a bike"]


def write_runs(folder, n_images=3, tune_seeds=(0,), subject=SUBJECT, seed=0):
    """A finished 01 and 03 run whose pictures are renders: the base model draws another cat doing as asked, DreamBooth
    the cat at rest, InstructBooth the cat doing as asked.
    """
    first = Run.open(folder / "01_personalize", "01_personalize", {"seed": 0})
    subject.save(first)
    for i, photo in enumerate(world_photos(demo_subject("cat"), 3)):
        first.write_bytes(f"photos/{i}.png", png(photo))
    first.finish()
    sources = {"run0": read_run(folder / "01_personalize")}
    run = Run.open(folder / "03_evaluate", "03_evaluate", {"seed": 0}, sources)
    models = [("base", None, None), ("dreambooth", 0, None), *(("dreambooth+ddpo", 0, k) for k in tune_seeds)]
    rows = evaluation.jobs(subject, ACTIVITIES, n_images, models, seed)
    rng = random.Random("pictures of the test")
    for row in rows.itertuples():
        who = sample_subject(rng, "cat") if row.arm == "base" else demo_subject("cat")
        activity = NO_ACTIVITY if row.arm == "dreambooth" else row.activity
        run.write_bytes(row.image, png(render(sample_scene(rng, who, activity, "park"))))
    # as notebook 03 writes it: the real photos have a row, and no picture that anybody drew
    real = {"arm": "real", "subject": subject.name, "class_noun": "cat", "prompt_id": "photo"}
    real |= {"identifier": True, "image_seed": 0}
    run.write_table("scores.csv", pd.concat([rows, pd.DataFrame([real])], ignore_index=True).assign(clip_t=0.5))
    run.finish()
    return read_run(run.folder)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return read_evaluated(write_runs(tmp_path_factory.mktemp("study")), "pocket")


@pytest.fixture(scope="module")
def items(evaluated):
    return make_items([evaluated])


def vote_rows(answers, question="preference", raters="ABCDEFG", **fixed):
    """Votes by hand: answers[item][rater], one noise an item, all of one prompt."""
    arms = {"arm": "", "arm_a": "dreambooth", "arm_b": "dreambooth+ddpo"}
    if question != "preference":
        arms = {"arm": "dreambooth", "arm_a": "", "arm_b": ""}
    return pd.DataFrame(
        [
            {"rater": rater, "simulated": False, "question": question, "subject": "cat", "prompt_id": f"p{i % 2}"}
            | {"image_seed": i, "seed": 0, "tune_seed": 0, **arms, "answer": answer, "item": f"{question}{i}"} | fixed
            for i, given in enumerate(answers)
            for rater, answer in zip(raters, given, strict=False)
        ]
    )[VOTE_COLUMNS].astype({"seed": "Int64", "tune_seed": "Int64"})  # fmt: skip


# --- items ---------------------------------------------------------------------------------------------------------


def test_every_picture_and_pair_is_asked_once(items):
    counts = items.groupby(["question", "arm", "arm_a", "arm_b"]).size().to_dict()
    assert counts == (
        {(q, m, "", ""): 6 for q in ("subject", "text") for m in ("base", "dreambooth", "dreambooth+ddpo")}
        | {("preference", "", "base", "dreambooth"): 6, ("preference", "", "base", "dreambooth+ddpo"): 6}
        | {("preference", "", "dreambooth", "dreambooth+ddpo"): 6}
    )
    assert items["item"].is_unique
    pair = items[(items["question"] == "preference") & (items["arm_a"] == "base")].iloc[0]
    assert "/base/" in pair["image_a"] and pair["image_a"].rsplit("-", 1)[1] == pair["image_b"].rsplit("-", 1)[1]


def test_what_is_not_tuned_meets_every_tuning_and_n_items_is_spread(tmp_path):
    two = make_items([read_evaluated(write_runs(tmp_path, n_images=3, tune_seeds=(0, 5)), "pocket")])
    count = two.groupby(["question", "arm", "arm_a", "arm_b"]).size()
    assert count["preference", "", "dreambooth", "dreambooth+ddpo"] == 12 and count["text", "dreambooth", "", ""] == 6
    few = make_items([read_evaluated(read_run(tmp_path / "03_evaluate"), "pocket")], n_items=4)
    cells = few.groupby(["question", "arm", "arm_a", "arm_b"])
    assert set(cells.size()) == {4}
    pair = few[(few["arm_a"] == "dreambooth") & (few["arm_b"] == "dreambooth+ddpo")]
    assert pair.groupby(["prompt_id", "tune_seed"]).size().tolist() == [1, 1, 1, 1]
    # the seeds keep the same noises, so that they stay crossed with them
    assert pair.groupby("prompt_id")["image_seed"].nunique().tolist() == [1, 1]
    assert set(few["item"]) <= set(two["item"])


def test_two_different_pictures_in_one_place_are_refused(tmp_path, evaluated):
    other = write_runs(tmp_path, seed=0, tune_seeds=(0,))
    assert len(make_items([evaluated, read_evaluated(other, "pocket")])) == 54  # the very same pictures: once
    other = tmp_path / "other"
    write_runs(other, n_images=1)
    folder = other / "03_evaluate"
    scores = read_run(folder).table("scores.csv")
    changed = Run.open(tmp_path / "again", "03_evaluate", {}, {"run0": other / "01_personalize"})
    for image in scores["image"].dropna():
        changed.write_bytes(image, png(render(sample_scene(random.Random(image), demo_subject("cat")))))
    changed.write_table("scores.csv", scores)
    changed.finish()
    with pytest.raises(StudyError, match="different pictures of 'orange cat' by"):
        make_items([evaluated, read_evaluated(read_run(tmp_path / "again"), "pocket")])


def test_the_01_run_is_found_beside_a_moved_03_run_and_missed_by_a_sentence(tmp_path):
    write_runs(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert read_evaluated(read_run(tmp_path / "after" / "03_evaluate"), "pocket").subject == SUBJECT
    assert len(read_evaluated(read_run(tmp_path / "after" / "03_evaluate"), "pocket").references) == 3
    with pytest.raises(ParameterError, match="evaluated the model 'pocket'"):
        read_evaluated(read_run(tmp_path / "after" / "03_evaluate"), "sd15")
    (tmp_path / "after" / "01_personalize").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="put it back beside that run"):
        read_evaluated(read_run(tmp_path / "after" / "03_evaluate"), "pocket")


def test_each_tuning_is_paired_with_the_personalization_it_started_from(evaluated):
    keys = [("base", None, None), ("dreambooth", 0, None), ("dreambooth", 1, None), ("dreambooth+ddpo", 1, 4)]
    rows = evaluation.jobs(SUBJECT, ACTIVITIES, 1, keys)
    pictures = rows.assign(path=rows["image"], sha256=rows["image"]).drop(columns="image")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ibkit.evaluate.study.items._pictures", lambda one: pictures[pictures["identifier"]])
        pairs = make_items([evaluated]).query("question == 'preference'")
    assert set(pairs["image_a"].str.split("/").str[1]) == {"dreambooth-seed1"} and set(pairs["seed"]) == {1}


# --- rating --------------------------------------------------------------------------------------------------------


def test_order_and_sides_are_the_raters_own(items):
    ann, again, ben = tasks_of(items, "Ann"), tasks_of(items, " ann "), tasks_of(items, "Ben")
    assert ann == again and [t.item for t in ann] != [t.item for t in ben] and len(ann) == len(items)
    assert [t.question for t in ann] == sorted([t.question for t in ann], key=list(QUESTIONS).index)
    sides = [t.shown for t in ann if t.question == "preference"]
    assert {"ab", "ba"} == set(sides)
    pair = next(t for t in ann if t.shown == "ba")
    row = items.set_index("item").loc[pair.item]
    assert pair.images == (row["image_b"], row["image_a"]) and pair.choices == ("b", "a")


def test_each_answer_is_on_the_disk_before_the_next_question(items, tmp_path):
    now = iter([10.0, 11.0, 13.5, 20.0, 20.0, 20.0])
    session = RatingSession(items, "Ann", tmp_path, clock=lambda: next(now))
    session.restart_clock()
    first = session.current
    session.answer(1)
    (line,) = session.path.read_text().splitlines()
    line = json.loads(line)
    assert (line["item"], line["answer"], line["seconds"], line["shown"]) == (first.item, "no", 2.5, "a")
    assert line["rater"] == "Ann" and line["study"] == study_name(items) and line["time"].endswith("+00:00")


def test_undo_is_a_line_of_its_own_and_the_session_resumes(items, tmp_path):
    session = RatingSession(items, "Ann", tmp_path)
    items_asked = []
    for choice in (0, 1, 0):
        items_asked.append(session.current.item)
        session.answer(choice)
    before = session.path.read_bytes()
    session.undo()
    assert session.path.read_bytes().startswith(before) and session.current.item == items_asked[2]
    resumed = RatingSession(items, "ann", tmp_path)
    assert resumed.n_done == 2 and resumed.current.item == items_asked[2]
    resumed.undo()
    resumed.undo()
    assert resumed.n_done == 0 and resumed.current.item == items_asked[0]
    with pytest.raises(StudyError, match="no answer to take back"):
        resumed.undo()
    with pytest.raises(StudyError, match="another window"):
        session.answer(0)  # the other session has written meanwhile
    with pytest.raises(StudyError, match="a letter or a digit"):
        ratings_file(tmp_path, " ?! ")


def test_sessions_refuse_other_studies_and_other_raters(items, tmp_path):
    session = RatingSession(items, "Ann B", tmp_path)
    session.answer(0)
    (answered,) = read_ratings(session.path).answers
    with pytest.raises(StudyError, match="ratings of other pictures"):
        RatingSession(items[items["item"] != answered], "Ann B", tmp_path)
    with pytest.raises(StudyError, match="'ann-b' needs another name"):
        RatingSession(items, "ann-b", tmp_path)


def test_a_line_cut_short_costs_nothing_but_itself(items, tmp_path):
    session = RatingSession(items, "Ann", tmp_path)
    session.answer(0)
    session.answer(0)
    whole = session.path.read_bytes()
    session.path.write_bytes(whole[:-20])
    resumed = RatingSession(items, "Ann", tmp_path)
    assert resumed.n_done == 1
    resumed.answer(1)
    ratings = read_ratings(session.path)
    assert session.path.read_bytes().startswith(whole[:-20]) and len(ratings.answers) == 2
    assert len(ratings.problems) == 1 and f"{session.path}, line 2 is left out" in ratings.problems[0]


def test_malformed_lines_are_named_and_the_good_ones_kept(items, tmp_path):
    session = RatingSession(items, "Ann", tmp_path)
    for _ in range(3):
        session.answer(0)
    lines = session.path.read_text().splitlines()
    good = json.loads(lines[0])
    bad = [
        "not json",
        "[1]",
        json.dumps(good | {"schema": 2}),
        json.dumps(good | {"answer": "maybe"}),
        json.dumps(good | {"question": "colour"}),
        json.dumps({k: v for k, v in good.items() if k != "item"}),
        json.dumps(good | {"seconds": "long"}),
        lines[0],
        json.dumps(good | {"item": "123", "answer": "undo"}),
    ]
    session.path.write_text("\n".join([*lines, *bad]) + "\n")
    before = session.path.read_bytes()
    ratings = read_ratings(session.path)
    assert len(ratings.answers) == 3 and session.path.read_bytes() == before
    sentences = "\n".join(ratings.problems)
    for number, words in enumerate(
        ["Expecting value", "no JSON object", "its schema is 2", "'maybe' is no answer", "no question 'colour'"]
        + ["its field 'item'", "its field 'seconds'", "answers item", "takes back an answer that is not there"],
        start=4,
    ):
        assert words in sentences and f"line {number} " in sentences
    session.path.write_text(lines[0] + "\n" + json.dumps(good | {"rater": "Ben"}))
    with pytest.raises(StudyError, match="line 2 is by 'Ben' and the lines before are by 'Ann'"):
        read_ratings(session.path)


def rate_all(items, rater, folder, choose):
    session = RatingSession(items, rater, folder)
    while (task := session.current) is not None:
        session.answer(choose(task))
    with pytest.raises(StudyError, match="Every item"):
        session.answer(0)
    return session.path


def test_merged_ratings_are_votes(items, tmp_path):
    # Ann finds B better wherever it stands, Ben takes the left one
    ann = rate_all(items, "Ann", tmp_path, lambda task: len(task.shown) == 2 and task.shown == "ab")
    ben = rate_all(items, "Ben", tmp_path, lambda task: 0)
    votes, raters, problems = merge_ratings([ann, ben, ann], items)
    assert list(votes.columns) == VOTE_COLUMNS and len(votes) == 2 * len(items) and not problems
    assert not votes["simulated"].any()
    pairs = votes[votes["question"] == "preference"]
    assert set(pairs.loc[pairs["rater"] == "Ann", "answer"]) == {"b"}
    raters = raters.set_index("rater")
    assert raters.loc["Ben", "left"] == 1 and 0 < raters.loc["Ann", "left"] < 1
    assert raters.loc["Ann", "votes"] == len(items)
    assert preference_rate(votes[votes["rater"] == "Ann"], "dreambooth+ddpo", "dreambooth").value == 1
    assert preference_rate(votes[votes["rater"] == "Ann"], "dreambooth", "dreambooth+ddpo").value == 0


def test_one_rater_in_two_files(items, tmp_path):
    path = rate_all(items, "Ann", tmp_path / "a", lambda task: 0)
    lines = path.read_bytes().splitlines(keepends=True)
    earlier = tmp_path / "copy of yesterday.jsonl"
    earlier.write_bytes(b"".join(lines[:5]))
    votes, _, _ = merge_ratings([earlier, path], items)
    assert len(votes) == len(items)
    other = rate_all(items, "ANN", tmp_path / "b", lambda task: 1)
    with pytest.raises(StudyError, match="neither continues the other"):
        merge_ratings([path, other], items)


def test_ratings_of_another_study_and_empty_files_are_refused(items, tmp_path):
    path = rate_all(items, "Ann", tmp_path, lambda task: 0)
    with pytest.raises(StudyError, match="1 ratings of pictures that are not in this study"):
        merge_ratings([path], items.iloc[1:])
    (tmp_path / "empty.jsonl").write_text("\nnonsense\n")
    with pytest.raises(StudyError, match="holds no rating: .*line 2 is left out"):
        merge_ratings([tmp_path / "empty.jsonl"], items)
    with pytest.raises(StudyError, match="cannot be read"):
        merge_ratings([tmp_path / "none.jsonl"], items)


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(StudyError, match="could not be saved"):
        append_line(tmp_path, "{}", 0)  # a folder takes no line


# --- the page ------------------------------------------------------------------------------------------------------


def widgets_below(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from widgets_below(child)


@pytest.fixture
def fast_clicks(monkeypatch):
    monkeypatch.setattr("ibkit.evaluate.study.page.DOUBLE_CLICK_SECONDS", 0.0)


def test_the_page_asks_saves_undoes_and_ends(items, evaluated, tmp_path, fast_clicks):
    session = RatingSession(items, "Ann", tmp_path)
    page = RatingPage(session, {"orange cat": evaluated.references})
    assert "Part 1 of 3" in page.headline.value and page.first.layout.display == "none" and not page.pictures.children
    page.start.click()
    assert page.start.layout.display == "none" and page.first.description == "Yes" and len(page.pictures.children) == 1
    assert len(page.photos.children) == 1 + 3 and page.count.value.startswith("0 of")
    page.first.click()
    page.second.click()
    assert page.count.value == f"2 of {len(items)}" and page.progress.value == 2
    assert [json.loads(line)["answer"] for line in session.path.read_text().splitlines()] == ["yes", "no"]
    page.undo.click()
    assert page.count.value == f"1 of {len(items)}"
    while session.current is not None:
        if page.start.layout.display != "none":
            page.start.click()
        if session.current.question == "text":
            assert session.current.text in page.headline.value and not page.photos.children
        if session.current.question == "preference":
            assert page.first.description == "Left" and len(page.pictures.children) == 2 and page.photos.children
        state = "".join(str(w.get_state()) for w in widgets_below(page.box))
        assert not any(word in state.lower() for word in ("dreambooth", "dreambooth+ddpo", "'base'", str(tmp_path)))
        page.first.click()
    assert "Thank you, Ann" in page.headline.value and str(session.path) in page.headline.value
    assert "<code>ratings</code>" in page.headline.value
    page.first.click()  # a click on a hidden button changes nothing and says why
    assert "Every item of this study is answered" in page.message.value
    assert session.path.read_text().count('"undo"') == 1
    assert len(read_ratings(session.path).answers) == len(items)


def test_a_double_click_is_one_answer(items, evaluated, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ibkit.evaluate.study.page.time.monotonic", lambda: now[0])
    session = RatingSession(items, "Ann", tmp_path)
    page = RatingPage(session, {"orange cat": evaluated.references})
    page.start.click()
    page.first.click()  # the button stands where Start's double click may land
    assert session.n_done == 0
    for seconds, done in ((1.0, 1), (1.2, 1), (1.4, 2)):
        now[0] = seconds
        page.first.click()
        assert session.n_done == done


def test_after_a_press_the_focus_rests_between_the_answers(items, evaluated, tmp_path, monkeypatch, fast_clicks):
    focused = []
    session = RatingSession(items, "Ann", tmp_path)
    page = RatingPage(session, {"orange cat": evaluated.references})
    monkeypatch.setattr(
        widgets.Button, "focus", lambda button: focused.append((button is page.rest, page.rest.layout.display))
    )
    for button in (page.start, page.first, page.second, page.undo):
        button.click()
    assert focused == [(True, None)] * 4  # in sight by then
    row = [child for child in page.answers.children if child is not page.undo]
    assert row.index(page.rest) - row.index(page.first) == row.index(page.second) - row.index(page.rest) == 1
    before = session.n_done
    page.rest.click()  # a second Enter
    assert session.n_done == before


def test_the_subject_is_asked_about_as_in_the_paper():
    assert all("closely resemble" in words for words in (QUESTIONS["subject"].ask, EVALUATORS["people_subject"]))


def test_the_page_resumes_with_the_instruction_of_its_part(items, evaluated, tmp_path):
    rate_some = RatingSession(items, "Ann", tmp_path)
    while rate_some.current.question == "subject":
        rate_some.answer(0)
    page = RatingPage(RatingSession(items, "Ann", tmp_path), {"orange cat": evaluated.references})
    assert "Part 2 of 3" in page.headline.value and page.count.value == f"18 of {len(items)}"


def test_statistics_load_no_widgets_and_no_torch():
    code = "import sys, ibkit.evaluate.study.ratings; print({'torch', 'ipywidgets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


# --- votes and shares, by hand -------------------------------------------------------------------------------------


def test_majority_by_hand():
    decided = majority(vote_rows(["aaaabbb", "bbbbbba", "aabb", "a"]))
    assert decided["n_first"].tolist() == [4, 1, 2, 1] and decided["n_raters"].tolist() == [7, 7, 4, 1]
    assert decided["answer"].tolist() == ["a", "b", "tie", "a"] and decided["value"].tolist() == [1, 0, 0.5, 1]
    yes = majority(vote_rows([["yes", "no", "no"], ["yes", "no"]], "text"))
    assert yes["answer"].tolist() == ["no", "tie"]


def test_shares_count_a_tie_half_and_say_so():
    votes = vote_rows([["yes", "yes"], ["no", "no"], ["yes", "no"], ["yes", "yes"]], "text")
    (row,) = shares(majority(votes)).to_dict("records")
    assert (row["value"], row["n"], row["ties"], row["arm"]) == (2.5 / 4, 4, 1, "dreambooth")
    assert row["low"] <= 2.5 / 4 <= row["high"]


def test_shares_have_the_intervals_of_the_statistics_room():
    answers = [["yes"], ["no"], ["yes"], ["no"], ["yes"], ["yes"]]
    (row,) = shares(majority(vote_rows(answers, "text"))).to_dict("records")
    values = np.array([1.0, 1, 1, 0, 0, 1])  # by prompt: p0 holds items 0, 2, 4
    expected = mean_interval(values, [["cat"] * 6, ["p0"] * 3 + ["p1"] * 3])
    assert (row["low"], row["high"]) == (expected.low, expected.high)


def test_all_alike_still_has_a_width_even_with_gaps():
    second = vote_rows(["aaa"] * 6, tune_seed=1)
    votes = pd.concat([vote_rows(["aaa"] * 8), second.assign(item=second["item"] + " of seed 1")])
    rate = preference_rate(votes, "dreambooth", "dreambooth+ddpo")
    assert rate.value == 1 and rate.n == 14
    # Two prompts, whose eight pairs are worth √(2 · 8) at the most, by (z / t of one degree of freedom)².
    n = 4 * (1.959964 / 12.7062) ** 2
    assert rate.low == pytest.approx(n / (n + 1.959964**2), rel=1e-4)


def test_preferences_add_up():
    table = preferences(majority(vote_rows(["ab", "aa", "bb", "bb"])))
    assert table.set_index("outcome")["value"].to_dict() == {"a": 0.25, "tie": 0.25, "b": 0.5}
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    rate = preference_rate(vote_rows(["ab", "aa", "bb", "bb"]), "dreambooth+ddpo", "dreambooth")
    assert rate.value == pytest.approx(0.5 + 0.25 / 2)
    with pytest.raises(StudyError, match="No vote compares dreambooth with neti"):
        preference_rate(vote_rows(["ab"]), "dreambooth", "neti")


def test_votes_survive_their_file(tmp_path):
    votes = vote_rows(["aab", "bba"])
    votes.to_csv(tmp_path / "votes.csv", index=False)
    pd.testing.assert_frame_equal(load_votes(tmp_path / "votes.csv"), votes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.drop(columns="answer"), "lacks the columns answer"),
        (lambda v: v.iloc[:0], "has no votes"),
        (lambda v: v.replace({"answer": {"b": "yes"}}), "'yes' is no answer to the question 'preference'"),
        (lambda v: pd.concat([v, v]), "there is a row of rater A, item"),
    ],
)
def test_wrong_votes_are_refused(change, words):
    with pytest.raises(StudyError, match=words):
        check_votes(change(vote_rows(["aab", "bba"])))


# --- agreement -----------------------------------------------------------------------------------------------------

# Ten subjects, five categories, fourteen raters: the worked example that goes with Fleiss' κ in the textbooks.
CLASSIC = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_kappa_of_the_classic_example():
    assert fleiss_kappa(np.array(CLASSIC)) == pytest.approx(0.210, abs=5e-4)


def test_kappa_by_hand():
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
    # two raters that never agree: P = 0, Pe = 1/2
    assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == -1
    # P = (1 + 1/3) / 2 = 2/3, p = (5/6, 1/6), Pe = 26/36, κ = (24 − 26) / (36 − 26)
    assert fleiss_kappa(np.array([[3, 0], [2, 1]])) == pytest.approx(-0.2)
    assert np.isnan(fleiss_kappa(np.array([[3, 0], [3, 0]])))
    with pytest.raises(StudyError, match="same number of raters"):
        fleiss_kappa(np.array([[3, 0], [1, 1]]))
    with pytest.raises(StudyError, match="two or more"):
        fleiss_kappa(np.array([[1, 0]]))


def test_kappas_take_the_items_that_all_rated():
    table = kappas(pd.concat([vote_rows(["aaa", "aab", "bb"]), vote_rows([["yes"] * 3], "text")]))
    pairs, text = table.set_index("question").loc["preference"], table.set_index("question").loc["text"]
    assert pairs["n"] == 2 and pairs["raters"] == 3 and pairs["kappa"] == pytest.approx(-0.2)
    assert pairs["observed"] == pytest.approx(2 / 3) and pairs["expected"] == pytest.approx(26 / 36)
    assert kappas(vote_rows(["a", "b"])).empty
    assert np.isnan([text["kappa"], text["low"]]).all() and (pairs["low"], pairs["high"]) == (-1, 1)
    assert text["observed"] == 1 and pairs["arms"] == "dreambooth – dreambooth+ddpo"


# --- Bradley–Terry -------------------------------------------------------------------------------------------------


def test_strengths_by_hand():
    # two arms: the maximum is the share of wins
    np.testing.assert_allclose(bradley_terry(np.array([[0, 3], [1, 0]])), [0.75, 0.25], atol=1e-8)
    # a ring of wins: nobody is stronger
    np.testing.assert_allclose(bradley_terry(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])), [1 / 3] * 3, atol=1e-8)
    # wins exactly as strengths 5 : 3 : 2 predict
    p = np.array([0.5, 0.3, 0.2])
    exact = 24 * p[:, None] / (p[:, None] + p)
    np.fill_diagonal(exact, 0)
    np.testing.assert_allclose(bradley_terry(exact), p, atol=1e-8)
    # many at once, and a loser of everything goes to 0
    both = bradley_terry(np.stack([exact, np.array([[0, 2, 2], [2, 0, 2], [0, 0, 0]])]))
    np.testing.assert_allclose(both[0], p, atol=1e-8)
    np.testing.assert_allclose(both[1], [0.5, 0.5, 0], atol=1e-6)


def test_the_maximum_is_one():
    wins = np.array([[0, 7, 2], [3, 0, 5], [6, 4, 0]])
    p = bradley_terry(wins)

    def log_likelihood(p):
        return (wins * np.log(p[:, None] / (p[:, None] + p))).sum()

    rng = np.random.default_rng(0)
    others = rng.dirichlet(60 * p, 200)
    assert all(log_likelihood(p) >= log_likelihood(other) for other in others)


def test_unconnected_methods_have_no_strengths():
    assert separated_groups(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])) == [[0, 1, 2]]
    groups = separated_groups(np.array([[0, 1, 5], [1, 0, 5], [0, 0, 0]]))
    assert sorted(groups) == [[0, 1], [2]]
    decided = majority(vote_rows(["aaa", "aab"]))
    assert win_matrix(decided).loc["dreambooth", "dreambooth+ddpo"] == 2
    with pytest.raises(StudyError, match="no chain of wins leads back and forth between"):
        strengths(decided)


def test_strengths_of_votes_have_intervals():
    answers = [random.Random(i).choices("ab", [1, 3], k=3) for i in range(40)]
    table = strengths(majority(vote_rows(answers)), n_resamples=300).set_index("arm")
    rate = preference_rate(vote_rows(answers), "dreambooth+ddpo", "dreambooth")
    assert table.loc["dreambooth+ddpo", "value"] == pytest.approx(rate.value)
    assert table.loc["dreambooth+ddpo", "low"] == pytest.approx(rate.low, abs=0.06)
    assert table["value"].sum() == pytest.approx(1) and table.loc["dreambooth", "n"] == 40


# --- simulated raters ----------------------------------------------------------------------------------------------


def test_simulated_raters_see_what_was_drawn(items):
    raters = {name: Judge.load(name=name) for name in RATERS[:3]}
    votes, reasons = simulate(items, {"orange cat": SUBJECT}, raters)
    assert list(votes.columns) == VOTE_COLUMNS and len(votes) == 3 * len(items) and votes["simulated"].all()
    share = shares(majority(votes)).set_index(["question", "arm"])["value"]
    assert share["text", "dreambooth"] == 0 and min(share["text", "base"], share["text", "dreambooth+ddpo"]) >= 5 / 6
    assert share["subject", "dreambooth"] >= 5 / 6 and share["subject", "base"] <= 1 / 2
    assert preference_rate(votes, "dreambooth+ddpo", "dreambooth").value >= 5 / 6
    pair = votes[(votes["arm_a"] == "dreambooth") & (votes["arm_b"] == "dreambooth+ddpo")]
    decided = pair.merge(reasons, on=["rater", "item"])["decided_by"]
    assert (decided == "text").mean() >= 5 / 6
    again, _ = simulate(items, {"orange cat": SUBJECT}, raters)
    pd.testing.assert_frame_equal(votes, again)


@pytest.mark.parametrize(
    ("a", "b", "better", "why"),
    [
        (Sight(True, False, -9, -9), Sight(False, True, 0, 9), "a", "text"),
        (Sight(True, False, 0, 9), Sight(True, True, -9, -9), "b", "subject"),
        (Sight(False, True, -2, 0.1), Sight(False, True, -1, 0.1), "b", "grade"),
    ],
)
def test_text_comes_before_subject_and_subject_before_the_grade(a, b, better, why):
    assert _prefer(a, b, "coin") == (better, why)


def test_equal_pictures_are_decided_by_a_coin():
    same = Sight(True, True, -1, 0)
    assert {_prefer(same, replace(same), f"rater {i}") for i in range(20)} == {("a", "coin"), ("b", "coin")}


def test_nobody_is_simulated_for_photos(items):
    photos = replace(SUBJECT, world=None)
    with pytest.raises(StudyError, match="not of the pocket world"):
        simulate(items, {"orange cat": photos}, {})
    with pytest.raises(StudyError, match="names nothing"):
        simulate(items.assign(activity="flying"), {"orange cat": SUBJECT}, {"r": Judge.load()})


def test_the_raters_are_seven_different_networks():
    assert len(load_raters()) == 7 and list(load_raters())[:6] == list(RATERS)
    raters = list(load_raters().values())
    weights = [torch.cat([p.flatten() for p in rater.net.parameters()]) for rater in raters]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    for rater in raters:
        assert tuple(rater.card["widths"]) == rater.net.widths
        for question in ("activity", "identity"):
            assert rater.card["accuracy"][question]["renders"] >= 0.8 and rater.card["accuracy"][question]["n"] >= 400


def test_a_rater_is_trained_from_its_name_and_looks_at_reconstructions(tmp_path):
    pictures, vae = Pictures(tmp_path, "few", 3, 8), new_autoencoder().eval()
    cpu, budget = torch.device("cpu"), Budget(steps=2, batch=8, ema=0.5)

    def weights(name, folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        net = train(tmp_path / folder, pictures, vae, cpu, torch.float32, name, (8, 8, 8, 8), budget)
        return torch.cat([p.flatten() for p in net.parameters()])

    first = weights("rater-1", "a")
    torch.testing.assert_close(weights("rater-1", "b"), first, atol=0, rtol=0)
    assert not torch.allclose(weights("rater-2", "a"), first)
    torch.testing.assert_close(weights("rater-1", "a"), first, atol=0, rtol=0)  # finished: from its checkpoint


def test_what_a_judge_trains_on_is_redrawn_and_turned_a_little():
    vae, cpu = new_autoencoder().eval(), torch.device("cpu")
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    first, again = (redraw(vae, x, torch.Generator(cpu).manual_seed(1), torch.float32) for _ in range(2))
    assert first.shape == x.shape and first.abs().max() <= 1 and torch.equal(first, again)
    spot = torch.full((64, 3, 64, 64), -1.0)
    spot[:, :, 30:34, 30:34] = 1.0
    moved = jitter(spot, torch.Generator(cpu).manual_seed(1))
    centres = [(m > 0).nonzero().float().mean(0) for m in moved[:, 0]]
    assert max((c - 31.5).abs().max().item() for c in centres) <= 4 and len({tuple(c.tolist()) for c in centres}) > 32


def test_the_reference_votes_are_those_of_seven_simulated_raters():
    votes = load_votes(str(ROOT / "outputs" / "reference" / "votes.csv"))
    assert votes["simulated"].all() and votes["rater"].nunique() == 7
    rate = preference_rate(votes, "lora_dreambooth+ddpo", "lora_dreambooth")
    assert 0 <= rate.low <= rate.value <= rate.high <= 1 and rate.n == 60
    assert set(kappas(votes)["question"]) == {"subject", "text", "preference"}


# --- the notebook --------------------------------------------------------------------------------------------------


def test_the_notebook_runs_to_its_end_with_the_page_in_it(tmp_path):
    evaluated = write_runs(tmp_path, n_images=2)
    out = tmp_path / "study"
    words = ["-y", f"{{run_evaluate: ['{evaluated.folder}'], run_out: '{out}', rater: Ann, device: cpu}}"]
    command = [sys.executable, "-m", "papermill", ROOT / "notebooks" / "07_human_study.ipynb", tmp_path / "out.ipynb"]
    command += ["-k", "python3", "--start-timeout", "300", *words]
    result = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = read_run(out, "07_human_study")
    votes = load_votes(run.path("votes.csv"))
    assert len(votes) == 7 * 36 and votes["simulated"].all() and votes["rater"].nunique() == 7
    assert {f"figures/{name}.png" for name in ("questionnaire", "table1", "agreement", "figure4")} <= set(run.outputs)
    assert (
        run.metrics["preference_rate"]["dreambooth"]["value"]
        == preference_rate(votes, "dreambooth+ddpo", "dreambooth").value
    )
    assert "application/vnd.jupyter.widget-view+json" in (tmp_path / "out.ipynb").read_text()
    assert not (tmp_path / "study-ratings").exists()  # nobody clicked
