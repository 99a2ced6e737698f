"""Helpers for tests on a machine that lacks a library, memory, or the requested device."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
REQUIRE_ALL = os.environ.get("TESTS_REQUIRE_ALL") == "1"
LARGE_MEMORY = 2e9  # bytes; what takes more is marked
# What pip, and the `dev` extra of pyproject.toml, bring beside pytest, by the names that Python imports.
OPTIONAL = {
    *("accelerate", "hypothesis", "matplotlib", "mypy", "pandas", "pip", "psutil", "setuptools", "sklearn", "tqdm"),
    *("chronos", "datasets", "diffusers", "peft", "sentence_transformers", "timm", "tokenizers", "torchvision"),
    *("transformers", "x_transformers"),
}
# What `make test` does not bring, each with the command that does.
SEPARATE = dict.fromkeys(("timm", "torchvision"), "make test-timm")


class OptionalModule(pytest.Module):
    """A file of tests that are skipped if an optional library that the file imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """The tests; an import that fails for any other reason is an error."""
        try:
            return super().collect()
        except self.CollectError as error:
            missing = getattr(error.__cause__, "name", None) or ""
            library = missing.partition(".")[0]
            is_optional = isinstance(error.__cause__, ModuleNotFoundError) and library in OPTIONAL
            if not is_optional or (REQUIRE_ALL and library not in SEPARATE):
                raise
            way = f": run {SEPARATE[library]}" if library in SEPARATE else ""
            pytest.skip(f"{missing} is not installed{way}", allow_module_level=True)


def skip_without(*libraries: str) -> pytest.MarkDecorator:
    """A mark that skips a test if one of the optional libraries is not installed."""
    missing = [name for name in libraries if name in OPTIONAL and not _is_installed(name)]
    return pytest.mark.skipif(bool(missing) and not REQUIRE_ALL, reason=f"{', '.join(missing)} is not installed")


def _is_installed(library: str) -> bool:
    if library == "pip":  # setuptools' finder takes a look at pip's modules for a run of pip, and hides its distutils
        return any(importlib.metadata.distributions(name="pip"))
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def has_device(device: str) -> bool:
    """Whether torch can make tensors on the device."""
    kind = torch.device(device).type
    return kind in ("cpu", "meta") or torch.get_device_module(kind).is_available()


def lacking_memory(item: pytest.Item, device: str) -> str:
    """The reason why a test marked `large_memory(gigabytes)` does not fit into the free memory, or "" if it fits."""
    mark = item.get_closest_marker("large_memory")
    if mark is None or torch.device(device).type != "cuda":
        return ""
    free = torch.cuda.mem_get_info()[0] / 1e9
    return f"needs {mark.args[0]} GB of device memory, {free:.1f} are free" if free < mark.args[0] else ""


@contextmanager
def watched_memory(item: pytest.Item, device: str) -> Iterator[None]:
    """Fails a test that takes more memory on a CUDA device than is allowed without the mark `large_memory`."""
    if torch.device(device).type != "cuda" or item.get_closest_marker("large_memory"):
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    taken = torch.cuda.max_memory_allocated() - before
    if taken > LARGE_MEMORY:
        pytest.fail(f"takes {taken / 1e9:.1f} GB of device memory: mark it large_memory(gigabytes)", pytrace=False)


def own_warnings() -> str:
    """The filter that makes a warning an error if this project's own modules raise it or are blamed for it."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    modules = {"triton_offset_bias", "bench", "mutants", "__readme__", *(file.stem for file in files)}
    return f"error:::({'|'.join(sorted(map(re.escape, modules)))})(\\.|$)"
