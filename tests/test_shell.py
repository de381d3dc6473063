"""Errors in a notebook: the sentence last and alone, the traceback folded; other errors as IPython shows them."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from ibkit import shell
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
