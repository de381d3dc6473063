"""Tables, notes and ratings that somebody edited, or that another program wrote: refused by file and line, as cases."""

import json
import re

import pandas as pd
import pytest

from ibkit.cli import main
from ibkit.data.protocols import read_protocol
from ibkit.errors import ArtifactError, IbkitError, ParameterError
from ibkit.evaluate.claims import all_claims, check_evidence, evaluate_claims
from ibkit.evaluate.columns import read_table
from ibkit.evaluate.study.ratings import merge_ratings, read_ratings
from ibkit.evaluate.study.votes import load_votes
from ibkit.params import literal
from ibkit.runs import Run, read_manifest
from ibkit.runs.manifest import JOURNAL
from ibkit.runs.writing import let_go
from tests.test_claims import changed, curves, described, story, votes


def scored():
    return story().assign(clip_t=0.3)


def predicted():
    rights = {f"{name} right": 1 for name in ("reward", "without prompts", "CLIP score")}
    return pd.DataFrame(
        {"seed": 0, "subset": "unseen object", "prompt": "one cup", "image_seed": i, **rights} for i in range(4)
    )


TABLES = {
    "scores.csv": scored, "votes.csv": lambda: votes(9), "changes.csv": lambda: changed(0.5),
    "description.csv": lambda: described(0.9, 0.2), "prompt_kinds.csv": lambda: curves(0.2),
    "feedback.csv": scored, "feedback_reward.csv": predicted,
}  # fmt: skip


def put(column, value):
    """Write a value into the third row, which is line 4."""

    def edit(text):
        heading, *lines = text.splitlines()
        fields = lines[2].split(",")
        fields[heading.split(",").index(column)] = value
        lines[2] = ",".join(fields)
        return "\n".join([heading, *lines])

    return edit


def twice(text):
    return text + text.splitlines()[2]


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"scores.csv", "feedback.csv"}))
def test_a_folder_of_one_notebook_has_its_claims_without_scores(tmp_path, name):
    """`ibkit claims` on the run of 05, 06, 07, 09 or 14 alone, as these notebooks say at their end."""
    TABLES[name]().to_csv(tmp_path / name, index=False)
    files = {(claim.paper, claim.id): claim.file for claim in all_claims()}
    found = {
        files[claim.paper, claim.id]: claim for claim in evaluate_claims(tmp_path) if claim.verdict != "not tested"
    }
    assert set(found) == {name}
    assert {c.reason for c in evaluate_claims(tmp_path) if c.id == "C1"} == {
        "Needs scores.csv of notebook 03_evaluate."
    }


EDITS = [
    ("scores.csv", put("clip_t", "0,53"), "line 4 has .* fields and the heading"),
    ("scores.csv", put("clip_t", "high"), "line 4: clip_t must be a number or nothing, and is 'high'"),
    ("scores.csv", put("clip_t", "inf"), "line 4: clip_t must be a number or nothing, and is inf"),
    ("scores.csv", put("clip_t", "1e999"), "line 4: clip_t must be a number or nothing, and is inf"),
    ("scores.csv", put("judge_text", "0.7"), "line 4: judge_text must be 0 or 1 or nothing, and is 0.7"),
    ("scores.csv", put("image_seed", "1.5"), "line 4: image_seed must be a whole number, and is 1.5"),
    ("scores.csv", put("image_seed", "9" * 400), "line 4: image_seed must be a whole number"),
    ("scores.csv", put("seed", "zero"), "line 4: seed must be a whole number or nothing, and is 'zero'"),
    ("scores.csv", put("identifier", "perhaps"), "line 4: identifier must be True or False, and is 'perhaps'"),
    ("scores.csv", put("identifier", ""), "line 4: identifier must be True or False, and is nothing"),
    ("scores.csv", put("arm", ""), "line 4: arm must be a text, and is nothing"),
    ("scores.csv", lambda text: put("clip_t", "x")(text).replace("\n", "\n\n", 2), "line 6: clip_t must be a number"),
    ("votes.csv", put("answer", "perhaps"), "line 4: 'perhaps' is no answer to the question 'preference'"),
    ("votes.csv", put("simulated", "2"), "line 4: simulated must be True or False, and is .2."),
    ("votes.csv", put("tune_seed", "x"), "line 4: tune_seed must be a whole number"),
    ("votes.csv", twice, "line 242: there is a row of rater judge 0, item soccer-1 before this one"),
    ("changes.csv", put("dino", "much"), "line 4: dino must be a number, and is 'much'"),
    ("changes.csv", put("dino", ""), "line 4: dino must be a number, and is nothing"),
    ("changes.csv", put("pair", "-"), "line 4: pair must be a whole number, and is '-'"),
    ("changes.csv", twice, "line 66: there is a row of class_noun cat, subject cat 0, pair 1, change view"),
    ("description.csv", put("judge_identity", "2"), "line 4: judge_identity must be 0 or 1 or nothing, and is 2"),
    ("description.csv", put("description", "long"), "line 4: description must be True or False, and is 'long'"),
    ("description.csv", twice, "there is a row of description True, train_seed 0"),
    ("prompt_kinds.csv", put("n_images", "many"), "line 4: n_images must be a number, and is 'many'"),
    ("prompt_kinds.csv", put("reward_base", "-inf"), "line 4: reward_base must be a number, and is -inf"),
    ("prompt_kinds.csv", twice, "there is a row of arm both, class_noun cat"),
    ("feedback.csv", put("clip_t", "high"), "line 4: clip_t must be a number or nothing, and is 'high'"),
    (
        "feedback_reward.csv",
        put("CLIP score right", "often"),
        "line 4: CLIP score right must be 0 or 1, and is 'often'",
    ),
    ("feedback_reward.csv", twice, "there is a row of seed 0, subset unseen object, prompt one cup, image_seed 1"),
]


