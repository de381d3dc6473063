"""Every notebook as committed: its parameters cell is its schema, and nothing of a run or a machine is left in it."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

from ibkit.data.subject import PersonalizedSubject
from ibkit.errors import ParameterError
from ibkit.params import LITERALS, schema
from ibkit.runs import Run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Absolute paths of somebody's machine; /tmp too, which is no place to tell others to look at.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(/(home|root|Users|work|tmp|mnt|media|content|workspace|scratch|data)/|[A-Za-z]:\\)"
)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def assignments(source):
    """Names and values of a parameters cell in order; anything but `name = literal` fails."""
    found = []
    for node in ast.parse(source).body:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, f"line {node.lineno} is no plain assignment"
        found.append((node.targets[0].id, ast.literal_eval(node.value)))
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS, f"{FOLDER} holds no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid(self, path):
        notebook = read(path)
        nbformat.validate(notebook)
        assert notebook.nbformat == 4 and notebook.metadata["kernelspec"]["language"] == "python"
        assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")

    def test_parameters_are_the_schema(self, path):
        cells = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(cells) == 1 and cells[0].cell_type == "code"
        found, rows = assignments(cells[0].source), schema(path.stem)
        assert found == [(row.name, row.default) for row in rows]
        # 0 == 0.0 == False, but papermill and people read the type off the literal
        assert [type(value) for _, value in found] == [row.type for row in rows]
        lines = [line for line in cells[0].source.splitlines() if line.strip()]
        assert len(lines) == len(rows), "one parameter a line"
        for line, row in zip(lines, rows, strict=True):
            assert line.split("#", 1)[1].strip() == row.help

    def test_holds_nothing_of_a_run(self, path):
        for number, cell in enumerate(read(path).cells):
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None, f"cell {number} has outputs"
            assert not cell.get("attachments"), f"cell {number} has attachments"
            assert set(cell.metadata) <= {"tags", "editable", "slideshow"}, f"cell {number}: {dict(cell.metadata)}"

    def test_names_no_machine(self, path):
        found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{found.group()} at character {found.start()}"

    def test_code_parses(self, path):
        for number, cell in enumerate(read(path).cells):
            if cell.cell_type == "code":
                compile(cell.source, f"{path.stem}, cell {number}", "exec")

    def test_imports_nothing_that_looks_like_a_parameter(self, path):
        """`collect` takes every public literal for a mistyped parameter, a constant that was imported too."""
        code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
        before = code[: next(i for i, source in enumerate(code) if "collect(" in source and "globals()" in source)]
        for node in ast.walk(ast.parse("\n".join(before))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert type(getattr(module, alias.name, None)) not in LITERALS[:-1], f"{node.module}.{alias.name}"

    def test_finishes_its_run(self, path):
        code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
        assert f'collect("{path.stem}", globals())' in "\n".join(code)
        assert "run.finish()" in code[-1], "the last code cell finishes the run"


@pytest.mark.parametrize(("base", "model"), [("sd15", "pocket"), ("pocket", "sd15"), ("pocket", "/a/folder")])
def test_rl_on_a_model_of_another_preset_is_refused_before_a_run_is_made(tmp_path, base, model):
    run = Run.open(tmp_path / "01", "01_personalize", {})
    PersonalizedSubject("cat", "cat", "sks", "", base, "", None).save(run)
    run.finish()
    cells = [cell for cell in read(FOLDER / "02_rl_finetune.ipynb").cells if cell.cell_type == "code"]
    chosen = {"model": model, "run_in": str(tmp_path / "01"), "run_out": str(tmp_path / "02")}
    wanted = f"personalized the model '{base}', whose preset is not that of '{model}': give model='{base}' here too"
    namespace = {}
    for before in cells[:2]:
        exec(before.source, namespace)
    with pytest.raises(ParameterError, match=re.escape(wanted)):
        exec(cells[2].source, namespace | chosen)
    assert not (tmp_path / "02").exists()
