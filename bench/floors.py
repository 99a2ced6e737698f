"""The floors under the time of an attention: its products at the processor's peak, and its powers of 2.

The peak is the rate of the instructions by which the loaded build of the engine multiplies: vectors, or AMX tiles.
`floors.cpp` has the loops that measure it. It is compiled with the flags of that build.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

# setuptools brings the distutils that newer Pythons no longer have.
import setuptools  # noqa: F401  # isort: skip
from distutils.core import run_setup

from bench.rows import ROOT
from bench.steps import Step
from triton_offset_bias.backends import cpp

STEPS = {"float32": 1_000_000, "bfloat16": 1_000_000, "powers": 40_000}  # a few milliseconds


class Floors:
    """Compiled loops: steps to time, and what each of them does.

    Attributes:
        products: a step of products, as a problem of the dtype multiplies.
        operations: floating point operations in it.
        powers: a step of powers of 2.
        count: powers in it.
    """

    def __init__(self, dtype: str) -> None:
        """Compiles the loops.

        Raises:
            RuntimeError: there is no engine, or no compiler, or the compiler refuses.
        """
        library = _compiled()
        multiply, make_powers = getattr(library, f"multiply_{dtype}"), library.make_powers
        for function in (multiply, make_powers):
            function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
        self.operations, self.count = multiply(STEPS[dtype]), make_powers(STEPS["powers"])
        self.products = Step(lambda _: multiply(STEPS[dtype]))
        self.powers = Step(lambda _: make_powers(STEPS["powers"]))


def _compiled() -> ctypes.CDLL:
    if reasons := cpp.unavailable_reasons():
        raise RuntimeError(reasons[0])
    extensions = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules
    flags = next(x.extra_compile_args for x in extensions if x.name.endswith(f"_engine_{cpp.BUILD}"))
    compiler, source = os.environ.get("CXX", "c++"), Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "floors.so")
        command = [compiler, *flags, "-fPIC", "-shared", "-w", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"there is no compiler {compiler}") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{compiler} refused {source.name}: {error.stderr.strip()[:200]}") from error
        return ctypes.CDLL(str(library))
