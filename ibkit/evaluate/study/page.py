"""The rating page: the widgets over a `ratings.RatingSession`, for JupyterLab.

It holds buttons, pictures and texts only (no Output widget, no code in the browser). Tab and Shift+Tab move between the
buttons, Enter or the space bar presses the one in focus. After each press the focus goes to a button between the two
answers that does nothing: from there Shift+Tab leads to one answer and Tab to the other, so neither is nearer, and a
second Enter answers nothing. (A button that only gives up the focus leaves the browser's place at itself, and Tab then
reaches the other answer first.) The second half of a double click is ignored,
since it would answer an item that nobody has seen.

A page whose kernel is gone looks alive and answers nothing. So while it lives, it sends the sentence that says it is
dead again and again, and each time the browser waits anew before it shows it.
"""

import html
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
from PIL import Image

from ibkit.data.photos import png, read_rgb
from ibkit.errors import StudyError
from ibkit.evaluate.study.items import QUESTIONS
from ibkit.evaluate.study.ratings import RatingSession

DOUBLE_CLICK_SECONDS = 0.3  # an answer that comes sooner was meant for the item before
PULSE_S = 4.0  # between two signs of life; the browser waits for three
PICTURE_PX = 256  # width of a picture on the page; small ones are enlarged by whole pixels


class RatingPage:
    """Instruction, picture or pair with the reference photos (`references`, by subject), two answers, which the session
    records, undo, progress.

    Attributes:
        box: the widget to display.
        start, first, second, undo: its buttons.
        rest: the button between the answers, where the focus rests.
    """

    newest: "weakref.ref[RatingPage] | None" = None  # the only one of a kernel that lives

    def __init__(self, session: RatingSession, references: Mapping[str, Sequence[Image.Image]]):
        self.session, self.references = session, references
        self._instructed = ""  # the question whose instruction was read
        self.headline, self.message, self.dead = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.photos, self.pictures = widgets.HBox(), widgets.HBox()
        self.progress = widgets.IntProgress(max=len(session.tasks), layout=widgets.Layout(width="320px"))
        self.count = widgets.Label()
        self.start, self.first, self.second = widgets.Button(description="Start"), widgets.Button(), widgets.Button()
        self.undo = widgets.Button(description="Undo", tooltip="Take the last answer back", icon="undo")
        self.rest = widgets.Button(
            description="·", tooltip="The keyboard rests here: Shift+Tab, or Tab, then Enter, to answer",
            layout=widgets.Layout(width="2.5em"),
        )  # fmt: skip
        self.start.on_click(lambda _: self._begin())
        self.first.on_click(lambda _: self._answer(0))
        self.second.on_click(lambda _: self._answer(1))
        self.undo.on_click(lambda _: self._do(session.undo))
        self.answers = widgets.HBox([self.first, self.rest, self.second, self.undo])
        foot = widgets.HBox([self.progress, self.count])
        self.box = widgets.VBox(
            [self.dead, self.headline, self.photos, self.pictures, self.start, self.answers, foot, self.message]
        )
        self._show()
        # After what a press does: a hidden button cannot take the focus.
        for button in (self.start, self.first, self.second, self.undo, self.rest):
            button.on_click(lambda _: self.rest.focus())
        RatingPage.newest = weakref.ref(self)
        threading.Thread(target=_pulse, args=(RatingPage.newest,), daemon=True).start()

    def _begin(self) -> None:
        if self.session.current:
            self._instructed = self.session.current.question
        self.session.restart_clock()
        self._show()

    def _answer(self, choice: int) -> None:
        if time.monotonic() - self._shown_at >= DOUBLE_CLICK_SECONDS:
            self._do(lambda: self.session.answer(choice))

    def _do(self, act: Callable[[], None]) -> None:
        """Act and show what is next, or else the error: one inside a click would go unseen to a log."""
        try:
            act()
        except StudyError as error:
            self.message.value = f"<b>{html.escape(str(error))}</b>"
        else:
            self.message.value = ""
            self._show()

    def _show(self) -> None:
        task, n = self.session.current, len(self.session.tasks)
        self.progress.value, self.count.value = self.session.n_done, f"{self.session.n_done} of {n}"
        asking = task is not None and task.question == self._instructed
        shown = {self.start: task is not None and not asking} | dict.fromkeys(
            (self.first, self.rest, self.second), asking
        )
        for button, visible in shown.items():
            button.layout.display = None if visible else "none"
        photos: list[widgets.Widget] = []
        pictures: list[widgets.Widget] = []
        if task is None:
            self.headline.value = f"<h3>Done. Thank you, {html.escape(self.session.rater)}.</h3>"
            self.headline.value += (
                f"<p>Your answers are in <code>{html.escape(str(self.session.path))}</code>. Next: name that file, and "
                "those of other raters, in <code>ratings</code> of the parameters cell, and run the notebook again.</p>"
            )
        elif not asking:
            part, asked = list(QUESTIONS).index(task.question) + 1, QUESTIONS[task.question]
            self.headline.value = (
                f"<h3>Part {part} of {len(QUESTIONS)}: {html.escape(asked.ask)}</h3><p>{html.escape(asked.guide)}</p>"
                "<p>Answer every item, by your first impression; a guess is an answer too. Each click is saved at "
                "once: you can stop at any moment and go on later. Keyboard: Tab or Shift+Tab to an answer, Enter to "
                "press it.</p>"
            )
        else:
            asked = QUESTIONS[task.question]
            text = f"<p>“{html.escape(task.text)}”</p>" if task.question != "subject" else ""
            self.headline.value = f"<h3>{html.escape(asked.ask)}</h3>{text}"
            self.first.description, self.second.description = asked.labels
            pictures = [_image(read_rgb(path), PICTURE_PX) for path in task.images]
            if task.question != "text":
                photos = [_image(photo, PICTURE_PX // 2) for photo in self.references[task.subject]]
                photos.insert(0, widgets.Label("Reference photos:"))
        self.photos.children, self.pictures.children = photos, pictures
        self._shown_at = time.monotonic()


def _pulse(page: "weakref.ref[RatingPage]") -> None:
    """Send signs of life until the page is finished, or another one has taken its place."""
    for beat in itertools.count():
        living = page()
        if living is None or RatingPage.newest is not page or living.session.current is None:
            break
        living.dead.value = (  # the browser starts an animation anew where its name changes
            f"<style>@keyframes ibkit-{beat} {{to {{max-height: 10em}}}}</style><div style='max-height: 0; overflow: "
            f"hidden; animation: ibkit-{beat} 0s {3 * PULSE_S}s forwards'><b>This page is dead: its kernel was "
            "restarted or shut down, or a newer page has taken its place. Run the notebook to this cell again: all "
            "answers until here are saved, and it goes on behind them.</b></div>"
        )
        del living
        time.sleep(PULSE_S)


def _image(picture: Image.Image, width_px: int) -> widgets.Image:
    scale = width_px // picture.width
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    # png: no file name and no metadata that tells the arm
    return widgets.Image(value=png(picture), format="png", width=width_px)
