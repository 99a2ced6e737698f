"""The release: a source distribution, the wheel made from it, and their installation in a clean environment.

The engine is compiled without optimisation here, because this is quick. `test_engine.py` tests the optimised builds.
`TEST_WHEEL=FILE`, which `make wheel` sets, tests that wheel in place of one that is made here.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from bare import REQUIRE_ALL, skip_without

import triton_offset_bias
from triton_offset_bias.backends import cpp

ROOT = Path(__file__).parents[1]
NAME = f"triton_offset_bias-{triton_offset_bias.__version__}"
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so")
QUICKSTART = re.search(r"^```python\n(import torch\n.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
PACKAGE = {str(path.relative_to(ROOT)) for path in (ROOT / "triton_offset_bias").rglob("*.py")}
PACKAGE |= {"triton_offset_bias/py.typed"}
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(sys.platform == "win32", reason="compiles by a shell script"),
    pytest.mark.skipif(not (shutil.which("c++") or REQUIRE_ALL), reason="compiles the engine, and finds no c++"),
    skip_without("pip", "setuptools"),
]


def _run(*command: str | Path, folder: Path, **environment: str) -> str:
    """The output of a command in a folder, without this process's settings of Python, pip, Triton and the engine."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "PIP"))}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(kind: str, source: Path, folder: Path, **environment: str) -> Path:
    """The sdist or wheel that the build backend makes of a source tree, called as pip calls it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / _run(sys.executable, "-I", "-c", code, folder=source, **environment).splitlines()[-1]


def _environment(folder: Path) -> Path:
    """The Python of a new virtual environment, which sees what is installed here but for editable packages, as ours."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    Path(packages, "installed_here.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def _install(python: Path, package: Path, **environment: str) -> None:
    """Installs a file with pip, from nowhere else."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, package]
    _run(*command, folder=package.parent, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of this checkout, in which no build has left anything."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCES)
    return _build("sdist", folder / "checkout", folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from what is in the sdist, or given."""
    if "TEST_WHEEL" in os.environ:
        return (ROOT / os.environ["TEST_WHEEL"]).resolve(strict=True)
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, folder)
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    return _build("wheel", folder / NAME, folder, CC=str(compiler), CXX=str(compiler))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the wheel is installed."""
    python = _environment(tmp_path_factory.mktemp("environment"))
    _install(python, wheel)
    return python


def test_the_sdist_holds_what_the_wheel_is_made_from_and_nothing_else(sdist: Path) -> None:
    """It has the package, the engine's sources, the files that build them, licence, readme and changelog."""
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames() if archive.getmember(name).isfile()}
    engine = {f"csrc_ref/{path.name}" for path in (ROOT / "csrc_ref").iterdir()}
    about = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    generated = {name for name in names if name.startswith("triton_offset_bias.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names == PACKAGE | engine | about | generated


def test_the_wheel_holds_the_package_every_build_of_the_engine_and_the_mark_of_types(wheel: Path) -> None:
    """The wheel's files are listed one by one. One wheel serves every Python from 3.10 on."""
    files = (entry.filename for entry in zipfile.ZipFile(wheel).infolist() if not entry.is_dir())
    names = {name for name in files if not name.startswith(f"{NAME}.dist-info/")}
    builds = cpp.BUILDS if platform.machine().lower() in ("x86_64", "amd64") else ("portable",)
    assert names == PACKAGE | {f"triton_offset_bias/_engine_{build}.abi3.so" for build in builds}
    assert f"{NAME}.dist-info/licenses/LICENSE" in zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"{NAME}-cp310-abi3-")


WHERE = """
import triton_offset_bias
from triton_offset_bias.backends import cpp
print(triton_offset_bias.__file__, cpp.build_description(), sep="\\n")
"""


@pytest.mark.parametrize("build", ["", "portable"])
def test_the_readmes_quickstart_runs_on_the_installed_wheel(python: Path, tmp_path: Path, build: str) -> None:
    """It runs on the best build of the engine, and on the build that needs no AVX2, where no compiler is found."""
    environment = {cpp.BUILD_VARIABLE: build, "PATH": str(python.parent)}
    assert not any(
        shutil.which(compiler, path=environment["PATH"]) for compiler in ("cc", "c++", "gcc", "g++", "clang")
    )
    printed = _run(python, "-c", QUICKSTART + WHERE, folder=tmp_path, **environment)
    file, description = printed.splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert description.startswith("portable (128-bit vectors" if build else cpp.BUILDS)


def test_the_tests_of_a_released_wheel_need_only_what_is_copied_for_them(python: Path, tmp_path: Path) -> None:
    """cibuildwheel copies `test-sources` and runs `test-command` on the installed wheel; here the tests are listed."""
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"\"([^\"]+)\"", re.search(r"^test-sources = (.*)$", project, re.MULTILINE)[1]):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = re.search(r"^test-command = \"(.*)\"$", project, re.MULTILINE)[1].split()
    printed = _run(python, "-m", *command, "--collect-only", folder=tmp_path, TESTS_REQUIRE_ALL="1")
    assert all(f"{file}::" in printed for file in command[1:])


REFERENCE_SERVES = """
same = offset_bias_attention(query, key, value, bias, is_causal=True, backend="reference")
assert torch.equal(out, same)
"""


def test_without_a_compiler_the_sdist_installs_and_the_reference_serves(sdist: Path, tmp_path: Path) -> None:
    """`info` tells that the engine is missing."""
    python = _environment(tmp_path / "environment")
    _install(python, sdist, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    file, description = _run(python, "-c", QUICKSTART + REFERENCE_SERVES + WHERE, folder=tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert description == "not built"
    printed = _run(python, "-m", "triton_offset_bias.info", folder=tmp_path)
    assert "cpp: cannot serve" in printed
    assert "the engine was not compiled: install a C++ compiler" in printed
    assert "reference: ready" in printed


@skip_without("mypy")
def test_a_type_checker_finds_the_types_of_the_public_api(python: Path, tmp_path: Path) -> None:
    """mypy --strict checks a user's program against the installed wheel."""
    shutil.copy(ROOT / "tests" / "typing_sample.py", tmp_path)
    cache = ROOT / ".mypy_cache" / "packaging"  # torch takes mypy a while, the first time
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", f"--python-executable={python}"]
    printed = _run(sys.executable, "-m", "mypy", *options, "typing_sample.py", folder=tmp_path)
    assert printed.strip() == "Success: no issues found in 1 source file"
