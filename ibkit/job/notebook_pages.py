"""The notebooks as pages of the book: executed by `make notebooks` where they were, as they are shipped otherwise.

Formulas become MathML, which a browser shows without the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibkit.runs import project_root

NOTEBOOKS = project_root() / "notebooks"
EXECUTED = project_root() / "outputs" / "book"
NOT_EXECUTED = "*Shown without its results: `make notebooks` executes it.*"
WIDGET = "*(A widget, which needs a running notebook.)*"
CODE = r"(?P<code>^ *```.*?^ *```|`[^`\n]+`)"
MATH = r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?![\d$])"


def pages() -> dict[str, str | bytes]:
    """Path below the book -> a page of each notebook, and its figures."""
    found: dict[str, str | bytes] = {}
    for shipped in sorted(NOTEBOOKS.glob("*.ipynb")):
        executed = EXECUTED / shipped.name
        found |= page(executed if executed.is_file() else shipped)
    return found


def page(notebook: Path) -> dict[str, str | bytes]:
    """One notebook's page, and its figures beside it."""
    import nbformat
    from nbconvert import MarkdownExporter

    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = outside_code(MATH, in_mathml, cell.source).replace("<details>", '<details markdown="1">')
        else:
            cell.outputs = [_shown(output) for output in cell.outputs if output.get("name") != "stderr"]
    if not any(cell.outputs for cell in book.cells if cell.cell_type == "code"):
        book.cells.insert(1, nbformat.v4.new_markdown_cell(NOT_EXECUTED))
    figures = {"output_files_dir": f"{notebook.stem}_files", "unique_key": "output"}
    text, resources = MarkdownExporter().from_notebook_node(book, resources=figures)
    found: dict[str, str | bytes] = {f"notebooks/{notebook.stem}.md": text}
    return found | {f"notebooks/{name}": data for name, data in resources["outputs"].items()}


def _shown(output: Any) -> Any:
    """An output as a page can show it."""
    import nbformat

    if any("widget-view" in kind for kind in output.get("data", {})):
        return nbformat.v4.new_output("display_data", {"text/markdown": WIDGET})
    return output


def outside_code(pattern: str, change: Callable[[re.Match], str], text: str) -> str:
    """Markdown in which each match that does not begin in code was changed."""
    both = re.compile(f"{CODE}|{pattern}", re.DOTALL | re.MULTILINE)
    return both.sub(lambda match: match[0] if match["code"] else change(match), text)


def in_mathml(match: re.Match) -> str:
    """A formula, $...$ or $$...$$, as MathML."""
    from latex2mathml.converter import convert

    block = match["block"]
    made = convert(" ".join((block or match["inline"]).split()), display="block" if block else "inline")
    for sign in "*_|[]":  # Markdown's own
        made = made.replace(sign, f"&#{ord(sign)};")
    return f"\n\n<div>{made}</div>\n\n" if block else made
