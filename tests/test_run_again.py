"""The real notebooks run again by hand: their cells executed a second time in the same kernel's namespace."""

import re

import nbformat
import pytest

from ibkit.errors import ParameterError
from ibkit.runs import notebooks, project_root, read_run, writing
from ibkit.runs.files import hash_file


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Runs without a name go below a folder of the test's own."""
    monkeypatch.setattr(notebooks, "OUTPUTS", str(tmp_path / "outputs"))
    yield tmp_path / "outputs"
    for run in list(writing._OPEN.values()):
        run._close()


class Kernel:
    """A notebook's code cells and the namespace that they share."""

    def __init__(self, notebook, **parameters):
        book = nbformat.read(project_root() / "notebooks" / f"{notebook}.ipynb", as_version=4)
        self.cells = [cell for cell in book.cells if cell.cell_type == "code"]
        self.names, self.parameters = {"__name__": "__main__"}, parameters

    def run(self, cells=None):
        for cell in self.cells if cells is None else cells:
            exec(compile(cell.source, "a cell", "exec"), self.names)
            if "parameters" in cell.metadata.get("tags", []):  # as a person changes them
                self.names.update(self.parameters)

    def until(self, word):
        """The cells up to the first with this word."""
        return self.cells[: next(i for i, cell in enumerate(self.cells) if word in cell.source) + 1]


def test_a_notebook_is_run_again_by_hand(outputs, capsys):
    small = {"n_steps": 3, "batch": 2, "n_class_images": 2}
    kernel = Kernel("01_personalize", device="cpu", settings=small, n_inference_steps=3)
    kernel.run()
    folder = outputs / "notebook-01_personalize"
    first = read_run(folder, "01_personalize").manifest

    kernel.run()  # Run All twice
    again = read_run(folder).manifest
    assert {n: o["sha256"] for n, o in again["outputs"].items()} == {
        n: o["sha256"] for n, o in first["outputs"].items()
    }
    assert "edited_by_hand" not in again and len(list(outputs.iterdir())) == 1

    plot = next(cell for cell in kernel.cells if '"figures/loss"' in cell.source)
    before = hash_file(folder / "figures" / "loss.png")
    plot.source = plot.source.replace("figsize=(7, 3)", "figsize=(5, 3)")
    kernel.run([plot])  # one cell, after the end
    edited = read_run(folder)
    assert edited.manifest["edited_by_hand"] is True and hash_file(edited.path("figures/loss.png")) != before

    later = Kernel("02_rl_finetune", device="cpu", settings={"n_epochs": 1})
    later.run(later.until("open_run("))
    assert "goes on from outputs/notebook-01_personalize, the newest run" in capsys.readouterr().out

    for name, value, sentence in (
        ("settings", {"n_epoch": 1}, "did you mean 'n_epochs'"),
        ("prompts", ["flying to the moon on a broom"], "knows no cat 'flying to the moon on a broom'"),
    ):
        refused = Kernel("02_rl_finetune", device="cpu", **{name: value})
        with pytest.raises(ParameterError, match=re.escape(sentence)):
            refused.run(refused.until("rollout("))

    kernel.parameters["seed"] = 1
    kernel.run(kernel.until("open_run("))  # another number
    assert "other values (seed was 0 and is 1)" in capsys.readouterr().out
    aside = next(outputs.glob("notebook-01_personalize-*"))
    assert read_run(aside).manifest["outputs"] == edited.manifest["outputs"]
