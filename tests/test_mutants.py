"""The planted mistakes, which `mutations.py` shows that the tests see, have to be where the code is now."""

from pathlib import Path

from mutants import ENGINE, KERNELS, PACKAGE, misplaced

MUTANTS = (*KERNELS, *ENGINE, *PACKAGE)


def test_every_mistake_has_one_place_in_the_code():
    """Or else code has moved."""
    assert misplaced(MUTANTS) == []


def test_every_mistake_names_tests_that_exist():
    """Or else tests have."""
    folder = Path(__file__).parent
    assert [mutant.name for mutant in MUTANTS if not (folder / mutant.tests).is_file()] == []
