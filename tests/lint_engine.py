"""Checks the CPU engine with the compiler's warnings, without making code: every build of `setup.py`, and of tests.

python tests/lint_engine.py
"""

import os
import subprocess
import sys
from pathlib import Path

# setuptools brings the distutils that newer Pythons no longer have.
import setuptools  # noqa: F401  # isort: skip
from distutils.core import run_setup

from emulated import FLAGS, portable_flags

ROOT = Path(__file__).parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-fsyntax-only")


def main() -> None:
    """Compiles each build up to its warnings. The exit status is 1 if there is one."""
    extensions = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules
    compiler = os.environ.get("CXX", "c++")
    builds = [extension.extra_compile_args for extension in extensions]
    builds += [[*portable_flags(), *flags] for flags in FLAGS.values()]
    commands = [[compiler, *flags, *WARNINGS, "csrc_ref/engine.cpp"] for flags in builds]
    sys.exit(any(subprocess.run(command, cwd=ROOT).returncode for command in commands))


if __name__ == "__main__":
    main()
