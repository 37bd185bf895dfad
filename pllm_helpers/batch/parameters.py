"""Typed notebook parameters: read from the cell tagged ``parameters``, checked before anything runs.

Each line of that cell is ``name: type = default  # RANGE: help``, where

- ``type`` is ``int``, ``float``, ``bool``, ``str``, a ``list[…]`` of one of them, or ``… | None``;
- ``RANGE`` is ``1..500`` (both ends belong to it, either may be left out), ``a|b|c`` or ``any``.
"""

from __future__ import annotations

import ast
import difflib
import io
import math
import re
import symtable
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime import InputError

__all__ = ["Parameter", "Text", "read_parameters", "unread_parameters", "closest"]

SCALARS = {"int": int, "float": float, "bool": bool, "str": str}


class Text(str):
    """A value typed on the command line: still text, to be read as the parameter's type."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Attributes
    ----------
    name, type, allowed, help : as written in the notebook.
    default : the value where none is given.
    base, many, optional : scalar type name; whether it is a list of them; whether None is allowed.
    low, high : ends of the range, ``None`` where open.
    choices : the values allowed, empty where a range or anything is allowed.
    """

    name: str
    type: str
    default: Any
    allowed: str
    help: str
    base: str
    many: bool
    optional: bool
    low: float | int | None = None
    high: float | int | None = None
    choices: tuple[Any, ...] = ()

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}[self.base]
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
        elif self.low is not None and self.high is not None:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            words += f" of at least {self.low:g}"
        elif self.high is not None:
            words += f" of at most {self.high:g}"
        if self.many:
            words = f"a list, each {words}"
        return f"{words}{' or none' if self.optional else ''} ({self.type})"

    def check(self, value: Any, where: str = "") -> Any:
        """``value`` as this parameter's type.

        Parameters
        ----------
        value : a Python value of the right type, or :class:`Text` from the command line.
        where : prefix for the error, for instance ``"01_buffer_metrics"``.

        Raises :class:`InputError` naming the parameter and what was expected.
        """
        try:
            return self._read(value) if isinstance(value, Text) else self._take(value)
        except ValueError as problem:
            hint = ""
            if self.base == "float" and type(value) is str and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
                hint = f"YAML reads {value} as text: write {float(value)!r}."
            prefix = f"{where}: " if where else ""
            got = str(problem) or _show(value)
            raise InputError(f"{prefix}parameter {self.name}", f"expected {self.expected}, got {got}", hint) from None

    def _read(self, text: str) -> Any:
        text = text.strip() if self.base != "str" or self.many else str(text)
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        if not self.many:
            return self._in_range(self._scalar(text))
        if text.startswith("["):
            try:
                return self._take(ast.literal_eval(text))
            except (SyntaxError, ValueError, TypeError):
                text = text.removeprefix("[").removesuffix("]")
        parts = [part.strip() for part in text.split(",")]
        if not any(parts):
            raise ValueError("an empty list")
        return [self._in_range(self._scalar(part)) for part in parts]

    def _scalar(self, text: str) -> Any:
        if self.base == "str":
            return str(text)
        if self.base == "bool":
            if text.lower() not in ("true", "false"):
                raise ValueError(_show(text))
            return text.lower() == "true"
        try:
            return int(text) if self.base == "int" else float(text)
        except ValueError:
            raise ValueError(_show(text)) from None

    def _take(self, value: Any) -> Any:
        if value is None:
            if not self.optional:
                raise ValueError("none")
            return None
        if not self.many:
            return self._in_range(self._typed(value))
        if not isinstance(value, (list, tuple)):
            raise ValueError(_show(value))
        if not value:
            raise ValueError("an empty list")
        return [self._in_range(self._typed(item)) for item in value]

    def _typed(self, value: Any) -> Any:
        # bool is an int to Python, but not to a reader
        accepted = (int, float) if self.base == "float" else SCALARS[self.base]
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.base != "bool"):
            raise ValueError(_show(value))
        return SCALARS[self.base](value)

    def _in_range(self, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(_show(value))
        if self.choices and value not in self.choices:
            near = closest(str(value), map(str, self.choices))
            raise ValueError(_show(value) + near)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(_show(value))
        return value


def _show(value: Any) -> str:
    kind = "text" if isinstance(value, str) else type(value).__name__
    return f"{kind} {value!r}"


def closest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)`` or nothing: the known words most like ``word``."""
    matches = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def read_parameters(source: str, where: str = "parameters cell") -> dict[str, Parameter]:
    """Parameters declared by the ``source`` of a parameters cell, in order.

    Raises :class:`InputError` naming the line that does not follow the form above.
    """

    def wrong(line: int, problem: str) -> InputError:
        form = "Write each line as  name: type = default  # RANGE: help."
        return InputError(f"{where}, line {line} of the parameters cell", problem, form)

    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError) as problem:
        raise wrong(getattr(problem, "lineno", 0) or 0, f"expected Python, got {problem}") from None
    comments = {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    found: dict[str, Parameter] = {}
    for node in tree.body:
        line = node.end_lineno or node.lineno
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise wrong(line, f"expected one typed parameter, got {ast.unparse(node)!r}")
        name = node.target.id
        if name in found:
            raise wrong(line, f"expected each name once, got {name} again")
        base, many, optional = _read_type(node.annotation, lambda text, line=line: wrong(line, text))
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            problem = f"expected a plain value for {name}, got {ast.unparse(node.value)!r} (derive it in a later cell)"
            raise wrong(line, problem) from None
        allowed, colon, text = comments.get(line, "").partition(":")
        allowed, text = allowed.strip(), text.strip()
        if not (colon and allowed and text):
            raise wrong(line, f"expected a comment 'RANGE: help' after {name}, got {comments.get(line, '')!r}")
        kind = ast.unparse(node.annotation)
        bare = Parameter(name, kind, None, allowed, text, base, many, optional)
        low, high, choices = _read_range(bare, lambda text, line=line: wrong(line, text))
        parameter = Parameter(name, kind, None, allowed, text, base, many, optional, low, high, choices)
        found[name] = Parameter(
            name, kind, parameter.check(default, where), allowed, text, base, many, optional, low, high, choices
        )
    return found


def _read_type(node: ast.expr, wrong: Any) -> tuple[str, bool, bool]:
    parts = [part.strip() for part in ast.unparse(node).split("|")]
    optional = "None" in parts
    kinds = [part for part in parts if part != "None"]
    match = re.fullmatch(r"(?:(list)\[)?(int|float|bool|str)\]?", kinds[0]) if len(kinds) == 1 else None
    if not match or kinds[0].endswith("]") != bool(match[1]):
        raise wrong(f"expected int, float, bool, str, list[…] of one of them, or … | None, got {ast.unparse(node)}")
    return match[2], bool(match[1]), optional


def _read_range(p: Parameter, wrong: Any) -> tuple[float | int | None, float | int | None, tuple[Any, ...]]:
    if p.allowed == "any":
        return None, None, ()
    try:
        if ".." in p.allowed:
            if p.base not in ("int", "float"):
                raise ValueError
            low, high = (p._scalar(end.strip()) if end.strip() else None for end in p.allowed.split(".."))
            if low is None and high is None or (low is not None and high is not None and low > high):
                raise ValueError
            return low, high, ()
        choices = tuple(p._scalar(part.strip()) for part in p.allowed.split("|"))
        if len(choices) < 2:
            raise ValueError
        return None, None, choices
    except ValueError:
        raise wrong(f"expected a range like 1..500, choices like a|b|c, or any, got {p.allowed!r}") from None


def unread_parameters(names: Iterable[str], later_cells: Sequence[str]) -> list[str]:
    """Those of ``names`` that no later code cell reads before it assigns to them.

    A parameter that is bound and never read is the quiet failure of parameterised notebooks: a
    sweep over it changes nothing. ``later_cells`` are the sources of the code cells after the
    parameters cell, in order; lines of magics are ignored.
    """
    state: dict[str, str] = {}
    for source in later_cells:
        for name, event in _events(source):
            state.setdefault(name, event)  # only the first thing that happens to a name counts
    return [name for name in names if state.get(name) != "read"]


def _events(source: str) -> list[tuple[str, str]]:
    """(name, "read" | "write") of module-level names, in the order of evaluation."""
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        lines[0] = ""
    text = "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", line) for line in lines)
    text = re.sub(r"(?m)^(\s*)(\S.*?)\?+$", r"\1\2", text)
    tree = ast.parse(text)
    inner = _global_reads(symtable.symtable(text, "cell", "exec"))
    visitor = _Order()
    visitor.visit(tree)
    # what functions and comprehensions read is read, at the latest, when they are called
    return visitor.events + [(name, "read") for name in sorted(inner)]


def _global_reads(table: symtable.SymbolTable) -> set[str]:
    found: set[str] = set()
    for child in table.get_children():
        found |= {s.get_name() for s in child.get_symbols() if s.is_referenced() and s.is_global()}
        found |= _global_reads(child)
    return found


class _Order(ast.NodeVisitor):
    """Names at module level in the order Python evaluates them (values before targets)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def visit_Name(self, node: ast.Name) -> None:
        self.events.append((node.id, "read" if isinstance(node.ctx, ast.Load) else "write"))

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit_all([node.value, *node.targets])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._visit_all([node.value, node.target])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.events.append((node.target.id, "read"))
        self._visit_all([node.value, node.target])

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._visit_all([node.iter, node.target, *node.body, *node.orelse])

    visit_AsyncFor = visit_For  # type: ignore[assignment]

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all([*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)])
        self.events.append((node.name, "write"))

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *(k.value for k in node.keywords)])
        self.events.append((node.name, "write"))

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.events += [((alias.asname or alias.name).partition(".")[0], "write") for alias in node.names]

    visit_ImportFrom = visit_Import  # type: ignore[assignment]

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_all([*node.args.defaults, *(d for d in node.args.kw_defaults if d)])

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)  # the rest is a scope of its own

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # type: ignore[assignment]

    def _visit_all(self, nodes: Sequence[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)


def effective(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter's value: the given one or the default."""
    return {name: given.get(name, p.default) for name, p in parameters.items()}
