"""JupyterLab in a real browser: a server on loopback over a copy of the checkout, Chromium by its DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import websocket  # of jupyter-server's dependencies

from ibkit.runs import project_root

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27}
PATIENCE_S = 900.0  # a kernel that shares its cores with others takes minutes to run a notebook


def checkout(folder: Path) -> Path:
    """A copy of the package and the notebooks, whose runs do not meet those of the real one."""
    root = project_root()
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("ibkit", "notebooks", "outputs/reference"):
        shutil.copytree(root / name, folder / name, ignore=ignore)
    shutil.copy(root / "pyproject.toml", folder)
    return folder


def wait(until, what: str, seconds: float = PATIENCE_S):
    """The first true value of `until()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := until():
                return found
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not come within {seconds:g} s")


@contextlib.contextmanager
def started(command: list[str], log: Path, **options):
    """A program that runs inside, with all that it started."""
    with open(log, "wb") as output:
        program = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGTERM)
        try:
            program.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)


@contextlib.contextmanager
def lab(root: Path, scratch: Path):
    """A page of JupyterLab at the checkout `root`, in a browser that nobody sees."""
    place = {"PYTHONPATH": str(root), "JUPYTER_CONFIG_DIR": str(scratch / "config"), "HOME": str(scratch)}
    place |= {"JUPYTER_RUNTIME_DIR": str(scratch / "runtime"), "IPYTHONDIR": str(scratch / "ipython")}
    server = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
        "--LabServerApp.open_browser=False", "--ServerApp.disable_check_xsrf=True",
    ]  # fmt: skip
    browser = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={scratch / 'profile'}",
        "--window-size=1200,1600", "about:blank",
    ]  # fmt: skip
    with started(server, scratch / "server.log", cwd=root, env=os.environ | place):
        found = wait(lambda: list((scratch / "runtime").glob("jpserver-*.json")), "the server")[0]
        url = wait(lambda: json.loads(found.read_text() or "{}").get("url"), "its address")
        with started(browser, scratch / "browser.log"):
            port = wait(lambda: (scratch / "profile" / "DevToolsActivePort").read_text().split(), "the browser")[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as pages:
                (page,) = [one for one in json.load(pages) if one["type"] == "page"]
            socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=PATIENCE_S)
            try:
                yield Page(socket, url)
            finally:
                socket.close()


class Page:
    """What a person at the browser does and sees."""

    def __init__(self, socket: websocket.WebSocket, url: str):
        self.socket, self.url, self._n = socket, url, 0
        self.call("Page.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # a window that nobody sees has no focus else

    def call(self, method: str, **parameters):
        """A command of the DevTools protocol; what it returns."""
        self._n += 1
        self.socket.send(json.dumps({"id": self._n, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self._n:
            if answer.get("method") == "Page.javascriptDialogOpening":  # whether to leave what is not saved
                leave = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                self.socket.send(json.dumps(leave))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def js(self, code: str):
        """The value of an expression, awaited."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", str(result)))
        return result["result"].get("value")

    def wait(self, code: str, seconds: float = PATIENCE_S):
        """Wait until an expression is true."""

        def is_true():
            with contextlib.suppress(RuntimeError):
                return self.js(f"!!({code})")

        wait(is_true, code, seconds)

    def key(self, key: str, shift: bool = False) -> None:
        """Press a key and let it go."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {" ": "Space"}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=KEYS[key],
                modifiers=8 * shift, **({"text": text} if text and kind == "keyDown" else {}),
            )  # fmt: skip

    def click(self, element: str) -> None:
        """Click into the middle of an element, an expression, with the mouse."""
        self.js(f"({element}).scrollIntoView({{block: 'center'}})")
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """What the page looks like, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def open(self, path: str) -> None:
        """Open a notebook with a kernel of its own; what was typed into the one before is not saved."""
        self.call("Page.navigate", url=f"{self.url}lab/tree/{path}?reset")
        self.wait(
            f"(window.panel = [...jupyterapp.shell.widgets('main')].find(w => w.context?.path === {path!r}))"
            "?.sessionContext.session?.kernel?.status === 'idle'"
        )
        self.js("(jupyterapp.shell.activateById(panel.id), 0)")
        self.js("window.cells = () => panel.content.widgets.map(cell => cell.model), 0")

    def end_kernel(self) -> None:
        """Shut the notebook's kernel down, for its memory."""
        self.js("panel.sessionContext.shutdown().then(() => 0)")

    def restart_kernel(self) -> None:
        """Restart the notebook's kernel."""
        self.js("panel.sessionContext.session.kernel.restart().then(() => 0)")
        self.wait("panel.sessionContext.session.kernel.status === 'idle'")

    def run_all(self) -> None:
        """Run All, to the end or the first error."""
        self.js("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 0)")

    def stop_run_all(self, share: float) -> None:
        """Run All, and press the stop button when a share of the cells has run."""
        self.js("(window.ran = jupyterapp.commands.execute('notebook:run-all-cells'), 0)")
        self.wait(f"(done => done.filter(c => c.executionCount && c.executionState === 'idle').length "
                  f">= {share} * done.length)(cells().filter(c => c.type === 'code'))")  # fmt: skip
        self.js("jupyterapp.commands.execute('notebook:interrupt-kernel').then(() => window.ran).then(() => 0)")

    def run_cell(self, cell: int) -> None:
        """Run one cell."""
        self.show(cell)
        self.js("jupyterapp.commands.execute('notebook:run-cell').then(() => 0)")

    def cell(self, word: str) -> int:
        """The index of the first code cell with a word in it."""
        found = self.js(f"cells().findIndex(c => c.type === 'code' && c.sharedModel.getSource().includes({word!r}))")
        assert found >= 0, f"no cell has {word!r}"
        return found

    def show(self, cell: int) -> None:
        """Scroll to a cell."""
        self.js(f"(panel.content.activeCellIndex = {cell}, panel.content.scrollToItem({cell}).then(() => 0))")

    def type_into(self, cell: int, old: str, new: str) -> None:
        """Replace a text in a cell, with the keyboard in its editor."""
        source = self.js(f"cells()[{cell}].sharedModel.getSource()")
        assert source.count(old) == 1, f"{old!r} in:\n{source}"
        self.show(cell)
        self.click(f"panel.content.widgets[{cell}].node.querySelector('.cm-content')")
        self.wait(f"panel.content.widgets[{cell}].editor?.hasFocus() === true", 30)
        at = source.index(old)
        where = [f"editor.getPositionAt({offset})" for offset in (at, at + len(old))]
        self.js(f"(editor => (editor.setSelection({{start: {where[0]}, end: {where[1]}}}), 0))"
                f"(panel.content.widgets[{cell}].editor)")  # fmt: skip
        self.call("Input.insertText", text=new)
        self.wait(f"cells()[{cell}].sharedModel.getSource() === {json.dumps(source.replace(old, new))}", 10)

    def assign(self, cell: int, name: str, value) -> None:
        """Type a value in the place of a parameter's."""
        source = self.js(f"cells()[{cell}].sharedModel.getSource()")
        (line,) = [line for line in source.splitlines() if line.startswith(f"{name} = ")]
        self.type_into(cell, line, f"{name} = {value!r}")

    def outputs(self, cell: int) -> list[dict]:
        """The outputs of a cell, as nbformat has them."""
        return self.js(f"cells()[{cell}].outputs.toJSON()")

    def texts(self) -> str:
        """All plain text that cells have printed or shown, in order."""
        return self.js(
            "cells().filter(c => c.type === 'code').flatMap(c => c.outputs.toJSON()).map(o => "
            "[o.text, o.data?.['text/plain'], o.evalue].flat().filter(t => t).join('\\n')).join('\\n')"
        )

    def errors(self) -> list[dict]:
        """The errors that cells ended with."""
        return [o for o in self.js("cells().filter(c => c.type === 'code').flatMap(c => c.outputs.toJSON())")
                if o["output_type"] == "error"]  # fmt: skip
