"""The one record that flows through everything: what a user said and how it was answered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .runtime import InputError

__all__ = ["DialogueSet"]


@dataclass(frozen=True, slots=True)
class DialogueSet:
    """A user's message and the reply to it (a *dialogue set* in Qin et al., section 3.1).

    Attributes
    ----------
    user : who the data belong to; an opaque id, never a name.
    question : what came in (instruction, question, or the other person's message).
    answer : the reply. For a chitchat stream it is the person's own reply.
    time : seconds since 1970-01-01 UTC, or ``None`` where the source has no time.
    source : data set the row came from, for instance ``"chitchat"``.
    meta : further labels of the source (topic, emotion, row number …); read-only.

    Raises :class:`~pllm_helpers.runtime.InputError` if question and answer are both blank.
    """

    user: str
    question: str
    answer: str
    time: float | int | None = None
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("user", "question", "answer", "source"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"DialogueSet.{name}", f"expected text, got {type(getattr(self, name)).__name__}")
        if not (self.question.strip() or self.answer.strip()):
            raise InputError("DialogueSet", "expected text in question or answer, both are blank", "Drop the row.")
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def text(self) -> str:
        """Question and answer as one text, the unit that buffer metrics score."""
        return "\n".join(part for part in (self.question.strip(), self.answer.strip()) if part)

    @property
    def id(self) -> str:
        """Content hash (16 hex digits): equal rows have equal ids, on every machine."""
        parts = (self.user, self.question, self.answer, repr(self.time), self.source)
        return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def __reduce__(self):  # mapping proxies do not pickle
        return (type(self), (self.user, self.question, self.answer, self.time, self.source, dict(self.meta)))
