"""Drive a real JupyterLab in a real Chromium: the kit behind every test in this folder.

A test opens a notebook reduced to its cells tagged ``parameters``, ``setup`` and ``widget``, works
the widget as a learner would, and compares what the page shows with the package itself::

    def test_slider_moves_the_curve(lab):
        with lab.open("04_lora") as nb:                      # runs the cells, fails on any error
            nb.by_label("Rank").focus()                      # mouse and keyboard as in playwright
            nb.page.keyboard.press("ArrowRight")
            nb.eventually(lambda: nb.text(".pllm-rank") == "rank 5")
            (trace,) = nb.figure()["data"]                   # what the browser draws, decoded
            assert trace["y"] == pytest.approx(expected(rank=5))
            nb.check_accessible()                            # axe: nothing serious or critical
            nb.screenshot("04_lora")                         # artefacts/browser/04_lora.png

Leaving the block checks that the browser logged no error and that no request left this machine;
``nb.page`` is the playwright page for everything else. ``lab.open`` also takes a notebook built
in the test (see :func:`notebook`). The fixture ``lab`` (``conftest.py``) starts one JupyterLab on
the loopback address for the whole test run, with its own configuration folders and a token, and
skips with a reason where no Chromium is installed; ``PLLM_CHROMIUM`` names another one, and
``PLLM_NOTEBOOKS`` another folder of notebooks.
"""

from __future__ import annotations

import ast
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page

__all__ = ["Lab", "LabPage", "notebook", "reduce_notebook"]

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = Path(os.environ.get("PLLM_NOTEBOOKS") or ROOT / "notebooks")
ARTEFACTS = ROOT / "artefacts" / "browser"
TAGS = ("parameters", "setup", "widget")

SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False,
        "doNotDisturbMode": True,
        "fetchNews": "false",
    },
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none", "recordTiming": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}

# Reads what plotly really draws; typed arrays arrive as base64 or as views.
FIGURE_JS = """
el => {
  const types = {f8: Float64Array, f4: Float32Array, i1: Int8Array, i2: Int16Array, i4: Int32Array,
                 u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, u1c: Uint8ClampedArray};
  const rows = (flat, shape) => shape.length < 2 ? flat
    : Array.from({length: shape[0]}, (_, i) => {
        const size = flat.length / shape[0];
        return rows(flat.slice(i * size, (i + 1) * size), shape.slice(1));
      });
  const plain = v => {
    if (v === null || v === undefined || typeof v === 'function') return null;
    if (ArrayBuffer.isView(v)) return Array.from(v);
    if (Array.isArray(v)) return v.map(plain);
    if (typeof v !== 'object') return v;
    if ('bdata' in v && 'dtype' in v) {
      const bytes = typeof v.bdata === 'string' ? Uint8Array.from(atob(v.bdata), c => c.charCodeAt(0))
                                                : new Uint8Array(v.bdata.buffer || v.bdata);
      const flat = Array.from(new types[v.dtype](bytes.buffer));
      const shape = v.shape ? String(v.shape).split(',').map(Number) : [flat.length];
      return rows(flat, shape);
    }
    if ('_inputArray' in v) return plain(v._inputArray);
    return Object.fromEntries(Object.entries(v).filter(([k]) => !k.startsWith('_')).map(([k, x]) => [k, plain(x)]));
  };
  return {data: plain(el.data), layout: plain(el.layout)};
}
"""


def notebook(**cells: str) -> nbformat.NotebookNode:
    """A notebook with one code cell per keyword, tagged with it: ``notebook(setup="…", widget="…")``."""
    nb = nbformat.v4.new_notebook()
    for tag, source in cells.items():
        nb.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag]}))
    return nb


def reduce_notebook(nb: nbformat.NotebookNode, parameters: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """Keep the cells that a widget needs, without outputs; ``parameters`` follow their cell."""
    small = nbformat.v4.new_notebook(metadata=nb.metadata)
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or not set(tags) & set(TAGS):
            continue
        small.cells.append(nbformat.v4.new_code_cell(cell.source, metadata={"tags": list(tags)}))
        if "parameters" in tags and parameters:
            known = _assigned(cell.source)
            unknown = set(parameters) - known
            if unknown:
                raise ValueError(f"not in the parameters cell: {sorted(unknown)}; it has {sorted(known)}")
            lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
            small.cells.append(nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]}))
    if not any("widget" in c.metadata.tags for c in small.cells):
        raise ValueError("no cell tagged 'widget'")
    return small


