"""Checks the CPU engine with the compiler's warnings, in every build of `setup.py`, without making code.

python tests/lint_engine.py
"""

import os
import subprocess
import sys
from pathlib import Path

# setuptools brings the distutils that newer Pythons no longer have.
import setuptools  # noqa: F401  # isort: skip
from distutils.core import run_setup

ROOT = Path(__file__).parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-fsyntax-only")


def main() -> None:
    """Compiles each build up to its warnings. The exit status is 1 if there is one."""
    extensions = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules
    compiler = os.environ.get("CXX", "c++")
    commands = [[compiler, *extension.extra_compile_args, *WARNINGS, *extension.sources] for extension in extensions]
    sys.exit(any(subprocess.run(command, cwd=ROOT).returncode for command in commands))


if __name__ == "__main__":
    main()
