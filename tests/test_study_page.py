"""The page for raters without Jupyter: what it holds, thirty items in a browser, and files that were tampered with."""

import json
import re

import pytest

from ibkit.errors import StudyError
from ibkit.evaluate.study.export import export_page
from ibkit.evaluate.study.items import QUESTIONS, study_name
from ibkit.evaluate.study.ratings import merge_ratings
from tests.test_report import CHROMIUM, Browser
from tests.test_study import evaluated, items  # noqa: F401  (fixtures)


@pytest.fixture
def thirty(items):  # noqa: F811
    return items.groupby("question").head(10).reset_index(drop=True)


@pytest.fixture
def page(thirty, evaluated, tmp_path):  # noqa: F811
    assert export_page(thirty, {evaluated.subject.name: evaluated.references}, tmp_path / "study.html") == 30
    return tmp_path / "study.html"


def test_the_page_is_blind_and_asks_for_nothing_outside(page, thirty):
    text = page.read_text(encoding="utf-8")
    study = json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.DOTALL)[1])
    assert study["name"] == study_name(thirty) and len(study["items"]) == 30
    assert set(study["questions"]) == set(QUESTIONS) and study["questions"]["text"]["guide"] in text
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    for word in ("dreambooth", "ddpo", '"base"', ".png", "http:", "https:", "images/", "DreamBooth"):
        assert word not in outside, word
    # Items stand in the order of their hashes, and pictures in that of their first item: no order of arms.
    assert [one["item"] for one in study["items"]] == sorted(thirty["item"])
    # Each picture once: 10 + 10 of single ones overlap with those of pairs.
    asked = {place for column in ("image_a", "image_b") for place in thirty[column] if place}
    assert len(study["pictures"]) == len(asked) + 3