def _assigned(source: str) -> set[str]:
    """Names that a cell assigns at its top level."""
    targets: list[ast.expr] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return {t.id for t in targets if isinstance(t, ast.Name)}


def quick_parameters(name: str) -> dict[str, Any]:
    """What the quick profile in ``notebooks/profiles.yaml`` sets for a notebook, where it exists."""
    path = NOTEBOOKS / "profiles.yaml"
    profiles = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return dict(((profiles or {}).get(name) or {}).get("quick") or {})


class Lab:
    """A JupyterLab on 127.0.0.1 and a Chromium; use it as a context manager."""

    def __init__(self, folder: Path, browser: Browser):
        self.folder = Path(folder)
        self.root = self.folder / "notebooks"
        self.token = secrets.token_hex(16)
        self._browser = browser
        self._server: subprocess.Popen | None = None
        self._count = 0
        self.pages: list[LabPage] = []

    # -- life ---------------------------------------------------------------------------------
    def __enter__(self) -> Lab:
        self._start_server()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_server()

    def _start_server(self) -> None:
        names = ("config", "data", "runtime", "settings", "workspaces", "ipython", "app")
        folders = {name: self.folder / name for name in names}
        for path in (*folders.values(), self.root):
            path.mkdir(parents=True, exist_ok=True)
        # ours win over the installation's, so that the user's own configuration plays no part
        labconfig = folders["config"] / "labconfig"
        labconfig.mkdir(exist_ok=True)
        (labconfig / "default_setting_overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        env = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(folders["config"]),
            "JUPYTER_DATA_DIR": str(folders["data"]),
            "JUPYTER_RUNTIME_DIR": str(folders["runtime"]),
            "JUPYTERLAB_SETTINGS_DIR": str(folders["settings"]),
            "JUPYTERLAB_WORKSPACES_DIR": str(folders["workspaces"]),
            "IPYTHONDIR": str(folders["ipython"]),
            "PYTHONUNBUFFERED": "1",
        }
        self._log_path = self.folder / "jupyterlab.log"
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.root,
            "ServerApp.open_browser": False,
            "ServerApp.terminals_enabled": False,
            "ServerApp.allow_root": True,
            "IdentityProvider.token": self.token,
            "LabApp.expose_app_in_browser": True,
            "LabApp.news_url": None,
            "LabApp.extension_manager": "readonly",
            # should a test run be killed, the server goes by itself
            "ServerApp.shutdown_no_activity_timeout": 1800,
            "MappingKernelManager.cull_idle_timeout": 1800,
            "MappingKernelManager.cull_connected": True,
        }
        command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
        with open(self._log_path, "w", encoding="utf-8") as log:
            self._server = subprocess.Popen(
                command, env=env, cwd=self.root, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while True:
            if self._server.poll() is not None or time.monotonic() > deadline:
                self._stop_server()
                raise RuntimeError(f"JupyterLab did not start:\n{self.log()[-3000:]}")
            try:
                self.api("status")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)

    def _stop_server(self) -> None:
        if self._server is None or self._server.poll() is not None:
            return
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(15)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def api(self, path: str, method: str = "GET") -> Any:
        """Call the server's REST interface, for instance ``api("sessions")``."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}", headers={"Authorization": f"token {self.token}"}, method=method
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def log(self) -> str:
        """What the server (and, through it, every kernel) has written so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    # -- notebooks ----------------------------------------------------------------------------
    def open(
        self,
        source: str | Path | nbformat.NotebookNode,
        *,
        parameters: Mapping[str, Any] | None = None,
        reduce: bool = True,
        run: bool = True,
        dark: bool = False,
        width: int = 1280,
        height: int = 1000,
        timeout: float = 180,
        same_file: str = "",
    ) -> LabPage:
        """Open a notebook in a fresh page and run its cells.

        Parameters
        ----------
        source : the name of a notebook in ``notebooks/`` (``"01_buffer_metrics"``), a path, or a notebook.
        parameters : values set after the parameters cell, on top of the quick profile.
        reduce : keep only the cells tagged ``parameters``, ``setup`` and ``widget``.
        run : run all cells and wait for them; ``False`` only opens the notebook.
        dark : JupyterLab's dark theme.
        width, height : size of the browser window in CSS pixels.
        timeout : seconds until the cells must have run.
        same_file : open the file of an earlier page (its ``name``) as it was saved, with its trust.

        Raises ``FileNotFoundError`` where the notebook is missing, ``AssertionError`` where a cell fails.
        """
        if isinstance(source, nbformat.NotebookNode):
            nb, name, quick = source, "built", {}
        else:
            path = Path(source)
            path = path if path.suffix else NOTEBOOKS / f"{source}.ipynb"
            nb, name, quick = nbformat.read(path, as_version=4), path.stem, quick_parameters(path.stem)
        if reduce:
            nb = reduce_notebook(nb, {**quick, **(parameters or {})})
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        self._count += 1
        target = self.root / (same_file or f"{name}-{self._count}.ipynb")
        if not same_file:
            nbformat.write(nb, target)
        context = self._browser.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce", locale="en-GB"
        )
        page = LabPage(self, context.new_page(), target.name)
        self.pages.append(page)
        try:
            page._open(dark)
            if run:
                page.run(timeout)
        except BaseException:
            page.close()
            raise
        return page


