"""Launches a kernel with its configuration, or with the fastest one measured where the user asks for tuning.

`TRITON_OFFSET_BIAS_AUTOTUNE=1` measures the candidates of `configs` on this machine, the first time that a kernel meets
a head dim, dtype and kind of bias; Triton's cache on disk remembers the result.
"""

import functools
import os
from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl

from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.kernels.arguments import Form, Loops, Wanted
from triton_offset_bias.backends.triton.target import current_target

AUTOTUNE_VARIABLE = "TRITON_OFFSET_BIAS_AUTOTUNE"


class Launch:
    """A launch of a kernel, complete but for pointers. It may be repeated with other tensors of the same layout.

    Triton finds the compiled kernel for a launch from all of its arguments, which takes longer than all else. All but
    the pointers are fixed here. So the kernel that Triton found for aligned pointers is kept, and launched as Triton's
    own `JITFunction.run` does. On AMD GPUs the kernel also depends on the sizes of tensors, and Triton is always asked.
    """

    def __init__(self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Takes the arguments after the pointers by position, and by name the constants and the compiler's options."""
        self.kernel = kernel
        self._programs = programs
        self._numbers = numbers
        self.constants = constants
        self._compiled: Any = None
        # Launches pass constants too, in the order of the kernel's parameters, and ignore them.
        self._rest = (*numbers, *(constants.get(name) for name in kernel.arg_names if name.isupper()))

    def __call__(self, is_aligned: bool, *pointers: Any) -> None:
        """Launches the kernel. `is_aligned` says whether each pointer is a multiple of 16 bytes."""
        if self._compiled is not None and is_aligned:
            self._run(self._compiled, (*pointers, *self._rest))
            return
        compiled = self.kernel[(self._programs,)](*pointers, *self._numbers, **self.constants)
        if is_aligned and isinstance(self.kernel, triton.JITFunction) and _is_found_by_types():
            self._compiled = compiled

    def _run(self, compiled: Any, arguments: tuple[Any, ...]) -> None:
        driver, hooks, grid = triton.runtime.driver.active, triton.knobs.runtime, (self._programs, 1, 1)
        stream = driver.get_current_stream(driver.get_current_device())
        enter, leave = _unless_empty(hooks.launch_enter_hook), _unless_empty(hooks.launch_exit_hook)
        metadata = None if enter is None else compiled.launch_metadata(grid, stream, *arguments)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments)


def _is_found_by_types() -> bool:
    """Whether Triton's choice of a compiled kernel depends on nothing but types, constants, alignment and numbers."""
    return triton.runtime.driver.active.get_current_target().backend == "cuda"


def _unless_empty(hook: Any) -> Any:
    """A hook that profilers have around launches, or None for a chain of no hooks: Triton then calls nothing."""
    return hook if getattr(hook, "calls", hook) else None


def compiler_settings() -> Hashable:
    """Settings of Triton that select other compiled kernels."""
    knobs = triton.knobs
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


def is_tuned() -> bool:
    """Whether the user asks for tuning."""
    return os.environ.get(AUTOTUNE_VARIABLE) == "1"


