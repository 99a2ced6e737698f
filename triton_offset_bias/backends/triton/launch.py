"""Launches a kernel with its configuration, or with the fastest one measured where the user asks for tuning.

`TRITON_OFFSET_BIAS_AUTOTUNE=1` measures the candidates of `configs` on this machine, the first time that a kernel meets
a head dim, dtype and kind of bias; Triton's cache on disk remembers the result.
"""

import functools
import os
from typing import Any

import triton
import triton.language as tl

from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.kernels.arguments import Form, Loops

AUTOTUNE_VARIABLE = "TRITON_OFFSET_BIAS_AUTOTUNE"


def run_kernel(
    kernel: Any,
    config: configs.Config,
    blocks: tuple[int, int, str],
    others: str,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    added_to: str | None = None,
) -> None:
    """Launches one program for each block of rows of each head.

    Args:
        kernel: a jitted function, whose BLOCK_* come from `config`.
        config: the configuration unless the user asks for tuning.
        blocks: the number of heads, the rows of each, and the name of the constant that is a program's number of rows.
        others: the size that a program loops over, in tiles that may leave a rest: "len_q" | "len_k".
        arguments: by position, one of them `Sizes`.
        constants: the kernel's other constants, `FORM` and `LOOPS` among them.
        added_to: the name of the argument that the kernel adds to, if it does: tuning runs it several times.
    """
    heads, rows, axis = blocks

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (heads * -(-rows // meta[axis]),)

    if os.environ.get(AUTOTUNE_VARIABLE) == "1" and _name(kernel) in configs.CANDIDATES:
        _tuned(kernel, others, added_to)[grid](*arguments, **constants, enable_fp_fusion=True)
    else:
        sizes = {name: config.sizes[name] for name in configs.BLOCKS if name in kernel.arg_names}
        named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants, **sizes}
        constants = {**constants, "LOOPS": _loops(named, others)}
        kernel[grid](*arguments, **constants, **sizes, **config.options)


def _loops(arguments: dict[str, Any], others: str) -> Loops:
    """The loops, with REST where tiles may leave a rest, as in sequences whose lengths the host does not know."""
    block = arguments["BLOCK"] if "BLOCK" in arguments else arguments[{"len_q": "BLOCK_M", "len_k": "BLOCK_N"}[others]]
    form = arguments["FORM"]
    is_unknown = form.IS_PACKED.value or (form.HAS_LENGTHS.value and others == "len_k")
    has_rest = is_unknown or getattr(arguments["sizes"], others) % block != 0
    return arguments["LOOPS"]._replace(REST=tl.constexpr(has_rest))


def _name(kernel: Any) -> str:
    return kernel.__name__.removesuffix("_kernel")


@functools.cache
def _tuned(kernel: Any, others: str, added_to: str | None) -> Any:
    """The kernel with BLOCK_*, warps and stages from measurements."""
    blocks = [name for name in configs.BLOCKS if name in kernel.arg_names]
    candidates = [
        triton.Config(
            {name: config.sizes[name] for name in blocks}, num_warps=config.num_warps, num_stages=config.num_stages
        )
        for config in configs.CANDIDATES[_name(kernel)]
    ]
    key = [constant for constant in kernel.arg_names if constant.isupper() and constant not in configs.BLOCKS]
    rules = {"LOOPS": functools.partial(_loops, others=others)}
    hook = None if added_to is None else functools.partial(_forget, added_to)
    tuner = triton.autotune(candidates, key, pre_hook=hook, cache_results=True)(triton.heuristics(rules)(kernel))
    look_up = tuner.check_disk_cache

    def check_disk_cache(tuning_key: tuple[Any, ...], *rest: Any) -> bool:
        """Looks a key up like the tuner's own method, with plain values: its file on disk, JSON, has no constexprs."""
        plain = tuple(_plain(x) for x in tuning_key)
        is_known: bool = look_up(plain, *rest)
        if is_known:
            tuner.cache[tuning_key] = tuner.cache[plain]
        return is_known

    tuner.check_disk_cache = check_disk_cache
    return tuner


def _plain(x: Any) -> Any:
    """The plain values of a `Form` or `Loops`; anything else as it is."""
    return tuple(member.value for member in x) if isinstance(x, Form | Loops) else x


def _forget(added_to: str, arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Zeroes, before each run of a candidate, the sums of the last run."""
    if arguments.get(added_to) is not None:
        arguments[added_to].zero_()