class LabPage:
    """One notebook in one browser page; close it, or use it in a ``with`` block (which also checks it)."""

    def __init__(self, lab: Lab, page: Page, name: str):
        self.lab, self.page, self.name = lab, page, name
        self.console_errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.console_errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.console_errors.append(str(e)))
        page.on("websocket", lambda ws: self.requests.append(ws.url))
        page.context.on("request", lambda r: self.requests.append(r.url))
        page.set_default_timeout(20_000)

    def __enter__(self) -> LabPage:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check_clean()
            else:
                self.screenshot_of_failure(self.name.removesuffix(".ipynb"))
        finally:
            self.close()

    def close(self) -> None:
        """Close the page and shut the notebook's kernel down."""
        self.lab.pages.remove(self)
        self.page.context.close()
        for session in self.lab.api("sessions"):
            if session["path"] == self.name:
                self.lab.api(f"sessions/{session['id']}", "DELETE")

    # -- cells --------------------------------------------------------------------------------
    def _open(self, dark: bool) -> None:
        self.page.goto(f"{self.lab.url}/lab/tree/{self.name}?reset&token={self.lab.token}")
        self._ready()
        self.command("apputils:change-theme", theme="JupyterLab Dark" if dark else "JupyterLab Light")
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")

    def reload(self) -> None:
        """Reload the page, as a learner does; the kernel goes on."""
        self.page.reload()
        self._ready()

    def _ready(self) -> None:
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=60_000,
        )

    def command(self, name: str, **arguments: Any) -> None:
        """Execute a JupyterLab command by its id and wait until it is done."""
        self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a).then(() => null)", [name, arguments])

    def run(self, timeout: float = 180) -> None:
        """Run all cells and wait; ``AssertionError`` with the traceback where a cell failed."""
        self.page.evaluate(
            "() => { window.pllmRan = false;"
            " window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => window.pllmRan = true); }"
        )
        self.page.wait_for_function("() => window.pllmRan", timeout=timeout * 1000)
        failures = [
            f"{o['ename']}: {o['evalue']}\n" + "\n".join(o["traceback"][-3:])
            for cell in self.saved_outputs()
            for o in cell
            if o["output_type"] == "error"
        ]
        assert not failures, "a cell failed:\n" + "\n".join(failures)

    def saved_outputs(self) -> list[list[dict[str, Any]]]:
        """Outputs of every cell as they would be saved (nbformat)."""
        return self.page.evaluate(
            "() => Array.from(window.jupyterapp.shell.currentWidget.content.model.cells)"
            ".map(c => c.toJSON().outputs || [])"
        )

    def save(self) -> nbformat.NotebookNode:
        """Save the notebook as the learner would, and read the file back."""
        self.command("docmanager:save")
        return nbformat.read(self.lab.root / self.name, as_version=4)

    # -- looking ------------------------------------------------------------------------------
    def output(self, tag: str = "widget") -> Locator:
        """The output area of the cell with this tag; of all of them where several have it."""
        found = self.page.evaluate(
            """tag => {
              const notebook = window.jupyterapp.shell.currentWidget.content;
              const areas = notebook.widgets.filter(c => (c.model.getMetadata('tags') || []).includes(tag))
                .map(c => c.node.querySelector('.jp-Cell-outputArea')).filter(Boolean);
              areas.forEach(a => a.setAttribute('data-kit', tag));
              return areas.length;
            }""",
            tag,
        )
        assert found, f"no cell tagged {tag!r}"
        return self.page.locator(f".jp-Cell-outputArea[data-kit='{tag}']")

    def by_label(self, label: str, tag: str = "widget") -> Locator:
        """The control with exactly this accessible label."""
        return self.output(tag).get_by_label(label, exact=True)

    def button(self, name: str, tag: str = "widget") -> Locator:
        """The button with exactly this accessible name."""
        return self.output(tag).get_by_role("button", name=name, exact=True)

    def text(self, selector: str, tag: str = "widget") -> str:
        """Visible text of the first match in the output area, white space collapsed."""
        return " ".join(self.output(tag).locator(selector).first.inner_text().split())

    def figure(self, index: int = 0, tag: str = "widget") -> dict[str, Any]:
        """``{"data": […], "layout": {…}}`` of a plotly figure as the page draws it, arrays as lists."""
        plots = self.output(tag).locator(".js-plotly-plot")
        plots.nth(index).wait_for(state="attached")
        return plots.nth(index).evaluate(FIGURE_JS)

    def eventually(self, check: Callable[[], Any], timeout: float = 30) -> None:
        """Wait until ``check()`` neither raises ``AssertionError`` nor returns ``False``."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                if check() is not False:
                    return
                problem = "the condition stayed false"
            except AssertionError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:g} s: {problem}")
            self.page.wait_for_timeout(100)

    # -- judging ------------------------------------------------------------------------------
    def foreign_requests(self) -> list[str]:
        """Addresses off this machine that the page has asked for."""
        local = {"127.0.0.1", "localhost", "::1"}
        return [
            u for u in self.requests if urlsplit(u).scheme not in ("data", "blob") and urlsplit(u).hostname not in local
        ]

    def check_clean(self) -> None:
        """No error in the browser's console, no request off this machine."""
        assert not self.console_errors, "the browser logged errors:\n" + "\n".join(self.console_errors)
        assert not self.foreign_requests(), f"requests left this machine: {self.foreign_requests()}"

    def check_accessible(self, tag: str = "widget", levels: tuple[str, ...] = ("serious", "critical")) -> None:
        """axe-core finds nothing serious or critical in the cell's output area."""
        self.output(tag).first.wait_for()
        # JupyterLab's body has height 0, so axe takes all of its text for clipped and skips contrast
        self.page.evaluate("() => { document.body.style.height = '100vh'; }")
        try:
            response = Axe().run(self.page, context=f"[data-kit={tag}]").response
        finally:
            self.page.evaluate("() => { document.body.style.height = ''; }")
        found = [
            f"{v['id']} ({v['impact']}): {v['help']}\n  " + "\n  ".join(n["html"][:300] for n in v["nodes"])
            for v in response["violations"]
            if v["impact"] in levels
        ]
        assert not found, "axe found:\n" + "\n".join(found)

    def screenshot(self, name: str, scope: Locator | str | None = None) -> Path:
        """Keep a picture as ``artefacts/browser/NAME.png``.

        Of the widget (of the output area where there is none), or of ``scope``: a locator, a selector, or ``"page"``.
        """
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        if scope == "page":
            self.page.screenshot(path=path)
        else:
            target = self.page.locator(scope) if isinstance(scope, str) else scope
            if target is None:
                widget = self.output().locator(".pllm-explorable")
                target = widget if widget.count() else self.output()
            size = self.page.viewport_size or {"width": 1280, "height": 1000}
            box = target.first.bounding_box() or {"height": 0}
            # an element taller than the window would lie partly below the notebook's own scroll area
            self.page.set_viewport_size({**size, "height": max(size["height"], int(box["height"]) + 300)})
            self.page.wait_for_timeout(300)
            target.first.screenshot(path=path)
            self.page.set_viewport_size(size)
        return path

    def screenshot_of_failure(self, name: str) -> None:
        """Keep a picture of the window as ``artefacts/browser/failed-NAME.png``; never fails itself."""
        with suppress(Exception):  # the test's own failure is the one to read
            self.screenshot(f"failed-{name}", scope="page")
