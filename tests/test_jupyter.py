"""The notebooks in JupyterLab, in a real browser, as a student uses them: run, changed, run again; rated by keys."""

import json
import re
import time

import pytest

from ibkit.runs import read_manifest, read_run
from tests.browser import CHROMIUM, checkout, lab
from tests.test_study import write_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at JupyterLab: apt-get install chromium"),
]
TRAINING = {"n_steps": 3, "batch": 2, "n_class_images": 2}
SMALL = {  # what to change in each notebook, so that it ends in seconds; in the order in which one reads another's run
    "00_start_here": {},
    "01_personalize": {"settings": TRAINING},
    "02_rl_finetune": {"settings": {"n_epochs": 2, "images_per_epoch": 4, "sampler.n_steps": 3}},
    "13_inside_rl": {},
    "03_evaluate": {"n_images": 2},
    "07_human_study": {},
    "12_compare_rl": {},
    "08_baselines": {"settings": {"n_steps": 2, "n_class_images": 2}},
    "04_attention_maps": {"n_scenes": 1},
    "14_detailed_description": {
        "settings": {"n_steps": 2, "n_class_images": 2},
        "n_images": 2,
        "prompts": ["dancing"],
    },
    "05_dino_metric": {"class_nouns": ["cat"], "n_pairs": 4, "n_individuals": 8},
    "06_prompt_ablation": {
        "dreambooth_steps": [1],
        "n_epochs": 2,
        "n_images": 2,
        "settings": {"images_per_epoch": 4},
    },
    "09_human_feedback": {
        "n_prompts": 2,
        "n_rated": 2,
        "best_of": 4,
        "reward_settings": {"n_steps": 5},
        "settings": {"n_steps": 2, "n_pretrain": 2, "batch": 2},
    },
    "10_deterministic_pg": {"settings": {"n_steps": 2, "n_class_images": 2}, "n_images": 1},
    "11_rpo": {"settings": {"n_steps": 2, "n_class_images": 2}, "n_images": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def page(root, tmp_path_factory):
    with lab(root, tmp_path_factory.mktemp("lab")) as page:
        yield page


def run_whole(page):
    page.run_all()
    assert page.errors() == []


def test_the_tour_runs_twice(page, root):
    page.open("notebooks/00_start_here.ipynb")
    run_whole(page)
    folder = root / "outputs" / "notebook-00_start_here"
    first = read_run(folder, "00_start_here").manifest["outputs"]
    run_whole(page)
    assert read_run(folder).manifest["outputs"] == first and not list((root / "outputs").glob("notebook-*-*"))
    said = page.texts()
    assert "PosixPath" not in said and not re.search(r"^True$", said, re.MULTILINE) and "Loading weights" not in said
    page.end_kernel()


def test_a_training_is_started_wrongly_then_rightly_then_with_another_number(page, root):
    page.open("notebooks/01_personalize.ipynb")
    cell = page.cell("settings = {}")
    page.type_into(cell, "settings = {}", f"settings = {TRAINING}")
    page.type_into(cell, "seed = 0", "seeed = 0")
    page.run_all()
    (error,) = page.errors()
    assert error["ename"] == "ParameterError" and "did you mean 'seed'?" in error["evalue"]
    page.show(page.cell("collect("))
    output = f"panel.content.widgets[{page.cell('collect(')}].outputArea.node"
    page.wait(f"{output}.innerText.trim()", 30)
    shown = page.js(f"{output}.innerText").strip()
    assert shown.splitlines()[-1] == f"ParameterError: {error['evalue']}" and "Traceback" not in shown
    assert not (root / "outputs" / "notebook-01_personalize").exists()

    page.type_into(cell, "seeed = 0", "seed = 0")
    page.restart_kernel()
    run_whole(page)
    first = read_run(root / "outputs" / "notebook-01_personalize", "01_personalize").manifest
    page.type_into(cell, "seed = 0", "seed = 1")
    run_whole(page)
    assert "other values (seed was 0 and is 1)" in page.texts()
    (aside,) = (root / "outputs").glob("notebook-01_personalize-*")
    assert read_manifest(aside)["outputs"] == first["outputs"]
    assert read_run(root / "outputs" / "notebook-01_personalize").parameters["seed"] == 1
    page.end_kernel()


@pytest.mark.parametrize("name", SMALL)  # in order: a notebook reads the run of one before
def test_every_notebook_is_stopped_run_again_and_drawn_again(page, root, name):
    page.open(f"notebooks/{name}.ipynb")
    cell = page.cell('model = "pocket"')
    for parameter, value in SMALL[name].items():
        page.assign(cell, parameter, value)
    page.stop_run_all(0.6)
    assert {error["ename"] for error in page.errors()} <= {"KeyboardInterrupt"}
    run_whole(page)
    folder = root / "outputs" / f"notebook-{name}"
    first = read_run(folder, name).manifest
    page.run_cell(page.cell("run.save_figure("))
    assert page.errors() == []
    run_whole(page)
    last = read_run(folder, name)
    assert last.manifest["started"] == first["started"] and set(last.manifest["outputs"]) == set(first["outputs"])
    assert "Loading weights" not in page.texts() and "PosixPath" not in page.texts()
    page.end_kernel()


FOCUS = "document.activeElement.textContent.trim()"


def button(word):
    buttons = "[...document.querySelectorAll('.jupyter-button')]"
    return f"{buttons}.find(b => b.textContent.trim() === '{word}' && b.offsetParent)"


def test_a_person_rates_with_mouse_and_keys(page, root):
    write_runs(root / "outputs" / "main", n_images=1)
    page.open("notebooks/07_human_study.ipynb")
    cell = page.cell('rater = ""')
    page.type_into(cell, 'rater = ""', 'rater = "Ann"')
    run_whole(page)
    file = root / "outputs" / "notebook-07_human_study-ratings" / "ann.jsonl"

    def answers():
        return [json.loads(line)["answer"] for line in file.read_text().splitlines()] if file.exists() else []

    def press(key, n, shift=False):
        """Press a key and wait for the answer's line, and for the focus to rest between the answers again."""
        page.key(key, shift)
        for _ in range(100):
            if len(answers()) == n and page.js(FOCUS) == "·":
                return
            time.sleep(0.1)
        raise AssertionError(f"{answers()}, the focus on {page.js(FOCUS)!r}")

    page.show(page.cell("RatingPage("))
    page.wait(button("Start"))
    page.click(button("Start"))
    page.wait(f"{button('Yes')} && {FOCUS} === '·'")
    time.sleep(0.5)  # longer than a double click
    for n, (shift, word, answer) in enumerate([(False, "No", "no"), (True, "Yes", "yes"), (False, "No", "no")], 1):
        page.key("Tab", shift)
        assert page.js(FOCUS) == word  # one key away, both
        press("Enter", n)
        assert answers()[-1] == answer
        page.key("Enter")  # a second press answers nothing
        time.sleep(0.5)
    page.click(button("Yes"))
    page.wait(f"{FOCUS} === '·'")
    time.sleep(0.5)
    assert answers() == ["no", "yes", "no", "yes"]
    for _ in range(2):
        page.key("Tab")
    assert page.js(FOCUS) == "Undo"
    press(" ", 5)
    assert answers()[-1] == "undo"
    page.key("Tab")
    assert page.js(FOCUS) == "No"  # on the page still

    page.type_into(cell, 'rater = "Ann"', f'rater = "Ann"\nratings = ["{file}"]')  # more names on the same items
    page.type_into(cell, "ratings = []", "pass")
    run_whole(page)
    assert f"3 of 18 answered, in {file}" in page.texts() and "3 votes of 1 person" in page.texts()

    dead = "[...document.querySelectorAll('b')].find(b => b.textContent.startsWith('This page is dead'))"
    page.show(page.cell("RatingPage("))
    page.wait(dead)
    time.sleep(15)
    assert page.js(f"{dead}.parentElement.offsetHeight") == 0  # it lives
    page.restart_kernel()
    page.wait(f"{dead}.parentElement.offsetHeight > 0", 30)
    page.end_kernel()