@pytest.mark.parametrize(("file", "edit", "says"), EDITS, ids=[f"{row[0]}-{row[2][:40]}" for row in EDITS])
def test_an_edited_table_is_refused_by_file_and_line(tmp_path, file, edit, says):
    path = tmp_path / file
    path.write_text(edit(TABLES[file]().to_csv(index=False)))
    with pytest.raises(IbkitError) as refused:
        check_evidence(file, read_table(path), str(path))
    assert str(path) in str(refused.value) and re.search(says, str(refused.value)) and "\n" not in str(refused.value)


FILES = [
    (b"", "No columns to parse from file"),
    (b"\n\n", "No columns to parse from file"),
    (b"arm;seed\nbase;1\n", "lacks the columns arm"),
    (b"[1, 2]", "lacks the columns arm"),
    (b'arm,"seed\nbase,1\n', "unexpected end of data"),
    (b"arm,seed\nk\xe4tze,1\n", "codec can't decode"),
    (b"arm,arm\nbase,1\n", "'arm' heads two columns"),
    (b"PK\x03\x04\x00\x00\xff", "codec can't decode"),
    (b"a,b\n" + b"x" * 200_000 + b",1\n", "field larger than field limit"),
]


@pytest.mark.parametrize(("data", "says"), FILES, ids=[row[1][:30] for row in FILES])
def test_a_file_that_is_no_table_is_refused_by_the_command(tmp_path, capsys, data, says):
    (tmp_path / "scores.csv").write_bytes(data)
    assert main(["claims", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "scores.csv") in said and says in said


@pytest.mark.parametrize("file", TABLES)
def test_a_table_as_it_was_written_is_as_it_was(tmp_path, file):
    table = TABLES[file]()
    table.to_csv(tmp_path / file, index=False)
    found = check_evidence(file, read_table(tmp_path / file), "here")
    before = check_evidence(file, table, "here")
    pd.testing.assert_frame_equal(found, before, check_dtype=False)


def test_a_foreign_table_of_the_same_name_leaves_its_claim_untested(tmp_path):
    story().to_csv(tmp_path / "scores.csv", index=False)
    for file in ("changes.csv", "description.csv", "prompt_kinds.csv"):
        (tmp_path / file).write_text("version,what\n1.2,mended\n")
    scored().to_csv(tmp_path / "feedback.csv", index=False)  # scores, but not of notebook 09
    reasons = {claim.id: claim.reason for claim in evaluate_claims(tmp_path)}
    assert all("lacks its columns: run" in reasons[claim] for claim in ("C5", "C6", "C7", "L3", "L6", "L8"))


# ------------------------------------------------------------------------------------------ ibkit tables --out


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    scored().query("image_seed < 2").to_csv(tmp_path / "run" / "scores.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tables_are_written_where_the_runs_are_read_from(evaluated, monkeypatch):
    monkeypatch.setattr(
        "ibkit.evaluate.tables.all_tables", lambda *given: {"fidelity": pd.DataFrame({"Method": ["a"]})}
    )
    for _ in range(2):  # into its own folder again
        assert main(["tables", "run", "--out", "made"]) == 0
    assert {path.suffix for path in (evaluated / "made").iterdir()} == {".csv", ".md", ".tex"}


USED = [
    ("a file", "file/x", "Not a directory"),
    ("used", "run", "has scores.csv in it"),
    ("notes", "mine", "has a.txt"),
]


@pytest.mark.parametrize(("out", "says"), [row[1:] for row in USED] + [("file", "Not a directory")])
def test_tables_do_not_go_into_what_is_used(evaluated, capsys, out, says):
    (evaluated / "file").write_text("x")
    (evaluated / "mine").mkdir()
    (evaluated / "mine" / "a.txt").write_text("x")
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    assert main(["tables", "run", "--out", out]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


# ------------------------------------------------------------------------------------------ JSON that others wrote

DEEP = "[" * 200_000


def test_a_journal_with_foreign_lines_costs_only_these(tmp_path):
    run = Run.open(tmp_path / "run", "a", {})
    for name in ("one", "two", "three"):
        run.write_text(name, name)
    journal = tmp_path / "run" / JOURNAL
    let_go(run.folder)
    lines = list(filter(None, journal.read_text().splitlines()))
    foreign = ["[]", "7", DEEP, '{"name": "../x", "bytes": 1, "sha256": ""}', '{"name": "two"}', '"\\ud800"', "{}"]
    journal.write_bytes("\n".join(["", lines[0], *foreign, lines[2], lines[1][:20]]).encode() + b"\n")
    with pytest.warns(UserWarning, match=rf"{JOURNAL}, line \d is no note of an output") as told:
        run = Run.open(tmp_path / "run", "a", {}, resume=True)
    assert len(told) == len(foreign) and "line 5" in str(told[2].message)
    assert [run.has(name) for name in ("one", "two", "three")] == [True, False, True]


def test_a_manifest_or_a_setting_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(ArtifactError, match="manifest.json is damaged .it is nested too deeply."):
        read_manifest(tmp_path)
    assert literal(DEEP) == DEEP  # a text, which its setting refuses
    (tmp_path / "own.toml").write_text(f"group = {DEEP}")
    with pytest.raises(ParameterError, match="own.toml is no TOML file"):
        read_protocol(str(tmp_path / "own.toml"), "cat")


# ------------------------------------------------------------------------------------------ ratings

ITEMS = pd.DataFrame(
    {
        "item": [f"{i:012d}" for i in range(4)], "question": "text", "subject": "cat", "prompt_id": "p",
        "image_seed": 1, "seed": 0, "tune_seed": 0, "arm": "dreambooth", "arm_a": "", "arm_b": "",
    }
)  # fmt: skip
RATED = {
    "schema": 1, "study": "s", "rater": "Ann", "question": "text", "item": ITEMS["item"][0], "answer": "yes",
    "shown": "a", "time": "2026-01-01T00:00:00.000+00:00", "seconds": 1.5,
}  # fmt: skip
LINES = [
    (RATED | {"seconds": float("nan")}, "its seconds are nan"),
    (RATED | {"seconds": float("inf")}, "its seconds are inf"),
    (RATED | {"seconds": -1}, "its seconds are -1"),
    (RATED | {"seconds": True}, "its field 'seconds' is missing or of the wrong kind"),
    (RATED | {"rater": "Ann\ud83d"}, "surrogates not allowed"),
    (RATED | {"item": "\udc00"}, "surrogates not allowed"),
    (RATED | {"shown": "ba"}, "'ba' is no order of pictures for the question 'text'"),
    (RATED | {"shown": "c"}, "'c' is no order of pictures"),
    (DEEP, "it is nested too deeply"),
    ("7", "it is no JSON object"),
]


def rated(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("line", "says"), LINES, ids=[row[1][:30] for row in LINES])
def test_a_line_that_is_no_rating_is_named_and_costs_no_other(tmp_path, line, says):
    path = rated(tmp_path / "ann.jsonl", RATED, line, RATED | {"item": ITEMS["item"][1]})
    found = read_ratings(path)
    assert len(found.answers) == 2 and len(found.problems) == 1
    assert found.problems[0].startswith(f"{path}, line 2 is left out: ") and says in found.problems[0]


def test_a_merge_loses_no_rater_and_no_vote(tmp_path):
    names = ["NA", "null", "nan", "1", "01", "1.0", "Ann, B.", "Zoë O’Neil", "True", " x "]
    paths = [
        rated(tmp_path / f"{i}.jsonl", *(RATED | {"rater": name, "item": item} for item in ITEMS["item"]))
        for i, name in enumerate(names)
    ]
    paths[0].write_bytes(b"\xef\xbb\xbf" + paths[0].read_bytes().replace(b"\n", b"\r\n"))  # as an editor saves it
    votes, raters, problems = merge_ratings(paths, ITEMS)
    votes.to_csv(tmp_path / "votes.csv", index=False)
    for found in (votes, load_votes(tmp_path / "votes.csv")):
        counted = found.groupby("rater")["item"].nunique().to_dict()
        assert counted == {name: len(ITEMS) for name in names} and list(raters["rater"]) == names and not problems
