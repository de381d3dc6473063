"""The page "when something goes wrong": every sentence that the kit refuses something with, read from its source.

python -m ibkit.job.sentences > docs/when-something-goes-wrong.md
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ibkit import errors

PACKAGE = Path(errors.__file__).parent
PAGE = "docs/when-something-goes-wrong.md"
HEAD = """# When something goes wrong

`ibkit` ends with one sentence, `error: …`, and exit status 2 where you can do something about it; nothing is left half
written. Search this page for a few words of it: `‹…›` stands for what is particular to your case. Status 1 is a mistake
of the kit or a process that was killed, 130 Ctrl-C. After a job's error, mend what the sentence names and go on with
`ibkit run --resume --name NAME`: finished stages are kept, and settings that they did not depend on may be changed.

Made from the source by `python -m ibkit.job.sentences`; a test compares the two.
"""


@dataclass(frozen=True, order=True)
class Sentence:
    """One refusal.

    Attributes:
        kind: name of the error's class; module: that raises it, with dots.
        wrong: what is wrong, and where.
        remedy: what to do; empty where the sentence itself says it, or its parts are put together elsewhere.
    """

    kind: str
    module: str
    wrong: str
    remedy: str


def sentences() -> list[Sentence]:
    """Those of the whole package, in the order of classes and modules, each once."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for kind, text in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            found.add(Sentence(kind, module, *_halves(text)))
    order = list(_kinds())
    return sorted(found, key=lambda s: (order.index(s.kind), s.module, s.wrong, s.remedy))


def page() -> str:
    """The page as Markdown."""
    rows, parts = sentences(), [HEAD]
    for kind, about in _kinds().items():
        own = [row for row in rows if row.kind == kind]
        if own:
            parts.append(f"## {kind}\n\n{about}\n")
            parts.append("| what it says | what to do | raised in |\n|---|---|---|")
            parts.append("\n".join(f"| {_cell(r.wrong)} | {_cell(r.remedy)} | `{r.module}` |" for r in own) + "\n")
    return "\n".join(parts)


def _kinds() -> dict[str, str]:
    """The classes of errors and their first lines, as the module has them."""
    classes = [one for one in vars(errors).values() if inspect.isclass(one) and one is not errors.IbkitError]
    return {one.__name__: (one.__doc__ or "").strip() for one in classes}


def _raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Class and text of every raised error of the kit whose text is written where it is raised."""
    kinds = _kinds()
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds and call.args:
            if text := _text(call.args[0]):
                yield call.func.id, text


def _text(node: ast.AST) -> str:
    """A text as it is written, with ‹names› for what is put in; empty for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"‹{_name(part.value)}›" if isinstance(part, ast.FormattedValue) else str(ast.literal_eval(part))
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _name(node: ast.AST) -> str:
    """A short name for an expression: that of the variable or function in front."""
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute | ast.Name)
    ]
    return names[0] if names else "…"


def _halves(text: str) -> tuple[str, str]:
    """What is wrong, and what to do, which stands behind the last ": " or "; " that is not inside brackets."""
    depth, cut = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{‹") - (letter in ")]}›")
        if depth == 0 and text[i : i + 2] in (": ", "; "):
            cut = i
    advice = text[cut + 2 :].strip()
    return (text[:cut].strip(), advice) if cut and not advice.startswith("‹") else (text.strip(), "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(page(), end="")