def test_text_from_a_run_cannot_leave_its_place(thirty, evaluated, tmp_path):  # noqa: F811
    odd = thirty.assign(text='</script><script>alert("x")</script>')
    export_page(odd, {evaluated.subject.name: evaluated.references}, tmp_path / "odd.html")
    assert "<script>alert" not in (tmp_path / "odd.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_thirty_items_by_mouse_and_keyboard(page, thirty, tmp_path):
    pytest.importorskip("websocket", reason="websocket-client (part of Jupyter) is not installed")
    browser = Browser(tmp_path / "profile")

    def press(key):
        for kind in ("rawKeyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(id):
        place = f"document.getElementById({id!r}).getBoundingClientRect()"
        x, y = (browser.evaluate(f"{place}.{a} + {place}.{b} / 2") for a, b in (("x", "width"), ("y", "height")))
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def open_page(name="Zoë  L."):
        browser.events.clear()
        browser.call("Page.navigate", url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        browser.evaluate("of('rater').focus(); 0")
        browser.call("Input.insertText", text=name)
        # The field that had the keyboard lets go of it at once, or the next key were lost on it.
        assert browser.evaluate("of('who').requestSubmit(); document.activeElement === document.body")

    def current():
        return browser.evaluate(
            "(t => t ? JSON.stringify(t) : null)(tasks.find(one => !answered().includes(one.item)))"
        )

    try:
        for domain in ("Network", "Log", "Runtime", "Page"):
            browser.call(f"{domain}.enable")
        browser.call("Emulation.setDeviceMetricsOverride", width=1000, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
        open_page("Ann")
        top = "of('first').getBoundingClientRect().y"
        for _ in thirty.index:  # the buttons do not jump when the pictures have come
            browser.evaluate("of('part').hidden || of('start').click(); 0")
            assert browser.evaluate(f"shownAt -= 1000; answer(0); {top}") == browser.evaluate(top)
        open_page()
        given = {}
        for n in range(30):
            if n == 12:  # closed and opened again: it goes on where it stopped
                open_page()
                assert browser.evaluate("of('count').textContent") == "12 of 30"
            task = json.loads(current())
            if browser.evaluate("!of('part').hidden"):
                assert QUESTIONS[task["question"]].guide in browser.evaluate("document.body.innerText")
                press("Enter") if n else click("start")
            if n == 3:  # the second half of a double click answers nothing
                press("ArrowLeft")
                assert json.loads(current()) == task
            browser.evaluate("shownAt -= 1000")
            choice = int(task["item"], 16) % 2
            if n == 5:  # the wrong key, and back
                press("ArrowRight" if choice == 0 else "ArrowLeft")
                assert json.loads(current()) != task
                press("Backspace")
                assert json.loads(current()) == task
                browser.evaluate("shownAt -= 1000")
            if n % 2:
                press(("ArrowLeft", "ArrowRight")[choice])
            else:
                click(("first", "second")[choice])
            given[task["item"]] = task["choices"][choice]
        assert current() is None and browser.evaluate("of('done').checkVisibility()")
        assert browser.evaluate("of('progress').value") == 30
        click("save")
        saved = tmp_path / "saved" / "zoë-l.jsonl"
        browser._wait(lambda: saved.exists() and saved.read_text().endswith("\n"))
        complaints = [event for event in browser.events if event["method"] == "Log.entryAdded"]
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert not complaints and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
        # A saved file goes on elsewhere; one of another study is refused.
        assert browser.evaluate(f"read({saved.read_text()!r}).length") == 32
        other = saved.read_text().replace(study_name(thirty), "another")
        assert browser.evaluate(f"read({other!r})") == "This file is of another study."
    finally:
        browser.close()
    votes, raters, problems = merge_ratings([saved], thirty)
    assert problems == [] and votes.set_index("item")["answer"].to_dict() == given
    assert raters.loc[0, "rater"] == "Zoë L." and raters.loc[0, "votes"] == 30
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert sum(line["answer"] == "undo" for line in lines) == 1 and len(lines) == 32


# ---------------------------------------------------------------------------------------------------- hostile files


def line_of(row, study, **other):
    shown, answer = ("ab", "a") if row["question"] == "preference" else ("a", "yes")
    line = {"schema": 1, "study": study, "rater": "Ann", "question": row["question"], "item": row["item"]}
    line |= {"answer": answer, "shown": shown, "time": "2026-01-01T00:00:00.000+00:00", "seconds": 2.0}
    return json.dumps(line | other) + "\n"


def test_a_hostile_file_changes_no_other_vote_and_no_file(thirty, tmp_path):
    study, rows = study_name(thirty), thirty.to_dict("records")
    good, bad = tmp_path / "ann.jsonl", tmp_path / "eve.jsonl"
    good.write_text("".join(line_of(row, study) for row in rows[:5]))
    alone, _, _ = merge_ratings([good], thirty)
    hostile = [
        "[" * 100_000 + "\n",
        line_of(rows[0], study, rater="<script>alert(1)</script>"),
        line_of(rows[0], study, rater="=HYPERLINK(1)"),
        line_of(rows[0], study, rater="../../../etc/cron"),
        line_of(rows[0], study, rater="\ud800"),
        line_of(rows[0], study, rater="e" * 5000),
        line_of(rows[0], study, rater="Eve", seconds=float("nan")),
        line_of(rows[0], study, rater="Eve", seconds=-5),
        line_of(rows[0], study, rater="Eve", seconds=10**400),
        line_of(rows[0], study, rater="Eve", shown="ba"),
        line_of(rows[0], study, rater="Eve", answer="__proto__"),
        line_of(rows[0], study, rater="Eve", schema=2),
        "\x00\x00\n",
        "null\n",
    ]
    bad.write_text("".join(hostile) + line_of(rows[7], study, rater="Eve"), encoding="utf-8", errors="surrogatepass")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    votes, raters, problems = merge_ratings([good, bad], thirty)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(problems) == len(hostile) and all("eve.jsonl, line" in told for told in problems)
    assert votes[votes["rater"] == "Ann"].reset_index(drop=True).equals(alone)
    assert votes[votes["rater"] == "Eve"]["item"].tolist() == [rows[7]["item"]]
    votes.to_csv(tmp_path / "votes.csv", index=False)  # nothing in it that cannot be written


def test_another_raters_name_or_study_is_refused(thirty, tmp_path):
    """Somebody who signs as another rater cannot replace those answers."""
    study, rows = study_name(thirty), thirty.to_dict("records")
    (tmp_path / "ann.jsonl").write_text(line_of(rows[0], study))
    (tmp_path / "eve.jsonl").write_text(line_of(rows[0], study, answer="no") + line_of(rows[1], study))
    with pytest.raises(StudyError, match="both by 'Ann'"):
        merge_ratings([tmp_path / "ann.jsonl", tmp_path / "eve.jsonl"], thirty)
    (tmp_path / "odd.jsonl").write_text(line_of(rows[0] | {"item": "unknown"}, study, rater="Odd"))
    with pytest.raises(StudyError, match="not in this study"):
        merge_ratings([tmp_path / "odd.jsonl"], thirty)
