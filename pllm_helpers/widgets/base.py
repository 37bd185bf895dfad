"""What every widget of the series shares: controls, busy state, errors in place, a static fallback.

A widget is a thin view: it reads its controls, calls the rooms, and draws what they return.

>>> class Doubler(Explorable):
...     title = "Twice a number"
...     help = "Type a number."
...     def build(self):
...         self.number = ipywidgets.BoundedIntText(3, 0, 9, description="Number")
...         self.answer = Region()
...         return {"number": self.number}, [self.answer]
...     def compute(self, number):
...         return 2 * number
...     def draw(self, result):
...         self.answer.html = f"<p>Twice is {result}.</p>"
...     def summary(self, result):
...         return f"<p>Twice 3 is {result}.</p>"
"""

from __future__ import annotations

import contextvars
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets

from ..figures import PLOTLY_MIME, figure_bundle
from ..runtime import InputError
from .controls import Region, esc

__all__ = ["Explorable", "Latest", "from_page"]

FALLBACK_NOTE = "This is the widget's starting state, kept for pages without a running kernel. Run the cell to use it."


def from_page() -> bool:
    """Whether the code running now was started by somebody's hand in a browser page.

    A widget event arrives as a ``comm_msg``. Everything else (a cell, a batch run, a test) is
    code, and code must see exceptions.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    return (kernel.get_parent() or {}).get("header", {}).get("msg_type") == "comm_msg"


Job = Callable[[Callable[[], bool]], Any]


class Latest:
    """Runs jobs one at a time in a thread of its own; of those that may be overtaken, only the newest.

    The kernel stays free for events meanwhile. A job gets ``stale()``, which says whether a newer
    one waits: its result is then not worth drawing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest: tuple[float, Job, contextvars.Context] | None = None
        self._queue: deque[tuple[Job, contextvars.Context]] = deque()
        self._running = False

    def submit(self, job: Job, delay: float | int = 0, *, keep: bool = False) -> None:
        """Run ``job(stale)`` once ``delay`` seconds have passed without another submission.

        With ``keep=True`` at the next chance, in order, and never dropped: for what a person did
        on purpose, such as pressing a button.
        """
        context = contextvars.copy_context()  # carries the message that caused this to its replies
        with self._changed:
            if keep:
                self._queue.append((job, context))
            else:
                self._newest = (time.monotonic() + delay, job, context)
            self._changed.notify_all()
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="pllm-widget", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        with self._changed:
            return self._running

    @property
    def waiting(self) -> bool:
        """Whether a job waits."""
        with self._changed:
            return bool(self._newest or self._queue)

    def wait(self, timeout: float | int = 60) -> bool:
        """Block until nothing runs or waits; ``False`` after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _work(self) -> None:
        while (found := self._next()) is not None:
            job, context = found
            context.run(job, lambda: self.waiting)

    def _next(self) -> tuple[Job, contextvars.Context] | None:
        with self._changed:
            while self._newest and not self._queue and (pause := self._newest[0] - time.monotonic()) > 0:
                self._changed.wait(pause)
            if self._queue:
                return self._queue.popleft()
            if self._newest:
                (_, job, context), self._newest = self._newest, None
                return job, context
            self._running = False
            self._changed.notify_all()
            return None


class Explorable:
    """A widget with named controls, a computation behind it, and manners.

    A subclass sets ``title`` and ``help`` and defines :meth:`build`, :meth:`compute`,
    :meth:`draw` and :meth:`summary`; see the module's example. It then gets:

    * the default state computed at once, in the cell: what fails there fails the cell;
    * events from the page computed in the background, the newest wins, stale results dropped;
    * ``InputError`` shown in place as a message, other exceptions with their traceback, kept in
      :attr:`errors`; the last good result stays, dimmed;
    * the same change made by code (:meth:`set`, or ``widget.controls["x"].value = …``) computed
      before the statement ends, and raising, so that a batch run fails;
    * a summary of the starting state in the notebook, for exports and for pages without a kernel.

    It displays itself; :attr:`view` is the ipywidgets box, for use inside another one.
    """

    title = ""
    help = ""
    #: seconds without another change before a computation starts
    delay = 0.25
    #: whether a change of a control computes at once; where not, a subclass acts on a button
    live = True

    def __init__(self, **options: Any):
        self.errors: list[BaseException] = []
        self.runs = 0
        self.result: Any = None
        self._latest = Latest()
        self._drawing = threading.RLock()
        self._hold = False
        for name, value in options.items():
            setattr(self, name, value)
        self.controls: Mapping[str, ipywidgets.Widget]
        self.controls, body = self.build()
        head = f'<div class="pllm-title" role="heading" aria-level="3">{esc(self.title)}</div>'
        hint = f'<p class="pllm-help">{esc(self.help)}</p>' if self.help else ""
        self._head = Region(html=head + hint, label=self.title, frame=True)
        self._busy = Region(kind="pllm-busy", html='<span aria-hidden="true">Working…</span>')
        self._error = Region(role="alert")
        self._status = Region(role="status", kind="pllm-only-read pllm-status")
        shown = [w for w in self.controls.values() if w not in body]
        self._controls = ipywidgets.Box(shown).add_class("pllm-controls")
        self._body = ipywidgets.VBox(list(body)).add_class("pllm-body")
        parts = [self._head, self._busy, self._controls, self._error, self._body, self._status]
        self.view = ipywidgets.VBox(parts).add_class("pllm-explorable")
        self.refresh()
        self._summary, self._figure = self.summary(self.result), self.figure(self.result)
        if self.live:
            for control in self.controls.values():
                control.observe(self._changed, names="value")

    # -- what a subclass defines ----------------------------------------------------------------
    def build(self) -> tuple[Mapping[str, ipywidgets.Widget], Sequence[ipywidgets.Widget]]:
        """Make the controls (their names are :meth:`compute`'s arguments) and the widgets below them."""
        raise NotImplementedError

    def compute(self, **values: Any) -> Any:
        """Call the rooms with the controls' values; no drawing. ``InputError`` for bad input."""
        raise NotImplementedError

    def draw(self, result: Any) -> None:
        """Show what :meth:`compute` returned; no computing."""
        raise NotImplementedError

    def summary(self, result: Any) -> str:
        """The starting state as plain HTML without scripts: stands in where no kernel runs."""
        raise NotImplementedError

    def announce(self, result: Any) -> str:
        """One sentence that a screen reader speaks after a change."""
        return "Done."

    # -- for code -------------------------------------------------------------------------------
    @property
    def values(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values: Any) -> Any:
        """Set controls from code and compute once; raises what the computation raises.

        Raises :class:`InputError` for a control that does not exist.
        """
        unknown = set(values) - set(self.controls)
        if unknown:
            raise InputError(
                "control", f"expected some of {', '.join(self.controls)}, got {', '.join(sorted(unknown))}"
            )
        with self.held():
            for name, value in values.items():
                self.controls[name].value = value
        return self.refresh()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Change several controls without a computation for each; none follows by itself."""
        before, self._hold = self._hold, True
        try:
            yield
        finally:
            self._hold = before

    def refresh(self) -> Any:
        """Compute and draw now, in this thread; exceptions are shown *and* raised."""
        return self.attempt(lambda: self._refresh(lambda: False))

    def attempt(self, job: Callable[[], Any]) -> Any:
        """Run ``job``; what it raises is shown in place and raised again."""
        try:
            return job()
        except Exception as error:
            self._fail(error)
            raise

    def background(self, job: Job, delay: float | int = 0, *, keep: bool = False) -> None:
        """Run ``job(stale)`` outside the kernel's own thread, busy sign on; errors are shown in place.

        A job that another one has overtaken in the queue never starts, unless ``keep`` is true;
        one that runs can ask ``stale()`` whether its result is still wanted.
        """

        def quiet(stale: Callable[[], bool]) -> None:
            try:
                job(stale)
            except Exception as error:
                if keep or not stale():
                    self._fail(error)
            finally:
                if not stale():
                    self._busy.kind = "pllm-busy"

        self._busy.kind = "pllm-busy on"
        self._latest.submit(quiet, delay, keep=keep)

    def act(self, action: Callable[[], Any]) -> None:
        """What a button does: in the background for a hand in a page, at once and raising for code."""
        if from_page():
            self.background(lambda _: action(), keep=True)
        else:
            self.attempt(action)

    def _refresh(self, stale: Callable[[], bool]) -> Any:
        result = self.compute(**self.values)
        if not stale():
            self._succeed(result)
        return result

    def _changed(self, _: Any) -> None:
        if self._hold:
            return
        if from_page():
            self.background(self._refresh, self.delay)
        else:
            self.refresh()

    def _succeed(self, result: Any) -> None:
        with self._drawing:
            self.draw(result)
            self.result = result
            self.runs += 1
            self._error.kind, self._error.html = "", ""
            self._body.remove_class("pllm-stale")
            # the run number makes equal sentences differ, so that each is spoken
            self._status.data = {"runs": str(self.runs)}
            self._status.html = esc(self.announce(result)) if self.runs > 1 else ""

    def _fail(self, error: BaseException) -> None:
        with self._drawing:
            self.runs += 1
            if self.live and self.result is not None:
                self._body.add_class("pllm-stale")
            self._error.kind = "pllm-error"
            self._status.data = {"runs": str(self.runs)}
            if isinstance(error, InputError):
                self._error.html = f"<strong>{esc(error.what)}</strong>: {esc(error.expected)}. {esc(error.remedy)}"
                return
            self.errors.append(error)
            trace = esc("".join(traceback.format_exception(error)[-6:])).replace("<br>", "\n")
            self._error.html = (
                f"<strong>This did not work.</strong> {esc(type(error).__name__)}: {esc(error)}"
                f"<details><summary>Details</summary><pre>{trace}</pre></details>"
            )

    # -- display --------------------------------------------------------------------------------
    def figure(self, result: Any) -> tuple[Any, str] | None:
        """A plotly figure of the starting state and its description, for exports; ``None`` for none."""
        return None

    def fallback_html(self) -> str:
        """Title, summary and note of the starting state as plain HTML."""
        return (
            f'<div class="pllm-fallback pllm-plain"><p><strong>{esc(self.title)}</strong></p>{self._summary}'
            f"<p><em>{esc(FALLBACK_NOTE)}</em></p></div>"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = dict(self.view._repr_mimebundle_(**kwargs) or {})
        bundle["text/html"] = self.fallback_html()
        bundle["text/plain"] = f"{self.title}: a widget; run the cell in Jupyter to use it."
        if self._figure is None:
            return bundle, {}
        figure, alt = self._figure
        bundle[PLOTLY_MIME] = figure_bundle(figure)
        return bundle, {PLOTLY_MIME: {"alt": alt}, "alt": alt}

    def _ipython_display_(self) -> None:
        # JupyterLab writes "model not found" for the widget of a saved notebook and ignores the
        # other formats of that output. So the summary stands in a second output of its own; the
        # style sheet, which comes with a live widget only, hides it.
        from IPython.display import publish_display_data

        bundle, metadata = self._repr_mimebundle_()
        summary = bundle.pop("text/html")
        publish_display_data(bundle, metadata=metadata)
        publish_display_data({"text/html": summary, "text/plain": ""}, metadata={"pllm": "widget-fallback"})
