"""What a notebook shows: errors as a sentence, last and alone, the traceback folded; tables; trainings side by side."""

from types import SimpleNamespace

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from ibkit import shell
from ibkit.experiments.side_by_side import side_by_side, tried_curves
from ibkit.methods.records import Job
from ibkit.presets import POCKET


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a cell; what it printed, and the error it ended with."""
    ipython = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: ipython)
    shell.fold_tracebacks()

    def cell(code):
        error = ipython.run_cell(code).error_in_exec
        return capsys.readouterr().out, error

    return cell


def test_the_kits_errors_end_with_their_sentence_alone(run):
    said, error = run(
        "from ibkit.errors import ScoreError\ndef f(): raise ScoreError('There is <no> table: make one.')\nf()"
    )
    assert str(error) == "There is <no> table: make one."
    assert said.strip().splitlines()[-1] == "ScoreError: There is <no> table: make one."
    assert "Traceback" not in said and "def f()" not in said


def test_the_traceback_is_folded_into_html(run, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **more: shown.append(what.data))
    run("from ibkit.errors import ScoreError\ndef f(): raise ScoreError('no <table>')\nf()")
    (page,) = shown
    assert (
        page.startswith("<details><summary>")
        and "def f()" in page
        and "no &lt;table&gt;" in page
        and "\x1b" not in page
    )


def test_other_errors_are_shown_as_ever(run):
    said, error = run("1 / 0")
    assert isinstance(error, ZeroDivisionError) and "Traceback" in said


def test_the_preset_says_what_it_gives():
    class Given:
        def __init__(self):
            self.guidance, self.eta, self.n_inference_steps, self.scorer_weights, self.seed = -1.0, 0.5, 0, "", 0

    assert (
        POCKET.filled(Given())
        == "of the preset pocket: scorer_weights = 'pocket', n_inference_steps = 10, guidance = 2.0"
    )


def test_a_table_has_its_texts_on_the_left():
    table = pd.DataFrame(
        {"share": [0.25, 0.5], "verdict": ["wins", "<loses>"]}, index=pd.Index(["cat", "dog"], name="of")
    )
    page = shell.table_html(table)
    left = ' style="text-align: left"'
    for cell in ("<td>0.25</td>", f"<td{left}>wins</td>", f"<td{left}>&lt;loses&gt;</td>", f"<th{left}>dog</th>"):
        assert page.count(cell) == 1
    assert f"<th>share</th>\n      <th{left}>verdict</th>" in page and f"<th{left}>of</th>" in page
    wide = pd.DataFrame([range(40)], columns=pd.MultiIndex.from_product([range(20), ["a", "b"]]))
    assert shell.table_html(wide).count("<td>") == wide._repr_html_().count("<td>")


def test_settings_are_tried_side_by_side_outside_of_the_run(tmp_path, capsys):
    folders = []

    def train(model, job, settings, *, on_row, monitor):
        folders.append(job.folder)
        assert job.folder.is_dir() and list(job.folder.iterdir()) == [] and model == []
        rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(settings.n_steps)]
        for row in rows:
            on_row(row, model)
            model.append(row["step"])
        return rows

    job = Job(SimpleNamespace(build=lambda device: []), None, [], "mine", 0, tmp_path)
    tries = {f"{n} steps": (job, SimpleNamespace(n_steps=n)) for n in (2, 3)}
    rows, models = side_by_side(SimpleNamespace(train=train), tries, "cpu", look=lambda model: {"n": len(model)})
    assert rows.groupby("setting")["n"].first().to_dict() == {"2 steps": 2, "3 steps": 3} and len(rows) == 5
    assert models == {"2 steps": [0, 1], "3 steps": [0, 1, 2]}
    assert tmp_path not in folders and not any(folder.exists() for folder in folders)
    assert "3 steps 3/3" in capsys.readouterr().out
    left, right = tried_curves(rows, "step", ["loss", "n"], window=2).axes
    drawn = [line.get_ydata().tolist() for line in left.lines[:2]]
    assert drawn == [[1, 0.75], [1, 0.75, pytest.approx(5 / 12)]]
    assert left.get_legend() and not right.get_legend()
