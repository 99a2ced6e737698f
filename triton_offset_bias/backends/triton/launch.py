"""Launches a kernel by its configuration, or by the fastest one where the user asks for that.

`TRITON_OFFSET_BIAS_AUTOTUNE=1` measures the candidates of `configs` on this machine, the first time that a kernel meets
a head dim, dtype and kind of bias; Triton's cache on disk remembers the result.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import triton

from triton_offset_bias.backends.triton import configs

AUTOTUNE_VARIABLE = "TRITON_OFFSET_BIAS_AUTOTUNE"

# Constants that say whether blocks fill a length, and that length.
_EVEN = {"EVEN_M": "len_q", "EVEN_N": "len_k"}


def run_kernel(
    kernel: Any,
    config: configs.Config,
    blocks: tuple[int, int, str],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """One program for each block of rows of each head.

    Args:
        kernel: a jitted function, whose constants EVEN_*, BLOCK_* come from `config`.
        config: what is used unless the user asks for tuning.
        blocks: the number of heads, the rows of each, and the name of the constant that says how many a program has.
        arguments: by position.
        constants: the kernel's other constants.
    """
    heads, rows, axis = blocks

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (heads * -(-rows // meta[axis]),)

    if os.environ.get(AUTOTUNE_VARIABLE) == "1" and _name(kernel) in configs.CANDIDATES:
        _tuned(kernel)[grid](*arguments, **constants, enable_fp_fusion=True)
    else:
        _evenness(kernel)[grid](*arguments, **constants, **_blocks(kernel, config), **config.options)


def _name(kernel: Any) -> str:
    return kernel.__name__.removesuffix("_kernel")


def _blocks(kernel: Any, config: configs.Config) -> dict[str, int]:
    """The kernel's constants that are block sizes; BLOCK is that of square tiles."""
    sizes = {"BLOCK": config.block_m, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    return {name: size for name, size in sizes.items() if name in kernel.arg_names}


@functools.cache
def _evenness(kernel: Any) -> Any:
    """The kernel, with its EVEN_* filled in."""

    def is_even(flag: str) -> Callable[[dict[str, Any]], bool]:
        block = "BLOCK" if "BLOCK" in kernel.arg_names else flag.replace("EVEN", "BLOCK")
        return lambda arguments: not arguments["IS_PACKED"] and arguments[_EVEN[flag]] % arguments[block] == 0

    rules = {flag: is_even(flag) for flag in _EVEN if flag in kernel.arg_names}
    return triton.heuristics(rules)(kernel)


@functools.cache
def _tuned(kernel: Any) -> Any:
    """The kernel, with its BLOCK_*, warps and stages measured."""
    candidates = [
        triton.Config(_blocks(kernel, config), num_warps=config.num_warps, num_stages=config.num_stages)
        for config in configs.CANDIDATES[_name(kernel)]
    ]
    chosen = ("BLOCK", "BLOCK_M", "BLOCK_N", *_EVEN)
    key = [constant for constant in kernel.arg_names if constant.isupper() and constant not in chosen]
    tune = triton.autotune(candidates, key, pre_hook=_forget_dbias, cache_results=True)
    return tune(_evenness(kernel))


def _forget_dbias(arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Before each run of a candidate: what the last one has added to dbias goes."""
    if arguments.get("DBIAS", "none") != "none":
        arguments["dstrip_ptr"].zero_()
