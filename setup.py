"""Builds the CPU engine: a shared library for each instruction set, loaded by ctypes. Building needs no torch."""

import copy
import glob
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -ffp-contract=fast makes a * b + c one fused multiply-add. Nothing else departs from IEEE arithmetic.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# The engine is compiled for OpenMP, but not linked to a runtime. At load time its calls bind to torch's runtime.
OPENMP_ARGS = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
BUILDS = {"portable": ["-DTOB_VECTOR_BYTES=16"]}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["avx2"] = ["-DTOB_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{subset}" for subset in ("f", "bw", "dq", "vl")]
    BUILDS["avx512"] = ["-DTOB_VECTOR_BYTES=64", "-mavx2", "-mfma", "-mf16c", *avx512, "-mprefer-vector-width=512"]
    BUILDS["avx512_bf16"] = [*BUILDS["avx512"], "-mavx512bf16"]
    BUILDS["amx"] = [*BUILDS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
HEADERS = sorted(glob.glob("csrc_ref/*.h", root_dir=Path(__file__).parent))

# optional: without a compiler the package still installs. `python -m triton_offset_bias.info` says what is missing.
# MSVC has no vector extensions, so on Windows there is no engine.
EXTENSIONS = [
    Extension(
        f"triton_offset_bias._engine_{name}",
        sources=["csrc_ref/engine.cpp"],
        depends=HEADERS,
        extra_compile_args=[*COMPILE_ARGS, *OPENMP_ARGS, *flags],
        py_limited_api=True,
        optional=True,
    )
    for name, flags in BUILDS.items()
]


class BuildEngine(build_ext):
    """Compiles the builds at the same time, each with a folder of its own for its object files."""

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        build = copy.copy(self)
        build.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildEngine, build).build_extension(ext)


setup(
    ext_modules=[] if sys.platform == "win32" else EXTENSIONS,
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": True}},
)
