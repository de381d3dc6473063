"""The book: a page for everything that is registered, every logged column explained, links that lead somewhere."""

import base64
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ibkit.data.protocols import names
from ibkit.job import book, notebook_pages
from ibkit.methods.records import METHODS
from ibkit.scorers import SCORERS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    return book.pages()


def test_everything_that_is_registered_has_a_page(pages):
    for kind, registered in (("methods", METHODS), ("scorers", SCORERS), ("protocols", names())):
        listed = pages[f"all-{kind}.md"]
        for name in registered:
            page = pages[f"reference/{kind}/{name}.md"]
            assert f"reference/{kind}/{name}.md" in listed
            assert page.startswith("# ") and len(page) > 60, name
    assert "| `n_epochs` |" in pages["reference/methods/ddpo.md"]
    assert "../methods/reward_gradient.md" in pages["reference/methods/refl.md"]
    assert "playing soccer" in pages["reference/protocols/pocket_actions.md"]
    modules = "\n".join(text for name, text in pages.items() if name.startswith("reference/api/"))
    for module in ("ibkit.methods.ddpo", "ibkit.evaluate.stats", "ibkit.runs.manifest", "ibkit.cli"):
        assert f"::: {module}\n" in modules


def test_every_column_of_the_committed_tables_is_in_the_glossary():
    known = {column.name for column in book.columns()}
    ends = tuple(name.removesuffix("…") for name in known if name.endswith("…"))
    tables = ["scores.csv", "votes.csv", "history.csv", "methods/scores.csv", "tunings/cat-DRaFT_long-0-history.csv"]
    for table in tables:
        for name in pd.read_csv(ROOT / "outputs" / "reference" / table, nrows=0).columns:
            assert name in known or name.startswith(ends), f"{table}: {name}"


@pytest.mark.skipif(importlib.util.find_spec("latex2mathml") is None, reason="needs the extra `book`")
def test_a_notebook_is_a_page_with_formulas_and_figures(tmp_path, monkeypatch):
    png, cell = base64.b64encode(b"a picture").decode(), nbformat.v4
    words = "# 1 · One\n\nLet $a_1 * b_1$ be `$x$`, \\$5 or $6.\n\n$$\\frac{a}{b}$$\n\n[next](02_two.ipynb)"
    outputs = [
        cell.new_output("display_data", {"image/png": png}),
        cell.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children"}
        ),
        cell.new_output("stream", name="stderr", text="a bar"),
    ]
    cells = [cell.new_markdown_cell(words), cell.new_code_cell("METHODS[name](02_two.ipynb)", outputs=outputs)]
    nbformat.write(cell.new_notebook(cells=cells), tmp_path / "01_one.ipynb")
    monkeypatch.setattr(notebook_pages, "NOTEBOOKS", tmp_path)
    found = notebook_pages.pages()
    text = found["notebooks/01_one.md"]
    assert found["notebooks/01_one_files/output_1_0.png"] == b"a picture" and "01_one_files/output_1_0.png" in text
    assert "<mfrac>" in text and "<mo>*" not in text and "`$x$`" in text and "\\$5 or $6." in text
    assert "needs a running notebook" in text and "VBox" not in text and "a bar" not in text
    known = {"notebooks/01_one.md", "notebooks/02_two.md", *found}
    linked = book.relinked(text, "notebooks/01_one.md", known)
    assert "[next](../notebooks/02_two.md)" in linked and "METHODS[name](02_two.ipynb)" in linked
    assert notebook_pages.NOT_EXECUTED not in text
    nbformat.write(cell.new_notebook(cells=[cells[0], cell.new_code_cell("1")]), tmp_path / "01_one.ipynb")
    assert notebook_pages.NOT_EXECUTED in notebook_pages.pages()["notebooks/01_one.md"]
    (tmp_path / "book").mkdir()  # an executed one takes the place of the shipped one
    nbformat.write(cell.new_notebook(cells=cells), tmp_path / "book" / "01_one.ipynb")
    monkeypatch.setattr(notebook_pages, "EXECUTED", tmp_path / "book")
    assert notebook_pages.NOT_EXECUTED not in notebook_pages.pages()["notebooks/01_one.md"]


def test_links_are_those_of_the_book():
    known = {"methods/ddpo.md", "index.md", "outputs/reference/grid.png", "when-something-goes-wrong.md"}
    for source, text, wanted in (
        ("index.md", "[a](docs/when-something-goes-wrong.md)", "[a](when-something-goes-wrong.md)"),
        ("index.md", "![a b](outputs/reference/grid.png)", "![a b](outputs/reference/grid.png)"),
        ("index.md", "[records](ibkit/methods/records.py)", "records (`ibkit/methods/records.py`)"),
        ("index.md", "[a](https://a.org/b)", "[a](https://a.org/b)"),
        ("index.md", "`f[a](README.md)`, [a](README.md)", "`f[a](README.md)`, [a](index.md)"),
        ("index.md", "[a](methods/ddpo.ipynb)", "[a](methods/ddpo.md)"),
        ("methods/dpok.md", "[a](ddpo.md#settings)", "[a](../methods/ddpo.md#settings)"),
        ("methods/dpg.md", "[code](../../ibkit/methods/dpg.py)", "code (`../ibkit/methods/dpg.py`)"),
    ):
        assert book.relinked(text, source, known).replace("`../ibkit", "`ibkit") == wanted.replace(
            "`../ibkit", "`ibkit"
        )


class Links(HTMLParser):
    """What a page of HTML asks for and names."""

    def __init__(self, text):
        super().__init__()
        self.places, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        for name in ("href", "src"):
            if found.get(name) and (tag, found.get("rel")) != ("link", "canonical"):
                self.places.append((tag, found[name]))


@pytest.mark.slow
def test_the_book_is_built_and_its_links_lead_somewhere(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[book]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = (tmp_path / "site").resolve()
    check_links(site)


def check_links(site):
    parsed = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    del parsed[site / "404.html"]  # of a server: its links begin at the root
    assert len(parsed) > 40
    for path, links in parsed.items():
        for tag, place in links.places:
            if re.match(r"(https?:|mailto:|data:|javascript:)", place):
                assert tag == "a", f"{path} loads {place}"  # a reader offline misses nothing
                continue
            file, _, anchor = place.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path}: {place}"
            if anchor and target in parsed:
                assert anchor in parsed[target].ids or anchor.startswith("__"), f"{path}: {place}"
