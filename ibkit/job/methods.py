"""`ibkit methods`: what methods there are, and every setting of one with its default, source and allowed values.

Everything is read from the records (`ibkit.methods.records`), so a method that another package adds is listed too.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ibkit.fields import fields_of

if TYPE_CHECKING:
    from ibkit.methods.records import Method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ibkit methods`."""
    parser.add_argument("name", nargs="?", default="", metavar="METHOD", help="one of them, with its settings")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--markdown", action="store_true", help="print the settings as a table of Markdown")


def main(arguments: argparse.Namespace) -> int:
    """Print the methods, or the settings of one; returns 0."""
    from ibkit.methods.records import METHODS

    chosen = [METHODS.find(arguments.name)] if arguments.name else [METHODS.find(name) for name in METHODS]
    rows = [facts(method) for method in chosen]
    if arguments.json:
        print(json.dumps(rows[0] if arguments.name else rows, indent=1))
    elif arguments.markdown:
        print("\n\n".join(in_markdown(row["settings"]) for row in rows))
    elif arguments.name:
        print(in_words(chosen[0], rows[0]["settings"]))
    else:
        width = max(len(row["name"]) for row in rows) + 2
        for row in rows:
            print(f"{row['name']:{width}}{row['stage']:13}{row['source']}")
        print("\nibkit methods METHOD lists its settings")
    return 0


def facts(method: Method) -> dict[str, Any]:
    """What the record says, as JSON can hold it."""
    settings = []
    for row in fields_of(method.settings):
        value, why = method.pocket.get(row.name, (row.default, ""))
        settings.append(
            {"name": row.name, "default": row.default, "source": row.source, "help": row.help, "allowed": row.allowed}
            | {"pocket": value, "why": why}
        )
    own = {"name": method.name, "label": method.label, "stage": method.stage, "source": method.source}
    return own | {"settings": settings}


def in_words(method: Method, settings: list[dict[str, Any]]) -> str:
    """The settings as lines: name, default and what it is; below, where the default is from, and the pocket's value."""
    width = max(len(row["name"]) for row in settings) + 2
    lines = [f"{method.name} ({method.label}), to {method.stage}: {method.source}", ""]
    for row in settings:
        default = list(row["default"]) if isinstance(row["default"], tuple) else row["default"]
        lines.append(f"{row['name']:{width}}{default!s:<14}{row['help']}; {row['allowed']}")
        lines.append(f"{'':{width}}{'':14}default: {row['source']}")
        if row["why"]:
            lines.append(f"{'':{width}}{'':14}pocket: {row['pocket']}, {row['why']}")
    return "\n".join(lines)


def in_markdown(settings: list[dict[str, Any]]) -> str:
    """The settings as a table, as the pages of `docs/methods` have it."""
    lines = ["| setting | default | from | pocket | what it is |", "|---|---|---|---|---|"]
    for row in settings:
        default = list(row["default"]) if isinstance(row["default"], tuple) else row["default"]
        pocket = f"{row['pocket']}: {row['why']}" if row["why"] else ""
        cells = [f"`{row['name']}`", f"`{default}`" if default != "" else "", row["source"], pocket, row["help"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
