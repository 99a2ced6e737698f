"""The planted mistakes of `mutations.py` still have their places in the code and their tests."""

import keyword
import re
from pathlib import Path

from mutants import ENGINE, KERNELS, PACKAGE, ROOT, Mutant, misplaced, places, planted

MUTANTS = (*KERNELS, *ENGINE, *PACKAGE)


def test_every_mistake_has_one_place_in_the_code():
    """This fails when code has moved away from a mistake."""
    assert misplaced(MUTANTS) == []


def test_every_mistake_names_tests_that_exist():
    """This fails when tests have moved away from a mistake."""
    folder = Path(__file__).parent
    assert [mutant.name for mutant in MUTANTS if not (folder / mutant.tests).is_file()] == []


def _renamed(text: str, name: str) -> str:
    return re.sub(rf"\b{name}\b", f"{name}_renamed", text)


def test_mistakes_outlive_the_renaming_of_a_name():
    """Each name of each mistake is renamed in its whole file. The same mistake is then found, alone or among others.

    Fewer than one in fifty have several places, because only a name told these places apart.
    """
    outcomes = []
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        with_mistake = planted(mutant, source)
        for name in sorted(set(re.findall(r"\b[A-Za-z_]\w*", mutant.old))):
            if not keyword.iskeyword(name):
                renamed, expected = _renamed(source, name), _renamed(with_mistake, name)
                found = [renamed[:start] + new + renamed[end:] for start, end, new in places(mutant, renamed)]
                assert "".join(expected.split()) in ["".join(x.split()) for x in found], (mutant, name)
                outcomes.append(len(found) == 1)
    assert sum(outcomes) > 0.98 * len(outcomes)


def test_a_mistake_is_found_under_other_names_and_line_breaks_and_not_where_more_has_changed():
    """The planted text has the names of its place. Code with another operator or too many other names is no place."""
    mutant = Mutant("", "", "", "", "total = total + step * scale", "total = step * scale")
    assert planted(mutant, "x = 1\nacc = acc + step\n * scale\n") == "x = 1\nacc = step * scale\n"
    for other in ("total = other + step * scale", "total = total - step * scale", "a = a + b * scale"):
        assert places(mutant, other) == []
