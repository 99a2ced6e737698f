"""Planted mistakes and their places in the source, which are found even when names or line breaks have changed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
Row = tuple[str, str, str, str, str]
_TOKEN = re.compile(r"\w+|[^\w\s]")
_NAME = re.compile(r"\b[A-Za-z_]\w*")


@dataclass(frozen=True)
class Mutant:
    """A mistake: the text `new` in place of `old`. The file holds `old` once, or with other names (see `places`).

    Attributes:
        file: the path from the repository's root.
        name: the mistake in words.
        tests: the file in tests/ that sees the mistake.
        wanted: the tests of that file, as an expression for pytest's -k.
        old, new: the text without and with the mistake.
    """

    file: str
    name: str
    tests: str
    wanted: str
    old: str
    new: str


def mutants_in(folder: str, rows: dict[str, list[Row]]) -> list[Mutant]:
    """The mistakes in the files of a folder, each listed without its file."""
    return [Mutant(f"{folder}/{file}", *row) for file, listed in rows.items() for row in listed]


def misplaced(mutants: Sequence[Mutant]) -> list[str]:
    """Messages about mistakes whose code has changed. A mistake must have one place in its file, and change it."""
    wrong = []
    for mutant in mutants:
        source = (ROOT / mutant.file).read_text()
        found = places(mutant, source)
        if len(found) != 1 or mutant.old == mutant.new:
            where = ", ".join(f"in line {1 + source[:start].count(chr(10))}" for start, _, _ in found) or "nowhere"
            wrong.append(f"{mutant.name!r}: must be in {mutant.file} once and change it, is {where}: {mutant.old}")
    return wrong


def planted(mutant: Mutant, source: str) -> str:
    """The source with the mistake in its one place."""
    ((start, end, new),) = places(mutant, source)
    return source[:start] + new + source[end:]


def places(mutant: Mutant, source: str) -> list[tuple[int, int, str]]:
    """The places of `old` in the source, with the text to put there: start, end, text.

    If the exact text is nowhere, line breaks and spaces do not count, and one name, or up to half of the names, may
    have changed. A changed name must be the same everywhere; `new` is changed likewise. The places with the fewest
    changed names are taken.
    """
    begin, end = (r"\b" if re.match(r"\w", edge) else "" for edge in (mutant.old[0], mutant.old[-1]))
    if exact := [(*match.span(), mutant.new) for match in re.finditer(begin + re.escape(mutant.old) + end, source)]:
        return exact
    wanted, tokens = _TOKEN.findall(mutant.old), list(_TOKEN.finditer(source))
    texts = [token[0] for token in tokens]
    found = []
    for first in range(len(texts) - len(wanted) + 1):
        names = _renaming(wanted, texts[first : first + len(wanted)])
        if names is not None:
            new = _NAME.sub(lambda match, names=names: names.get(match[0], match[0]), mutant.new.strip())
            place = tokens[first].start(), tokens[first + len(wanted) - 1].end(), new
            found.append((_num_changed(names), place))
    fewest = min((count for count, _ in found), default=0)
    return [place for count, place in found if count == fewest]


def _renaming(wanted: list[str], texts: list[str]) -> dict[str, str] | None:
    """The name in `texts` for each name of `wanted`; None if more than names differ, or too many names."""
    names: dict[str, str] = {}
    for old, other in zip(wanted, texts, strict=True):
        if _NAME.match(old) and _NAME.match(other):
            if names.setdefault(old, other) != other:
                return None
        elif old != other:
            return None
    is_one_to_one = len(set(names.values())) == len(names)
    return names if is_one_to_one and _num_changed(names) <= max(1, len(names) // 2) else None


def _num_changed(names: dict[str, str]) -> int:
    return sum(old != other for old, other in names.items())
