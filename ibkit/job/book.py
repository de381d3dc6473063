"""The book's pages that are read from the code: a page for each method, scorer and protocol, a glossary of every logged
column, and the API; MkDocs takes this file as a hook (`make book`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibkit.job import notebook_pages
from ibkit.job.notebook_pages import NOTEBOOKS, outside_code
from ibkit.runs import project_root

ROOT = project_root()
LINK = r"(?P<mark>!?)\[(?P<label>[^\]]*)\]\((?P<place>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
KEPT = ("http://", "https://", "mailto:")
COLUMNS = {  # of tables that no method's page explains
    "scores.csv": {
        "arm": "the chain of methods, such as `dreambooth+ddpo`; `base` and `real` are the base model and the photos",
        "seed": "of the personalization",
        "tune_seed": "of the tuning",
        "subject": "the subject's name",
        "class_noun": "what it is",
        "prompt_id": "the activity as a name for files",
        "prompt": "what the model read",
        "text": "the same without the identifier: what scorers read",
        "activity": "what the prompt asks for",
        "seen": "whether RL was trained on it; empty without RL",
        "identifier": "whether the prompt has the identifier",
        "image": "the picture, below the run folder",
        "image_seed": "of the noise: the same for all arms",
    },
    "history.csv": {
        "step": "gradient step of a personalization",
        "epoch": "of a tuning",
        "loss": "what is minimised",
        "loss_subject": "noise loss on the photos",
        "loss_prior": "noise loss on class pictures, before its weight",
        "monitor": "subject scorer on fixed samples; watched, never optimised",
        "text_monitor": "CLIP-T on fixed samples; watched, never optimised",
        "judge_activity": "the judge on the guard's samples (prompts with the identifier); never optimised",
        "judge_activity_class": "the same for class prompts",
        "judge_identity": "the judge on the guard's samples: is it the same subject",
    },
    "votes.csv": {
        "rater": "who voted",
        "simulated": "whether that is a network",
        "question": "subject, text or preference",
        "arm_a": "of a pair, the one",
        "arm_b": "of a pair, the other",
        "answer": "yes or no; a or b",
        "item": "hash of the question and its pictures",
    },
}


@dataclass(frozen=True)
class Column:
    """A column of a logged table: its name, what it is, and the page or file that says so."""

    name: str
    meaning: str
    where: str


def pages() -> dict[str, str]:
    """Path below the book -> Markdown, of all pages that are made from the code; notebooks are apart."""
    found = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    found |= {
        f"{name}.md": (ROOT / f"{name}.md").read_text("utf-8") for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")
    }
    return (
        found | _methods() | _scorers() | _protocols() | _api() | {"glossary.md": _glossary(), "hardware.md": _ladder()}
    )


def _methods() -> dict[str, str]:
    from ibkit.job.methods import facts, in_markdown
    from ibkit.methods.records import METHODS

    found, rows = {}, []
    for name in METHODS:
        method = METHODS.find(name)
        about = facts(method)
        module = method.settings.__module__
        own = next((page for page in (name, module.rpartition(".")[2]) if _hand_page(page)), "")
        text = f"# {method.label} (`{name}`)\n\nTo {method.stage} a model. Source: {method.source}.\n\n"
        text += f"{_docstring(module)}\n\n"
        if own:
            text += f"[How it is done here, its history and details that matter](../methods/{own}.md).\n\n"
        text += f"```\nibkit run --{method.stage} {name}\nibkit methods {name}\n```\n\n## Settings\n\n"
        found[f"reference/methods/{name}.md"] = (
            f"{text}{in_markdown(about['settings'])}\n\n[The code](../api/methods.md)\n"
        )
        rows.append(f"| [{method.label}](reference/methods/{name}.md) | `{name}` | {method.stage} | {method.source} |")
    head = "# Methods\n\n| method | name | stage | source |\n|---|---|---|---|\n"
    return found | {"all-methods.md": head + "\n".join(rows) + "\n"}


def _scorers() -> dict[str, str]:
    from ibkit.evaluate.stats import METRICS
    from ibkit.fields import fields_of
    from ibkit.scorers import SCORERS, column_of

    found, rows = {}, []
    for name in SCORERS:
        scorer: Any = SCORERS.find(name)
        column = column_of(name)
        label = METRICS[column].label if column in METRICS else name
        needs = ", ".join(sorted(scorer.needs)) or "nothing else"
        gradient = "yes" if "differentiable" in vars(scorer) else "no"
        text = f"# {label} (`{name}`)\n\n{_plain(scorer.__doc__ or _docstring(scorer.__module__))}\n\n"
        text += f"Column `{column}`; needs beside the pictures: {needs}; has a gradient: {gradient}.\n\n"
        if options := fields_of(scorer.options):
            text += "| option | default | what it is |\n|---|---|---|\n"
            text += "\n".join(f"| `{row.name}` | `{row.default}` | {row.help} |" for row in options) + "\n\n"
        found[f"reference/scorers/{name}.md"] = text + "[The code](../api/scorers.md)\n"
        rows.append(f"| [{label}](reference/scorers/{name}.md) | `{name}` | `{column}` | {needs} | {gradient} |")
    head = "# Scorers\n\nEvery scorer can be a metric, a monitor and a reward.\n\n"
    head += "| scorer | name | column | needs | gradient |\n|---|---|---|---|---|\n"
    return found | {"all-scorers.md": head + "\n".join(rows) + "\n"}


def _protocols() -> dict[str, str]:
    from ibkit.data import protocols

    found, rows = {}, []
    for name in protocols.names():
        if name == protocols.DREAMBENCH:
            text = "# dreambench\n\nIts prompts are read from the published folder: see `ibkit data dreambench`.\n"
        else:
            each = [protocols.read_protocol(name, noun) for noun in protocols.class_nouns(name)]
            text = f"# {name}\n\n{each[0].title}. Pictures for each prompt: {each[0].images_per_prompt}.\n\n"
            text += "| class | RL may train on | evaluation |\n|---|---|---|\n"
            text += (
                "\n".join(f"| {p.class_noun} | {'; '.join(p.train)} | {'; '.join(p.evaluate)} |" for p in each) + "\n"
            )
        found[f"reference/protocols/{name}.md"] = text
        rows.append(f"* [{name}](reference/protocols/{name}.md)")
    return found | {"all-protocols.md": "# Protocols\n\n" + "\n".join(rows) + "\n"}


def columns() -> list[Column]:
    """Every logged column that is explained, by name; of a page of a method, those of its table of the history."""
    from ibkit.evaluate.stats import METRICS

    found = [Column(name, text, file) for file, rows in COLUMNS.items() for name, text in rows.items()]
    found += [Column(name, metric.label, "scores.csv") for name, metric in METRICS.items()]
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        table = page.read_text(encoding="utf-8").partition("| column | meaning |")[2].partition("\n\n")[0]
        for named, meaning in re.findall(r"^\| (`.*?`) \| (.*) \|$", table, re.MULTILINE):
            where = f"[{page.stem}](methods/{page.name})"
            found += [Column(name, meaning, where) for name in re.findall(r"`([^`]+)`", named)]
    return sorted(found, key=lambda column: (column.name, column.where))


def _glossary() -> str:
    rows = [f"| `{column.name}` | {column.meaning} | {column.where} |" for column in columns()]
    head = "# Glossary of logged columns\n\nA name that ends in … stands for several.\n\n"
    head += "| column | what it is | where |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _ladder() -> str:
    """The README's table of GPUs, which `ibkit plan --ladder` prints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| stage | 8 GiB") :].partition("\n\n")[0]
    return (
        "# Hardware ladder\n\nThe pocket model runs on two CPU cores. What Stable Diffusion's size takes, counted and "
        f"not measured on a card (`ibkit plan --ladder`): GiB, and what must be set.\n\n{table}\n"
    )


