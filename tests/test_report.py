"""The report: built from a small made-up run, read as HTML, and opened in a real browser where there is one."""

import html.parser
import json
import re
import shutil
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from ibkit.errors import ArtifactError
from ibkit.evaluate import figures
from ibkit.evaluate.identity import identity_strip
from ibkit.evaluate.stats import as_compared, check_scores
from ibkit.report import _results, build_report
from ibkit.report import figures as report_figures
from ibkit.runs import Run
from ibkit.scorers.dino import Dino

PROMPTS = {"soccer": "a cat playing soccer", "bike": "a cat riding a bike", "forest": "a cat reading in the forest"}
# Share of images with the right activity and with the right subject.
RATES = {
    ("base", False): (0.97, 0.05),
    ("dreambooth", True): (0.4, 0.98),
    ("dreambooth", False): (0.85, 0.3),
    ("dreambooth+ddpo", True): (0.9, 0.97),
}
ODD = '<script>alert("cat & mouse")</script>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def scene(arm, prompt_id, image_seed):
    """A small picture that differs by arm, prompt and seed."""
    hue = {"base": "#888888", "dreambooth": "#d55e00", "dreambooth+ddpo": "#0072b2"}[arm]
    picture = Image.new("RGB", (64, 64), {"soccer": "#9ccc65", "bike": "#b0bec5", "forest": "#2e7d32"}[prompt_id])
    x = 12 + 6 * (image_seed % 4)
    ImageDraw.Draw(picture).ellipse((x, 20, x + 26, 50), fill=hue, outline="black")
    return picture


def score_table(n_images=20):
    rng = np.random.default_rng(0)
    rows = []
    for (arm, identifier), (activity, identity) in RATES.items():
        for prompt_id, text in PROMPTS.items():
            for image_seed in range(n_images):
                rows.append(
                    {
                        "arm": arm,
                        "seed": None if arm == "base" else 0,
                        "tune_seed": 0 if arm == "dreambooth+ddpo" else None,
                        "subject": "cat",
                        "class_noun": "cat",
                        "prompt_id": prompt_id,
                        "prompt": text.replace("a cat", "a [v] cat") if identifier else text,
                        "text": text,
                        "activity": prompt_id,
                        "identifier": identifier,
                        "image": f"images/{arm}-{prompt_id}-{image_seed}.png",
                        "image_seed": image_seed,
                        "clip_t": rng.normal(0.2 + 0.1 * activity, 0.02),
                        "dino": rng.normal(0.3 + 0.4 * identity, 0.05),
                        "image_reward": rng.normal(2 * activity - 1, 0.3),
                        "judge_text": int(rng.random() < activity),
                        "judge_identity": int(rng.random() < identity),
                    }
                )
    return pd.DataFrame(rows)


def history(n_epochs=30):
    epoch = np.arange(n_epochs)
    rng = np.random.default_rng(1)
    rise = 1 - np.exp(-epoch / 10)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "reward": -2 + 3 * rise + rng.normal(0, 0.2, n_epochs),
            "reward_identifier": -3 + 3.6 * rise + rng.normal(0, 0.2, n_epochs),
            "reward_class": -1 + 2.2 * rise + rng.normal(0, 0.2, n_epochs),
            "monitor": 0.72 - 0.03 * rise + rng.normal(0, 0.01, n_epochs),
            "judge_activity": (0.4 + 0.5 * rise + rng.normal(0, 0.05, n_epochs)).clip(0, 1),
            "judge_identity": (0.97 + rng.normal(0, 0.02, n_epochs)).clip(0, 1),
        }
    )


