"""Notebook 00: what this machine offers, and a chat with the model that runs on it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ipywidgets

from ..models import LLM, Encoder, generate
from ..runtime import InputError, cache_dir, processor_name, thread_count
from .base import Explorable, from_page
from .controls import Log, Prompt, Slider, esc

__all__ = ["Chat", "MachineCheck", "Turn", "chat", "machine_check"]

PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "jupyterlab", "ipywidgets", "plotly")


@dataclass(frozen=True)
class MachineCheck:
    """Rows of ``(what, value, what it means)``; shows itself as a table."""

    rows: tuple[tuple[str, str, str], ...]

    def __getitem__(self, what: str) -> str:
        """The value of one row, by its name; ``KeyError`` where there is none."""
        return {name: value for name, value, _ in self.rows}[what]

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{esc(a)}</th><td style="text-align:left">{esc(b)}</td>'
            f'<td style="text-align:left">{esc(c)}</td></tr>'
            for a, b, c in self.rows
        )
        head = "".join(f'<th scope="col" style="text-align:left">{h}</th>' for h in ("What", "Here", "What it means"))
        return f'<table class="pllm-machine"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def __repr__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        return "\n".join(f"{name:{width}}  {value}  ({note})" for name, value, note in self.rows)


def machine_check(llm: LLM | None = None, encoder: Encoder | None = None) -> MachineCheck:
    """What the series will find here: processor, threads, memory, number format, models, packages.

    With ``llm`` and ``encoder`` it also says what was loaded and in which format. Nothing is
    sent anywhere; ``pllm doctor`` checks the installation itself.
    """
    import psutil
    import torch

    from ..models.dtypes import measured_dtypes

    memory, process = psutil.virtual_memory(), psutil.Process()
    free = memory.available / 2**30
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    rows = [
        ("Processor", processor_name(), f"{platform.machine()}, {platform.system()}"),
        (
            "Threads",
            f"{torch.get_num_threads()} of {thread_count()}",
            "used by torch, of the cores that this kernel may use",
        ),
        (
            "Memory",
            f"{free:.1f} of {memory.total / 2**30:.1f} GB free",
            "enough for every notebook" if free >= 4 else "below 4 GB: close other programs or kernels",
        ),
        ("This kernel", f"{process.memory_info().rss / 2**20:,.0f} MB", "memory in use now, shared weights counted in"),
        (
            "Network",
            "off" if offline else "allowed",
            "hub libraries are told to stay offline" if offline else "a loader was allowed to download",
        ),
    ]
    if llm is not None:
        timed = next((e for e in measured_dtypes() if e["model"] == llm.name), None)
        why = "as asked for"
        if timed and timed["dtype"] == llm.dtype:
            slower = max(timed["seconds"].values()) / min(timed["seconds"].values())
            why = f"the faster here: the other takes {slower:.1f} times as long"
        rows += [
            ("Language model", llm.name, f"{llm.parameters / 1e6:.0f} million weights"),
            ("Number format", llm.dtype, why),
        ]
    if encoder is not None:
        rows.append(("Encoder", encoder.name, f"{encoder.dim} dimensions, at most {encoder.max_tokens} tokens"))
    cache = cache_dir()
    size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 2**20
    rows.append(("Model cache", f"{size:,.0f} MB", str(cache)))
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    rows.append(("Python", platform.python_version(), ", ".join(versions)))
    return MachineCheck(tuple(rows))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


@dataclass(frozen=True)
class Turn:
    """One exchange: what was said, the answer, its tokens, seconds and whether it was complete."""

    message: str
    answer: str
    tokens: int
    seconds: float
    finished: bool

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Chat(Explorable):
    """A conversation with the model; make one with :func:`chat`."""

    title = "Chat with the model"
    help = "Everything is computed on this machine; nothing you write leaves it."
    live = False
    llm: LLM
    first: str | None = None

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self.turns: list[Turn] = []
        self._answering, self._era = False, 0
        controls = {
            "temperature": Slider("Temperature", value=0.0, min=0.0, max=1.5, step=0.1, digits=1),
            "max_new_tokens": ipywidgets.BoundedIntText(64, min=1, max=512, description="Longest answer, in tokens"),
            "seed": ipywidgets.BoundedIntText(0, min=0, max=2**31 - 1, description="Seed"),
        }
        self.log = Log(label="Conversation")
        self.prompt = Prompt("Your message", placeholder="Ask the model something")
        self.prompt.on_submit(self._submitted)
        self.new = ipywidgets.Button(description="Reset", tooltip="Forget this conversation")
        self.new.on_click(lambda _: self.reset())
        return controls, [self.log, self.prompt, self.new]

    def compute(self, **settings: Any) -> list[Turn]:
        """The conversation so far; the first time, with the answer to ``first``."""
        if self.first and not self.runs:
            self._answer(self.first)
        return self.turns

    def draw(self, result: list[Turn]) -> None:
        self._paint()

    def summary(self, result: list[Turn]) -> str:
        if not result:
            return f"<p>A text box to talk with {esc(self.llm.name)}.</p>"
        name = esc(self.llm.name)
        rows = "".join(
            f"<p><strong>You:</strong> {esc(x.message)}</p><p><strong>{name}:</strong> {esc(x.answer)}</p>"
            for x in result
        )
        return rows + f"<p>{esc(self._speed(result[-1]))}</p>"

    def announce(self, result: list[Turn]) -> str:
        return self._speed(result[-1]) if result else "Conversation forgotten."

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the model sees it."""
        return [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.message), ("assistant", turn.answer))
        ]

    def ask(self, message: str) -> Turn:
        """Send a message from code and wait for the answer; raises what the model raises."""
        return self.attempt(lambda: self._exchange(message))

    def reset(self) -> None:
        """Forget the conversation; an answer that is still being written is dropped."""
        self._era += 1
        self.turns = []
        self._succeed(self.turns)

    # -- inside ---------------------------------------------------------------------------------
    def _submitted(self, message: str) -> None:
        if not from_page():
            self.ask(message)
        elif not self._answering:
            self._answering = True  # before the thread starts: a second click must not slip in
            self.background(lambda _: self._exchange(message), keep=True)

    def _exchange(self, message: str) -> Turn:
        self._answering, self.prompt.waiting = True, True
        self._error.kind = self._error.html = ""
        era = self._era
        try:
            turn = self._answer(message)
            if era == self._era:
                self._succeed(self.turns)
            return turn
        except Exception:
            self._paint()
            self.prompt.fill(message)
            raise
        finally:
            self._answering, self.prompt.waiting = False, False

    def _answer(self, message: str) -> Turn:
        message = message.strip()
        if not message:
            raise InputError("Your message", "expected some text, got none", "Type a message, then press Enter.")
        era, before = self._era, self.messages
        self.prompt.clear()
        self._paint(pending=message)
        settings = self.values
        start = time.perf_counter()
        (written,) = generate(
            self.llm,
            [[*before, {"role": "user", "content": message}]],
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            seed=settings["seed"],
            progress=False,
            details=True,
        )
        turn = Turn(message, written.text, written.tokens, time.perf_counter() - start, written.finished)
        if era == self._era:
            self.turns = [*self.turns, turn]
        return turn

    def _speed(self, turn: Turn) -> str:
        end = "" if turn.finished else ", cut at the longest answer allowed"
        tokens = "1 token" if turn.tokens == 1 else f"{turn.tokens} tokens"
        return f"{tokens} in {turn.seconds:.1f} s: {turn.rate:.0f} tokens/s{end}"

    def _paint(self, pending: str | None = None) -> None:
        name = esc(self.llm.name)
        parts = []
        for x in self.turns:
            parts.append(_bubble("you", "You", esc(x.message)))
            answer = esc(x.answer) or "<em>(an empty answer)</em>"
            parts.append(_bubble("model", name, answer, esc(self._speed(x))))
        if pending is not None:
            parts.append(_bubble("you", "You", esc(pending)))
            parts.append(_bubble("model", name, '<em class="pllm-writing">writing an answer…</em>'))
        if not parts:
            parts.append('<p class="pllm-help pllm-nothing">Nothing said yet.</p>')
        self.log.parts = parts


def _bubble(kind: str, who: str, text: str, foot: str = "") -> str:
    foot = f'<div class="pllm-foot">{foot}</div>' if foot else ""
    said = f'<div class="pllm-who">{who}</div><div class="pllm-said">{text}</div>'
    return f'<div class="pllm-turn {kind}">{said}{foot}</div>'


def chat(llm: LLM, first: str | None = None) -> Chat:
    """A chat with ``llm``: several turns, temperature, length and seed, tokens per second.

    ``first`` is asked at once, in the cell (a few seconds); without it the chat opens empty.

    Raises :class:`~pllm_helpers.runtime.InputError` for a model that does not write text.
    """
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    return Chat(llm=llm, first=first)
