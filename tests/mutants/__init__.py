"""Mistakes that the tests have to see; `mutations.py` plants one at a time."""

from mutants.engine import ENGINE
from mutants.kernels import KERNELS
from mutants.mutant import ROOT, Mutant, misplaced, places, planted
from mutants.package import PACKAGE

__all__ = ["ENGINE", "KERNELS", "PACKAGE", "ROOT", "Mutant", "misplaced", "places", "planted"]
