"""The shell under a notebook: an error that one sentence explains is shown as such, the traceback folded above it; and
what its cells assigned."""

import ast
import html
import re
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ibkit.errors import IbkitError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def fold_tracebacks() -> None:
    """From now on show the kit's errors in this way, where the code runs in IPython; else do nothing."""
    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        shell.set_custom_exc((IbkitError,), _show)


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
