"""The shell under a notebook: how it shows figures and tables; the kit's errors as a sentence, the traceback folded
above it; and what its cells assigned."""

import ast
import html
import re
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ibkit.device import keep_memory
from ibkit.errors import IbkitError

if TYPE_CHECKING:
    import pandas as pd

LEFT = ' style="text-align: left"'
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def set_up() -> None:
    """The first call of every notebook: figures in the house style, whole texts in tables, memory that is kept.

    Weights load without a bar, which a saved notebook would show as a broken widget; downloads keep theirs.
    """
    import pandas as pd
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from ibkit.evaluate.figures import use_house_style

    use_house_style()
    keep_memory()
    disable_progress_bar()
    enable_progress_bars()
    pd.set_option("display.max_colwidth", None)
    if shell := _ipython():
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)


def fold_tracebacks() -> None:
    """From now on show the kit's errors in this way, where the code runs in IPython; else do nothing."""
    if shell := _ipython():
        shell.set_custom_exc((IbkitError,), _show)


def _ipython() -> Any:
    """The shell that runs this code; None outside of IPython."""
    return (ipython := sys.modules.get("IPython")) and ipython.get_ipython()


def table_html(table: "pd.DataFrame") -> str:
    """A table as pandas shows it, but for texts and the names of rows, which are on the left; JupyterLab has all on the
    right."""
    from pandas.api.types import is_numeric_dtype

    head, mark, body = table._repr_html_().partition("<tbody>")
    sides = ["" if is_numeric_dtype(kind) else LEFT for kind in table.dtypes]
    rows = body.split("<tr>")
    for i, row in enumerate(rows):
        if row.count("<td>") == len(sides):  # not all columns are shown of a very wide table
            cells = row.split("<td>")
            row = cells[0] + "".join(f"<td{side}>{cell}" for side, cell in zip(sides, cells[1:], strict=True))
        rows[i] = row.replace("<th", f"<th{LEFT}")
    names = head.split("<th>")
    if len(names) - 1 >= len(sides) and table.columns.nlevels == 1:
        first = table.index.nlevels + 1
        heads = [LEFT] * table.index.nlevels + sides + [LEFT] * (len(names) - first - len(sides))
        head = names[0] + "".join(f"<th{side}>{name}" for side, name in zip(heads, names[1:], strict=True))
    return head + mark + "<tr>".join(rows)


def _show(
    shell: Any, kind: type, error: BaseException, trace: TracebackType, tb_offset: int | None = None
) -> list[str]:
    from IPython.display import HTML, display

    lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
    text = html.escape(COLOURS.sub("", "\n".join(lines)))
    folded = f"<details><summary>where it happened, for those who change the kit</summary><pre>{text}</pre></details>"
    display(HTML(folded), metadata={"ibkit": "traceback"})
    said = [f"{kind.__name__}: {error}"]
    shell._showtraceback(kind, error, said)  # sends the error; what a handler returns is shown nowhere
    return said


def cell_names(namespace: Mapping[str, Any], names: list[str]) -> set[str]:
    """Names assigned by the cell run last among those that assign most of the notebook's parameters."""
    for source in reversed(namespace.get("In", [])):
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        assigned = {target.id for target in targets if isinstance(target, ast.Name)}
        if len(assigned & set(names)) > len(names) / 2:
            return assigned
    return set()
