"""Small accessible building blocks: live regions, a slider with a name, a prompt box.

ipywidgets' own sliders have handles without an accessible name, and its ``HTML`` widget cannot
announce a change. These are native HTML elements with real labels instead, a few lines each.
For the rest (``Textarea``, ``Dropdown``, ``BoundedIntText``, ``Button``) ipywidgets' own are fine.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets as t

__all__ = ["Checks", "Log", "Prompt", "Region", "Slider", "esc"]


def esc(text: object) -> str:
    """Text of a user, a model or a data set, safe inside HTML; line breaks stay visible."""
    return html.escape(str(text), quote=True).replace("\n", "<br>")


class Region(anywidget.AnyWidget):
    """A piece of HTML that screen readers announce according to its role.

    ``role="status"`` announces politely, ``"alert"`` at once, ``""`` nothing. Whatever a person,
    a model or a data set wrote must pass through :func:`esc` before it gets into ``html``. An
    empty region takes no space. ``frame=True`` makes the card around it a named group whose keys
    (arrows, Enter …) stay inside it: JupyterLab's command mode would take them away from lists,
    sliders and buttons.
    """

    _esm = """
    function render({model, el}) {
      const box = document.createElement("div");
      let shown = null;
      const paint = () => {
        const role = model.get("role"), label = model.get("label"), html = model.get("html");
        for (const [name, value] of [["role", role], ["aria-label", role ? label : ""]])
          value ? box.setAttribute(name, value) : box.removeAttribute(name);
        box.className = ["pllm-region", model.get("kind")].join(" ");
        for (const [name, value] of Object.entries(model.get("data"))) box.dataset[name] = value;
        // a live region must be in the page before its text changes: never remove those
        el.style.display = html || role ? "" : "none";
        box.classList.toggle("pllm-empty", !html);
        if (shown !== html) { box.innerHTML = html; shown = html; }
      };
      let gone = false;
      const guard = e => { if (!e.ctrlKey && !e.metaKey && !e.altKey) e.stopPropagation(); };
      const frame = () => {
        const card = el.closest(".pllm-explorable");
        if (!card) { if (!gone) requestAnimationFrame(frame); return; }
        card.setAttribute("role", "group");
        card.setAttribute("aria-label", model.get("label"));
        card.addEventListener("keydown", guard);
        // plotly draws before the card has its width, and looks again only when the window changes
        let width = 0;
        new ResizeObserver(() => {
          if (card.clientWidth === width) return;
          width = card.clientWidth;
          requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
        }).observe(card);
      };
      el.appendChild(box);
      paint();
      if (model.get("frame")) frame();
      model.on("change", paint);
      return () => { gone = true; model.off("change", paint); };
    }
    export default { render };
    """
    _css = Path(__file__).with_name("style.css")

    html = t.Unicode("").tag(sync=True)
    role = t.Unicode("").tag(sync=True)
    label = t.Unicode("").tag(sync=True)
    kind = t.Unicode("").tag(sync=True)
    data = t.Dict().tag(sync=True)
    frame = t.Bool(False).tag(sync=True)


class Log(anywidget.AnyWidget):
    """A list of HTML parts that grows at its end, as a conversation does.

    Screen readers announce only what is new; the end stays in view. ``parts`` must be escaped.
    """

    _esm = """
    function render({model, el}) {
      const box = document.createElement("div");
      box.className = "pllm-region pllm-log";
      box.setAttribute("role", "log");
      box.tabIndex = 0;  // so that it can be scrolled by keyboard
      const shown = [];
      const paint = () => {
        box.setAttribute("aria-label", model.get("label"));
        const parts = model.get("parts");
        while (shown.length > parts.length) { shown.pop(); box.lastChild.remove(); }
        parts.forEach((part, i) => {
          if (i === shown.length) { box.appendChild(document.createElement("div")); shown.push(null); }
          if (shown[i] !== part) { box.children[i].innerHTML = part; shown[i] = part; }
        });
        box.scrollTop = box.scrollHeight;
      };
      el.appendChild(box);
      paint();
      model.on("change", paint);
      return () => model.off("change", paint);
    }
    export default { render };
    """
    parts = t.List(t.Unicode()).tag(sync=True)
    label = t.Unicode("").tag(sync=True)


class Slider(anywidget.AnyWidget):
    """A number between ``min`` and ``max``: a native range input with a label and its value.

    Arrow keys move it by ``step``, Page Up/Down by more, Home and End to the ends.
    ``continuous_update=False`` reports only where the slider is let go. ``unit`` follows the value.
    """

    _esm = """
    const serial = () => Math.random().toString(36).slice(2);  // each widget is a module of its own
    function render({model, el}) {
      const id = `pllm-slider-${serial()}`;
      const label = Object.assign(document.createElement("label"), {htmlFor: id});
      const row = Object.assign(document.createElement("div"), {className: "pllm-slider-row"});
      const input = Object.assign(document.createElement("input"), {type: "range", id});
      const out = document.createElement("output");
      out.setAttribute("for", id);
      const say = () => {
        const text = Number(input.value).toFixed(model.get("digits")) + model.get("unit");
        out.textContent = text;
        input.setAttribute("aria-valuetext", text);
      };
      const paint = () => {
        label.textContent = model.get("label");
        for (const name of ["min", "max", "step"]) input[name] = model.get(name);
        input.value = model.get("value");
        input.disabled = model.get("disabled");
        say();
      };
      const send = () => { model.set("value", Number(input.value)); model.save_changes(); };
      input.addEventListener("input", () => { say(); if (model.get("continuous_update")) send(); });
      input.addEventListener("change", send);
      el.classList.add("pllm-field");
      input.setAttribute("data-lm-suppress-shortcuts", "true");  // arrows are ours, not JupyterLab's
      row.append(input, out);
      el.append(label, row);
      paint();
      model.on("change", paint);
      return () => model.off("change", paint);
    }
    export default { render };
    """
    value = t.Float(0.0).tag(sync=True)
    min = t.Float(0.0).tag(sync=True)
    max = t.Float(1.0).tag(sync=True)
    step = t.Float(0.1).tag(sync=True)
    digits = t.Int(2).tag(sync=True)
    unit = t.Unicode("").tag(sync=True)
    label = t.Unicode().tag(sync=True)
    disabled = t.Bool(False).tag(sync=True)
    continuous_update = t.Bool(False).tag(sync=True)

    def __init__(self, label: str, **kwargs: Any):
        super().__init__(label=label, **kwargs)

    @t.validate("value")
    def _inside(self, proposal: t.Bunch) -> float:
        return float(min(max(proposal["value"], self.min), self.max))


class Prompt(anywidget.AnyWidget):
    """A labelled text box with a button: Enter or the button sends, Shift+Enter starts a new line.

    From the moment of sending nothing more can be sent until the kernel has set ``waiting`` and
    taken it back; typing goes on meanwhile. ``fill`` puts a text into the box, ``clear`` empties
    it: call that once the text has been accepted, so that a refused one can be corrected.
    """

    _esm = """
    const serial = () => Math.random().toString(36).slice(2);  // each widget is a module of its own
    function render({model, el}) {
      const id = `pllm-prompt-${serial()}`;
      const label = Object.assign(document.createElement("label"), {htmlFor: id});
      const row = Object.assign(document.createElement("div"), {className: "pllm-prompt-row"});
      const box = Object.assign(document.createElement("textarea"), {id, rows: 2});
      const hint = Object.assign(document.createElement("div"), {id: id + "-hint", className: "pllm-hint"});
      const button = Object.assign(document.createElement("button"), {type: "button"});
      button.className = "pllm-button primary";
      let pending = false;
      box.setAttribute("aria-describedby", hint.id);
      const paint = () => {
        label.textContent = model.get("label");
        hint.textContent = model.get("hint");
        box.placeholder = model.get("placeholder");
        button.textContent = model.get("button");
        button.setAttribute("aria-disabled", pending || model.get("waiting"));
      };
      const send = () => {
        if (pending || model.get("waiting")) return;
        pending = true;
        paint();
        model.send({submit: box.value});
      };
      const told = message => { if ("text" in message) box.value = message.text; };
      const waited = () => { pending = model.get("waiting"); };
      // Shift+Enter must not reach JupyterLab, where it runs the cell
      box.addEventListener("keydown", e => {
        e.stopPropagation();
        if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); }
      });
      button.addEventListener("click", send);
      el.classList.add("pllm-field");
      row.append(box, button);
      el.append(label, row, hint);
      paint();
      model.on("change:waiting", waited);
      model.on("change", paint);
      model.on("msg:custom", told);
      return () => { model.off("change:waiting", waited); model.off("change", paint); model.off("msg:custom", told); };
    }
    export default { render };
    """
    label = t.Unicode().tag(sync=True)
    hint = t.Unicode("Enter sends, Shift+Enter starts a new line.").tag(sync=True)
    placeholder = t.Unicode("").tag(sync=True)
    button = t.Unicode("Send").tag(sync=True)
    waiting = t.Bool(False).tag(sync=True)

    def __init__(self, label: str, **kwargs: Any):
        super().__init__(label=label, **kwargs)
        self._receivers: list[Callable[[str], None]] = []
        self.on_msg(self._received)

    def on_submit(self, receiver: Callable[[str], None]) -> None:
        """Call ``receiver(text)`` when the person sends."""
        self._receivers.append(receiver)

    def fill(self, text: str) -> None:
        """Put ``text`` into the box, in place of what is there."""
        self.send({"text": text})

    def clear(self) -> None:
        """Empty the box."""
        self.fill("")

    def _received(self, _: object, content: dict[str, Any], __: object) -> None:
        if isinstance(content.get("submit"), str):
            for receiver in self._receivers:
                receiver(content["submit"])


class Checks(anywidget.AnyWidget):
    """Several of some options: native check boxes in a group with a name; Tab moves, Space checks.

    ``options`` are ``[value, label]`` pairs, ``value`` the list of the chosen values in their order.
    """

    _esm = """
    const serial = () => Math.random().toString(36).slice(2);  // each widget is a module of its own
    function render({model, el}) {
      const set = document.createElement("fieldset"), legend = document.createElement("legend");
      const row = Object.assign(document.createElement("div"), {className: "pllm-checks-row"});
      set.className = "pllm-checks";
      set.append(legend, row);
      const send = () => {
        const chosen = Array.from(row.querySelectorAll("input")).filter(i => i.checked).map(i => i.value);
        model.set("value", chosen);
        model.save_changes();
      };
      let drawn = "";
      const paint = () => {
        legend.textContent = model.get("label");
        const options = model.get("options"), value = model.get("value");
        // boxes are kept while the options are: the focus stays where it is
        if (drawn !== JSON.stringify(options)) {
          drawn = JSON.stringify(options);
          row.replaceChildren(...options.map(([key, text]) => {
            const id = `pllm-check-${serial()}`;
            const item = Object.assign(document.createElement("span"), {className: "pllm-check"});
            const box = Object.assign(document.createElement("input"), {type: "checkbox", id, value: key});
            const label = Object.assign(document.createElement("label"), {htmlFor: id, textContent: text});
            box.addEventListener("change", send);
            item.append(box, label);
            return item;
          }));
        }
        row.querySelectorAll("input").forEach(i => { i.checked = value.includes(i.value); });
      };
      el.classList.add("pllm-field");
      el.append(set);
      paint();
      model.on("change", paint);
      return () => model.off("change", paint);
    }
    export default { render };
    """
    label = t.Unicode().tag(sync=True)
    options = t.List(t.List(t.Unicode())).tag(sync=True)
    value = t.List(t.Unicode()).tag(sync=True)

    def __init__(self, label: str, options: Any, value: Any = (), **kwargs: Any):
        super().__init__(label=label, options=[list(o) for o in options], value=list(value), **kwargs)

    @t.validate("value")
    def _known(self, proposal: t.Bunch) -> list[str]:
        return [key for key, _ in self.options if key in proposal["value"]]