def blocked_launch(
    kernel: Any,
    config: configs.Config,
    blocks: tuple[int, int, str],
    others: str,
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    added_to: str | None = None,
) -> "Launch | TunedLaunch":
    """The launch of one program for each block of rows of each head.

    Args:
        kernel: a jitted function, whose BLOCK_* come from `config`.
        config: the configuration unless the user asks for tuning.
        blocks: the number of heads, the rows of each, and the name of the constant that is a program's number of rows.
        others: the size that a program loops over, in tiles that may leave a rest: "len_q" | "len_k".
        numbers: the arguments after the pointers, by position.
        constants: the kernel's other constants, `FORM` and `LOOPS` among them.
        added_to: the name of the argument that the kernel adds to, if it does: tuning runs it several times. It is a
            tensor, or a tuple of tensors.
    """
    heads, rows, axis = blocks
    if is_tuned() and _name(kernel) in configs.CANDIDATES:
        return TunedLaunch(kernel, blocks, others, numbers, constants, added_to)
    sizes = {name: config.sizes[name] for name in configs.BLOCKS if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if not name.isupper()][-len(numbers) :]
    loops = with_rest({**dict(zip(names, numbers, strict=True)), **constants, **sizes}, others)
    programs = heads * -(-rows // sizes[axis])
    return Launch(kernel, programs, numbers, {**constants, "LOOPS": loops, **sizes, **config.options})


class TunedLaunch:
    """A `Launch` whose configuration is the fastest one measured."""

    def __init__(
        self,
        kernel: Any,
        blocks: tuple[int, int, str],
        others: str,
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        added_to: str | None,
    ) -> None:
        """Takes what `blocked_launch` does."""
        heads, rows, axis = blocks
        self._grid = lambda meta: (heads * -(-rows // meta[axis]),)
        self._tuner = _tuned(kernel, others, added_to)
        self._numbers, self._constants = numbers, constants

    def __call__(self, is_aligned: bool, *pointers: Any) -> None:
        """Launches the kernel, the first time with every candidate."""
        self._tuner[self._grid](*pointers, *self._numbers, **self._constants, enable_fp_fusion=True)


def with_rest(arguments: dict[str, Any], others: str) -> Loops:
    """The loops, with REST where tiles may leave a rest, as in sequences whose lengths the host does not know.

    The lengths of both sides count, but for decoding: without a rest, kernels take both for multiples of 16. Where they
    add to sums that programs share, blocks of keys must leave no rest either.
    """
    block = arguments["BLOCK"] if "BLOCK" in arguments else arguments[{"len_q": "BLOCK_M", "len_k": "BLOCK_N"}[others]]
    form = arguments["FORM"]
    is_unknown = form.IS_PACKED.value or (form.HAS_LENGTHS.value and others == "len_k")
    is_odd = "num_splits" not in arguments and (arguments["len_q"] % 16 != 0 or arguments["len_k"] % 16 != 0)
    adds = "WANTED" in arguments and (arguments["WANTED"].DQ.value or arguments["WANTED"].DBIAS.value)
    has_ragged_keys = adds and arguments["len_k"] % arguments["BLOCK_N"] != 0
    has_rest = is_unknown or is_odd or has_ragged_keys or arguments[others] % block != 0
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
    rules = {"LOOPS": functools.partial(with_rest, others=others)}
    hook = None if added_to is None else functools.partial(_forget, added_to)
    prune = {"early_config_prune": functools.partial(_with_room, _name(kernel))}
    tune = triton.autotune(candidates, key, prune_configs_by=prune, pre_hook=hook, cache_results=True)
    tuner = tune(triton.heuristics(rules)(kernel))
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


def _with_room(name: str, candidates: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The candidates that the kernel can take, and for which shared memory may have room.

    The smallest has none of the stages that take room.
    """
    sums_diagonals = "WANTED" in constants and constants["WANTED"].DBIAS.value
    dtype, block_d = arguments["inputs"].q.dtype, constants["FORM"].BLOCK_D.value

    def may_fit(candidate: Any) -> bool:
        rows, columns = (candidate.kwargs.get(size, candidate.kwargs.get("BLOCK")) for size in ("BLOCK_M", "BLOCK_N"))
        config = configs.Config(rows, columns, candidate.num_warps, candidate.num_stages)
        if sums_diagonals and columns % rows != 0:
            return False
        return configs.may_fit(name, config, current_target(), dtype, block_d)

    return [candidate for candidate in candidates if may_fit(candidate)]


def _plain(x: Any) -> Any:
    """The plain values of a tuple of constants; anything else as it is."""
    return tuple(member.value for member in x) if isinstance(x, Form | Loops | Wanted) else x


def _forget(added_to: str, arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Zeroes, before each run of a candidate, the sums of the last run."""
    sums = arguments.get(added_to)
    for x in sums if isinstance(sums, tuple) else (sums,):
        if x is not None:
            x.zero_()