def _api() -> dict[str, str]:
    """A page for each room of the package, for mkdocstrings."""
    found = {}
    package = ROOT / "ibkit"
    for room in sorted([*package.glob("*/__init__.py"), *package.glob("[a-z]*.py")]):
        inside = sorted(room.parent.rglob("*.py")) if room.name == "__init__.py" else [room]
        name = room.parent.name if room.name == "__init__.py" else room.stem
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in inside]
        found[f"reference/api/{name}.md"] = f"# {name}\n\n" + "\n\n".join(f"::: {module}" for module in names) + "\n"
    rows = [f"* [{Path(page).stem}](reference/{page.removeprefix('reference/')})" for page in found]
    return found | {"api.md": "# API reference\n\n" + "\n".join(rows) + "\n"}


def _hand_page(name: str) -> bool:
    return (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def _docstring(module: str) -> str:
    import importlib

    return _plain(importlib.import_module(module).__doc__ or "")


def _plain(docstring: str) -> str:
    """A docstring without its sections of arguments."""
    import inspect

    return re.split(r"\n(?:Args|Attributes|Returns|Raises):", inspect.cleandoc(docstring))[0].strip()


def relinked(text: str, source: str, known: set[str]) -> str:
    """A page with links to other pages as the book has them; what is no page is named as a file of the project.

    Args:
        source: path below the book: of the README and its like, links are seen from the project's root.
        known: paths of all pages and pictures of the book.
    """
    base = Path("/book") / source
    at_root = source in ("index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")

    def one(match: re.Match) -> str:
        mark, label, place, anchor = match.group("mark", "label", "place", "anchor")
        if place.startswith(KEPT):
            return match[0]
        place = re.sub(r"\.ipynb$", ".md", place)
        if at_root:
            path = "index.md" if place == "README.md" else place.removeprefix("docs/")
        else:
            path = _normal(base.parent / place)
        if path in known:
            up = "../" * (len(Path(source).parts) - 1)
            return f"{mark}[{label}]({up}{path}{anchor or ''})"
        shown = place if at_root else path.removeprefix("../")
        return f"{label} (`{shown}`)" if label.strip("`") != shown else f"`{shown}`"

    return outside_code(LINK, one, text)


def _normal(path: Path) -> str:
    import posixpath

    return posixpath.relpath(posixpath.normpath(path.as_posix()), "/book")


# ------------------------------------------------------------------------------------------------------ MkDocs' hooks


def on_config(config: Any) -> Any:
    """List the notebooks in the navigation, after the front page."""
    config.nav.insert(1, {"Notebooks": [f"notebooks/{path.stem}.md" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and the README's pictures, to MkDocs' files."""
    from mkdocs.structure.files import File

    for path, content in (pages() | notebook_pages.pages()).items():
        files.append(File.generated(config, path, content=content))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark, _, place, _ in re.findall(LINK, readme):
        if mark and not place.startswith(KEPT):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mend the links of a page."""
    return relinked(markdown, page.file.src_uri, {file.src_uri for file in files})
