"""Lexicons: named word lists that stand for a user's domains; their files, their checks, their words in a text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..runtime import InputError, data_dir

__all__ = ["BUILT_IN", "Lexicons", "Span", "count_hits", "highlight", "load_lexicons", "read_lexicon", "word_tokens"]

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "medical": ("administration", "anatomy", "drug"),
    "emotion": ("fear", "surprise", "trust"),
    "clusters": ("people", "leisure", "technology"),
}

# Word clusters in place of the paper's GloVe groups: unions of categories of the package empath
# (MIT), read from it at run time.
CLUSTERS: Mapping[str, tuple[str, ...]] = {
    "people": ("family", "friends", "children", "party", "wedding", "communication"),
    "leisure": ("sports", "music", "play", "vacation", "cooking", "eating", "leisure"),
    "technology": ("computer", "internet", "programming", "technology", "phone", "social_media"),
}

# letters of any script, with apostrophes and hyphens inside: don't, follow-up
_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")


def word_tokens(text: str) -> list[str]:
    """The words T of a text, in order, case folded; digits and punctuation are no words."""
    return [m.group().casefold().replace("’", "'") for m in _WORD.finditer(text)]


class Lexicons(Mapping[str, frozenset[str]]):
    """Named word lists, in order; words are case folded and stripped.

    ``notes`` reports what was cleaned and which words stand in several lists. Raises
    :class:`~pllm_helpers.runtime.InputError` on an empty list or on anything but words.
    """

    def __init__(self, lists: Mapping[str, Collection[str]], notes: Iterable[str] = ()):
        if not lists:
            raise InputError("lexicons", "expected at least one list of words, got none")
        self._lists: dict[str, frozenset[str]] = {}
        self.notes = list(notes)
        for name, words in lists.items():
            if isinstance(words, str) or not all(isinstance(w, str) for w in words):
                raise InputError(f"lexicons[{name!r}]", "expected a collection of words")
            folded = [w.strip().casefold().replace("’", "'") for w in words]  # as word_tokens does
            kept = frozenset(w for w in folded if w)
            if not kept:
                raise InputError(f"lexicons[{name!r}]", "expected at least one word, got none")
            if len(kept) < len(folded):
                self.notes.append(f"{name}: {len(folded) - len(kept)} blank or repeated words")
            self._lists[name] = kept
        names = list(self._lists)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                both = self._lists[a] & self._lists[b]
                if both:
                    self.notes.append(f"{a} and {b} share {len(both)} words, for instance {min(both)!r}")
        self._places: dict[str, list[int]] = {}
        for place, words in enumerate(self._lists.values()):
            for w in words:
                self._places.setdefault(w, []).append(place)

    def __getitem__(self, name: str) -> frozenset[str]:
        return self._lists[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)

    def __repr__(self) -> str:
        return f"Lexicons({', '.join(f'{k}: {len(v)} words' for k, v in self.items())})"

    def places(self, word: str) -> list[int]:
        """Places of the lists that hold a (case folded) word."""
        return self._places.get(word, [])


def count_hits(
    token_lists: Sequence[Sequence[str]], lexicons: Lexicons
) -> tuple[Int[np.ndarray, "n m"], Int[np.ndarray, " n"]]:
    """|T ∩ lᵢ| of every text and lexicon, shape ``(n, m)``, and the number of words, shape ``(n,)``."""
    hits = np.zeros((len(token_lists), len(lexicons)), dtype=int)
    places = lexicons._places
    for row, tokens in enumerate(token_lists):
        for token in tokens:
            for place in places.get(token, ()):
                hits[row, place] += 1
    return hits, np.array([len(t) for t in token_lists], dtype=int)


class Span(NamedTuple):
    """One word of a text: characters ``start`` to ``end``, and the lexicons that hold it."""

    start: int
    end: int
    word: str
    lexicons: tuple[str, ...]


def highlight(text: str, lexicons: Mapping[str, Collection[str]]) -> list[Span]:
    """Every word of a text with its place and its lexicons, for display."""
    lists = lexicons if isinstance(lexicons, Lexicons) else Lexicons(lexicons)
    names = list(lists)
    found = []
    for m in _WORD.finditer(text):
        word = m.group().casefold().replace("’", "'")
        found.append(Span(m.start(), m.end(), word, tuple(names[i] for i in lists.places(word))))
    return found


def load_lexicons(*sources: str | Path) -> Lexicons:
    """Load lexicons by built-in name, file or folder.

    Built in: ``"medical"`` (administration, anatomy, drug), ``"emotion"`` (fear, surprise, trust)
    and ``"clusters"`` (people, leisure, technology), or one list as ``"medical/drug"``. Without
    arguments all of them. A file or a folder of ``*.txt`` files adds your own; see
    :func:`read_lexicon` for the format.

    Raises :class:`~pllm_helpers.runtime.InputError` for an unknown name (with close matches), a
    missing or unusable file, and two lists of one name.
    """
    lists: dict[str, Collection[str]] = {}
    notes: list[str] = []
    for source in sources or tuple(BUILT_IN):
        for name, words in _load(source, notes).items():
            if name in lists:
                raise InputError(
                    "lexicons", f"expected different names, got {name!r} twice", "Rename one of the files."
                )
            lists[name] = words
    return Lexicons(lists, notes)


def _load(source: str | Path, notes: list[str]) -> dict[str, Collection[str]]:
    family, _, member = str(source).partition("/")
    if isinstance(source, str) and family in BUILT_IN and (not member or member in BUILT_IN[family]):
        members = (member,) if member else BUILT_IN[family]
        if family == "clusters":
            return _clusters(members)
        folder = data_dir() / "lexicons" / family
        return {name: read_lexicon(folder / f"{name}.txt", notes)[name] for name in members}
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError("lexicons", f"expected *.txt files in {path}, found none")
        found: dict[str, Collection[str]] = {}
        for file in files:
            for name, words in read_lexicon(file, notes).items():
                if name in found:
                    raise InputError("lexicons", f"expected different names, got {name!r} twice in {path}")
                found[name] = words
        return found
    if path.is_file():
        return read_lexicon(path, notes)
    known = [*BUILT_IN, *(f"{k}/{m}" for k, v in BUILT_IN.items() for m in v)]
    close = difflib.get_close_matches(str(source), known, n=2)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Built in: {', '.join(BUILT_IN)}."
    raise InputError("lexicons", f"expected a built-in name, a file or a folder, got {str(source)!r}", hint)


def read_lexicon(path: Path, notes: list[str] | None = None) -> dict[str, list[str]]:
    """Read one lexicon file, UTF-8.

    One word a line; blank lines and lines that start with ``#`` are skipped; the list is named
    after the file. Lines of the form ``name<TAB>word1,word2,…`` make one list per name instead;
    lines of one name add up (the released code of Qin et al. keeps only the last line).

    Raises :class:`~pllm_helpers.runtime.InputError` naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise InputError("lexicon", f"expected a file at {path}, found none") from e
    except UnicodeDecodeError as e:
        raise InputError(
            "lexicon", f"expected UTF-8 text in {path.name}, got other bytes at {e.start}", "Save it as UTF-8."
        ) from e
    lists: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, tab, rest = line.partition("\t")
        words = rest.split(",") if tab else [line]
        name = name.strip() if tab else path.stem
        words = [w.strip().casefold().replace("’", "'") for w in words if w.strip()]
        bad = next((w for w in words if not _WORD.fullmatch(w)), None)
        if bad is not None:
            expected = f"expected single words in line {number} of {path.name}, got {bad!r}"
            raise InputError("lexicon", expected, "Leave out spaces, digits and punctuation, or split the phrase.")
        if not name:
            raise InputError("lexicon", f"expected a name before the tab in line {number} of {path.name}")
        lists.setdefault(name, []).extend(words)
    if not any(lists.values()):
        raise InputError("lexicon", f"expected words in {path.name}, got none")
    for name, words in lists.items():
        repeated = len(words) - len(set(words))
        if repeated and notes is not None:
            notes.append(f"{name} in {path.name}: {repeated} repeated words")
        lists[name] = list(dict.fromkeys(words))
    return lists


def _clusters(members: Iterable[str]) -> dict[str, Collection[str]]:
    """Unions of empath's categories, read from the package's own file without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("empath")
    if spec is None or spec.origin is None:
        raise InputError("clusters", "expected the package empath, it is not installed", "Type: pip install empath.")
    table = Path(spec.origin).parent / "data" / "categories.tsv"
    rows = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip())
    categories = {name: words for name, *words in rows}
    out: dict[str, Collection[str]] = {}
    for member in members:
        missing = [c for c in CLUSTERS[member] if c not in categories]
        if missing:
            raise InputError("clusters", f"expected the categories {', '.join(missing)} in this version of empath")
        words = (w.replace("_", " ").strip().casefold() for c in CLUSTERS[member] for w in categories[c])
        out[member] = sorted({w for w in words if _WORD.fullmatch(w)})
    return out