def make_run(folder, subject="cat", seed=0):
    """Write a finished main run the way the notebooks do."""
    first = Run.open(folder / "01_personalize", "01_personalize", {"model": "pocket", "subject": subject, "note": ODD})
    photos = [scene("dreambooth", prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    first.save_figure(*swap(figures.reference_strip(photos, ["a.png", "b.png", "c.png"]), "figures/references"))
    first.finish()

    second = Run.open(
        folder / "02_rl_finetune", "02_rl_finetune", {"model": "pocket", "n_epochs": 30},
        inputs={"personalized": first.folder},
    )  # fmt: skip
    second.save_figure(*swap(figures.learning_curves(history()), "figures/curves"))
    second.write_table("history.csv", history())
    second.write_json("subject.json", {"name": subject})
    second.write_json("adapted.json", {"deltas": [{"method": m, "seed": seed} for m in ("dreambooth", "ddpo")]})
    second.finish()

    third = Run.open(
        folder / "03_evaluate", "03_evaluate", {"model": "pocket"}, inputs={"tuned": second.folder}
    )  # fmt: skip
    scores = score_table().assign(subject=subject, class_noun=subject)
    for column in ("seed", "tune_seed"):
        scores.loc[scores[column].notna(), column] = seed
    third.write_table("scores.csv", scores)
    compared = as_compared(check_scores(scores))
    for row in compared[compared["image_seed"] < 4].itertuples():
        scene(row.arm, row.prompt_id, row.image_seed).save(third.path(row.image))
    third.note_output("images")
    third.save_figure(*swap(figures.picture_grid(compared, third.folder), "figures/grid"))
    shown = compared[compared["image_seed"] < 4]
    third.save_figure(*swap(identity_strip(shown, third.folder, photos, Dino.load("pocket")), "figures/identity"))
    third.save_figure(*swap(figures.fidelity_plane(compared), "figures/plane"))
    third.save_figure(*swap(figures.prompt_bars(compared), "figures/bars"))
    third.save_figure(*swap(figures.prompt_bars(compared, "clip_t"), "figures/clip_by_prompt"))
    third.record(evaluators={"judge_text": f"pocket judge, 99 % on held-out renders {ODD}"})
    third.record(gaps={"pick_score": "its official weights are not in the local cache"})
    third.finish()
    return folder


def swap(drawn, stem):
    figure, data = drawn
    return figure, stem, data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return build_report(make_run(tmp_path_factory.mktemp("outputs") / "my <run> & more"))


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and whether tags close in order."""

    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes the wrong element"

    def handle_data(self, data):
        self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def test_page_is_well_formed_and_accessible(page):
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1 and len(page.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= ids


def test_only_trained_arms_have_seeds():
    table = score_table(2)
    photos = table[table["arm"] == "dreambooth"].assign(arm="real", seed=None, prompt_id="photo").head(2)
    photos["image_seed"] = [0, 1]
    blocks = _results(pd.concat([table, photos]), SimpleNamespace(metrics={}))
    seeds = {(row["arm"], row["seeds"]) for block in blocks for row in block["rows"]}
    assert seeds == {("base", "–"), ("dreambooth", 1), ("dreambooth+ddpo", 1), ("real", "–")}


def test_page_needs_nothing_from_outside(page, report):
    assert page.all("script") == []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name, "")
            assert not value or value.startswith(("data:", "#")), value[:80]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    styles = re.findall("<style>(.*?)</style>", report.read_text(encoding="utf-8"), re.S)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]


def test_a_metric_that_was_not_measured_is_named(page):
    text = " ".join(" ".join(page.text).split())
    assert "pick_score was not measured. its official weights are not in the local cache" in text


def test_page_holds_all_figures_once_in_the_order_of_the_story(page):
    alts = [image["alt"] for image in page.all("img") if "noise seed" not in image["alt"]]
    assert len(alts) == 6  # the figure of the grid gives way to its pictures
    assert [alt.split()[0] for alt in alts] == ["3", "Enlarged", "Plane", "Bars", "Curves", "A"]
    assert "3 of Real photos; 6 of Base model; 6 of DreamBooth; 6 of InstructBooth" in alts[1]
    assert "judge activity from" in alts[4] and "epochs 0 to 29" in alts[4]


def test_page_says_what_stands_in_the_run(page):
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "C1. DreamBooth loses text fidelity", "✓ 2 supported", "? 2 undecided",
        "The whole interval lies below zero. Only 3 prompts × subjects, but they decide.",
        "not comparable in absolute value", "97.3 % (table 1, people)", "1.196 (table 2), 0.651 (table 3)",
        "n_epochs", "Custom Diffusion", "figures/curves.csv", "Evaluator of this run: not recorded", "torch",
    ):  # fmt: skip
        assert expected in text, expected


def test_text_from_the_run_is_escaped(page, report):
    text = "".join(page.text)
    assert text.count(ODD) == 2 and "my <run> & more" in text
    assert "<script" not in report.read_text(encoding="utf-8")


def test_same_run_same_report(report):
    before = report.read_bytes()
    assert build_report(report.parent).read_bytes() == before
    assert [path.name for path in report.parent.iterdir() if path.is_file()] == ["report.html"]


def test_a_run_without_scores_or_figures_still_reports(tmp_path):
    Run.open(tmp_path / "01_personalize", "01_personalize", {"subject": "pot"}).finish()
    text = build_report(tmp_path).read_text(encoding="utf-8")
    assert "no claim was tested" in text and "saved no figures" in text and "subject pot" in text


def test_a_run_edited_by_hand_says_so(tmp_path):
    run = Run.open(tmp_path / "01_personalize", "01_personalize", {}, by_hand=True)
    run.finish()
    assert "edited by hand" not in build_report(tmp_path).read_text(encoding="utf-8")
    run.write_text("note.txt", "one cell, run again")
    assert "01_personalize, edited by hand after its end" in build_report(tmp_path).read_text(encoding="utf-8")


def test_nothing_or_unfinished_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nothing to report"):
        build_report(tmp_path)
    Run.open(tmp_path / "01_personalize", "01_personalize", {}).fail("stopped for the test")
    with pytest.raises(ArtifactError, match="stopped for the test"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# --- the figures' own data -----------------------------------------------------------------------------------------


def test_grid_pairs_the_smallest_shared_seeds():
    table = as_compared(check_scores(score_table(6)))
    table = table[~((table["arm"] == "base") & (table["image_seed"] == 1))]
    pictures = table.assign(image=[scene(r.arm, r.prompt_id, r.image_seed) for r in table.itertuples()])
    _, data = figures.picture_grid(pictures, n_seeds=3)
    assert len(data) == 3 * 3 * 3
    assert data.groupby(["arm", "prompt_id"])["image_seed"].agg(list).map(tuple).unique().tolist() == [(0, 2, 3)]
    assert data["arm"].drop_duplicates().tolist() == ["base", "dreambooth", "dreambooth+ddpo"]


def widths_in_a_report(figure):
    """CSS px of each picture of a figure in a report, which shrinks what is wider than its text, 68rem less margins."""
    content = figure.get_tightbbox().width * 100
    return [
        axis.get_position().width * figure.get_figwidth() * 100 * min(1, 1048 / content)
        for axis in figure.axes
        if axis.images
    ]


@pytest.mark.parametrize(("arms", "n_seeds"), [(["base"], 4), (["base", "dreambooth"], 3), (list("abc"), 2)])
def test_pictures_of_photo_size_are_shown_large(arms, n_seeds):
    photo = Image.effect_noise((512, 512), 50)
    rows = [
        {"arm": arm, "prompt_id": "p", "text": "a cat", "image_seed": seed, "image": photo}
        for arm in arms
        for seed in range(4)
    ]
    figure, data = figures.picture_grid(pd.DataFrame(rows))
    figure.draw_without_rendering()
    assert len(data) == len(arms) * n_seeds and min(widths_in_a_report(figure)) > 135
    small = [row | {"image": photo.resize((64, 64))} for row in rows]
    assert len(figures.picture_grid(pd.DataFrame(small))[1]) == 4 * len(arms)
    strip, data = figures.reference_strip([photo] * 8, list("abcdefgh"))
    strip.draw_without_rendering()
    assert len(data) == 8 and min(widths_in_a_report(strip)) > 190
    assert [axis.get_xlabel() for axis in strip.axes if axis.images] == list("abcdefgh")


def test_curves_keep_every_point_and_average_seeds():
    runs = pd.concat([history(5).assign(tune_seed=seed) for seed in (1, 2)]).drop(columns="judge_identity")
    figure, data = figures.learning_curves(runs)
    assert set(data["series"]) == {"reward", "reward_identifier", "reward_class", "monitor", "judge_activity"}
    assert len(data) == 5 * 2 * 5
    drawn = figure.axes[0].lines[0].get_ydata()
    assert drawn == pytest.approx(runs.groupby("epoch")["reward"].mean().to_numpy())


def test_plane_and_bars_draw_the_intervals_of_the_table():
    compared = as_compared(check_scores(score_table()))
    _, plane = figures.fidelity_plane(compared)
    assert plane["arm"].tolist() == ["base", "dreambooth", "dreambooth+ddpo"]
    assert (plane["text_low"] <= plane["text_value"]).all() and (plane["subject_value"] <= plane["subject_high"]).all()
    _, bars = figures.prompt_bars(compared)
    assert len(bars) == 9 and bars["n"].eq(20).all() and set(bars["text"]) == set(PROMPTS.values())


def test_a_trajectory_shows_every_belief_and_every_step():
    steps = pd.DataFrame(
        {
            "t": [901, 501, 1],
            "log_prob": [1.0, 2.0, 3.0],
            "ratio": [1.0, 1.1, 0.9],
            "clip_high": [0.0, 0.5, 1.0],
            "clip_low": [0.0, 0.25, 0.0],
        }
    )
    figure, data = figures.trajectory({901: scene("base", "bike", 0), 1: scene("base", "bike", 1)}, steps, 0.05, "one")
    pictures, panels = (part.axes for part in figure.subfigs)
    assert [axis.get_xlabel() for axis in pictures] == ["t = 901", "t = 1"]
    drawn = [list(line.get_ydata()) for axis in panels for line in axis.lines if len(line.get_ydata())]
    assert drawn == [list(steps[c][::-1]) for c in steps.columns[1:]]
    assert [text.get_text() for text in panels[-1].get_legend().get_texts()] == ["clip_high", "clip_low"]
    assert all(axis.xaxis_inverted() for axis in panels) and data.equals(steps)


def test_a_figure_shows_itself_in_a_notebook():
    figure, _ = figures.reference_strip([scene("base", "bike", 0)])
    assert figure._repr_png_().startswith(b"\x89PNG")


# --- a real browser ------------------------------------------------------------------------------------------------


class Browser:
    """A small DevTools client: enough to open a file and to see what it asks for and complains about."""

    def __init__(self, profile):
        import websocket

        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0 "
            "--allow-pre-commit-input"  # else a click before the first frame is dropped
        )
        self.process = subprocess.Popen(
            [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port_file = profile / "DevToolsActivePort"
            port = self._wait(lambda: port_file.exists() and port_file.read_text().splitlines()[:1])[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                target = next(target for target in json.load(answer) if target["type"] == "page")
            self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        except BaseException:
            self.process.kill()
            raise
        self.n_calls, self.events = 0, []

    def _wait(self, ready, limit_s=60):
        end = time.monotonic() + limit_s
        while not (value := ready()):
            assert self.process.poll() is None and time.monotonic() < end, "the browser did not start"
            time.sleep(0.05)
        return value

    def call(self, method, **parameters):
        self.n_calls += 1
        self.socket.send(json.dumps({"id": self.n_calls, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != self.n_calls:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def wait_for(self, event):
        while not any(message["method"] == event for message in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)


# Rows of tables that are much higher than what stands in them, and captions that are cut off.
HOLLOW = """[...document.querySelectorAll('tr')].filter(e => e.checkVisibility()).flatMap(row => {
  const texts = [...row.cells].map(cell => { const r = document.createRange(); r.selectNodeContents(cell);
    return r.getBoundingClientRect().height; });
  const block = getComputedStyle(row).display === 'block';
  const needed = block ? texts.reduce((a, b) => a + b, 0) : Math.max(...texts);
  return row.getBoundingClientRect().height > needed + (block ? 80 : 40) ? [row.innerText] : []; })"""
CUT = """[...document.querySelectorAll('figcaption, caption, dd, dt')].filter(
  e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.innerText)"""


def _click(browser):
    """Click on the first picture, wherever it is shown now."""
    place = "document.images[0].getBoundingClientRect()"
    browser.evaluate("document.images[0].scrollIntoView({block: 'center'})")
    x, y = (
        browser.evaluate(f"{place}.{side} + {place}.{size} / 2") for side, size in (("x", "width"), ("y", "height"))
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_report_in_a_browser(report, tmp_path):
    pytest.importorskip("websocket", reason="websocket-client (part of Jupyter) is not installed")
    browser = Browser(tmp_path / "profile")
    try:
        for domain in ("Network", "Log", "Runtime", "Page"):
            browser.call(f"{domain}.enable")
        browser.call("Page.navigate", url=report.as_uri())
        browser.wait_for("Page.loadEventFired")
        widths = browser.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        assert len(widths) > 7 and min(widths) >= 64
        shown = "[...document.querySelectorAll('.zoom img')].filter(i => i.checkVisibility())"
        assert browser.evaluate(f"Math.min(...{shown}.map(i => i.getBoundingClientRect().width))") >= 96
        small = browser.evaluate("document.images[0].getBoundingClientRect().width")
        for scale in (4, 1):  # a click enlarges a picture, and another puts it back
            _click(browser)
            width = browser.evaluate("document.images[0].getBoundingClientRect().width")
            assert width >= 2 * small if scale > 1 else width == small
        for width in (360, 1280):  # a phone and a desktop: the page itself never scrolls sideways
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
            )
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(HOLLOW) == [], width
            assert browser.evaluate(CUT) == [], width
        browser.call("Emulation.setEmulatedMedia", media="print")
        browser.call("Emulation.setDeviceMetricsOverride", width=794, height=1123, deviceScaleFactor=1, mobile=False)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 794  # A4
        assert browser.evaluate(CUT) == []
        folded = "[...document.querySelectorAll('details > :not(summary)')].filter(e => !e.checkVisibility()).length"
        assert browser.evaluate(folded) == 0
        assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        requested = [
            e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in requested if not url.startswith("data:")] == [report.as_uri()]
        complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
        assert [event for event in browser.events if event["method"] in complaints] == []
    finally:
        browser.close()


@pytest.mark.parametrize("kind", report_figures.FIGURE_KINDS, ids=lambda kind: kind.word)
def test_another_figure_of_a_kinds_name_is_not_called_that_kind(kind):
    """Notebooks that join a run's folder name their figures as they like."""
    drawn, _ = figures.reference_strip([Image.new("RGB", (8, 8))])
    shown = report_figures.drawn(drawn, pd.DataFrame({"x": [1.0]}), f"figures/{kind.word}", "07_human_study")
    if kind.word == "references":  # photos say the same whatever their table holds
        assert shown.kind is kind
    else:
        assert shown.kind is report_figures.OTHER_KIND and shown.title == kind.word.replace("_", " ").capitalize()
