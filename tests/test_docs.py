"""Pages of the methods: their tables of settings are the command's output, their columns are the code's."""

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.personalize import curve, read
from ibkit.job.methods import facts, in_markdown
from ibkit.methods.records import METHODS

PAGES = sorted((Path(__file__).parents[1] / "docs" / "methods").glob("*.md"))
TABLE = re.compile(r"<!-- settings (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_settings_of_a_page_are_the_records(page):
    tables = TABLE.findall(page.read_text())
    assert tables, "a page of a method has its settings"
    for name, table in tables:
        assert table.strip() == in_markdown(facts(METHODS.find(name))["settings"]), f"ibkit methods {name} --markdown"


ROW = re.compile(r"^\| ([a-z ]+), (\d) \| `([a-z ]+)`.* \| (\d+) \| (\d+) % \| (\d+) % \|$", re.MULTILINE)


@pytest.mark.parametrize("name", ["dpg", "rpo"])
def test_the_results_of_a_page_are_in_the_committed_tables(name):
    root = Path(__file__).parents[1]
    rows = read([root / "outputs" / "reference" / folder for folder in (name, "personalize")])
    means = curve(rows, ["subject", "seed", "setting", "steps"])
    said = ROW.findall((root / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8"))
    assert len(said) >= 4
    for subject, seed, setting, steps, shown, same in said:
        found = means.loc[subject, int(seed), setting, int(steps)]
        assert [f"{100 * found[column]:.0f}" for column in ("shown", "same_subject")] == [shown, same]


def test_a_bar_in_a_text_does_not_end_the_cell():
    row = {"name": "a", "default": (1, 2), "source": "x|y", "help": "h", "allowed": "", "pocket": 3, "why": "w"}
    assert in_markdown([row]).splitlines()[-1] == "| `a` | `[1, 2]` | x\\|y | 3: w | h |"


def test_the_hacked_rewards_rows_are_the_committed_history():
    """The table of docs/methods/reward_gradient.md."""
    root = Path(__file__).parents[1]
    history = pd.read_csv(root / "outputs" / "reference" / "tunings" / "cat-DRaFT_long-0-history.csv")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (root / "docs/methods/reward_gradient.md").read_text(), re.MULTILINE)
    drawn = history["pictures"].cumsum()
    assert len(rows) == 7
    for pictures, said in rows:
        row = history[drawn == int(pictures)].iloc[0]
        shares = [f"{100 * row[name]:.0f} %" for name in ("above_level", "judge_activity", "judge_identity")]
        assert [cell.strip() for cell in said.split("|")] == [f"{row['reward']:.2f}".replace("-", "−"), *shares]
