"""What a mistake is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
Row = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Mutant:
    """A mistake: `new` in the place of `old`, which its file holds once.

    Attributes:
        file: from the repository's root on.
        name: what is wrong.
        tests: the file in tests/ that sees it.
        wanted: which of its tests, as pytest's -k has it.
        old, new: text.
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
    """What is wrong with those whose code has moved: `old` must be in the file once, and not be `new`."""
    wrong = []
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.name!r}: must be in {mutant.file} once and change it, is there {count} times")
    return wrong
