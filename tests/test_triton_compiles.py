"""The small kernels compile for every target, without a GPU; `make compile-kernels` does so with those of attention."""

import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler import ASTSource  # noqa: E402

from bench.kernel_variants import TARGETS, gpu_target  # noqa: E402
from triton_offset_bias.backends.triton.kernels.arguments import (  # noqa: E402
    Outputs,
    Parts,
    PrepareForm,
    Results,
    ResultStrides,
    Rows,
    Strides,
    Table,
    constants,
)
from triton_offset_bias.backends.triton.kernels.decode import combine_kernel  # noqa: E402
from triton_offset_bias.backends.triton.kernels.prepare import prepare_kernel  # noqa: E402
from triton_offset_bias.backends.triton.kernels.strip import (  # noqa: E402
    BLOCK,
    constants_kernel,
    fold_kernel,
)

pytestmark = pytest.mark.skipif(
    not isinstance(fold_kernel, triton.JITFunction), reason="Triton's interpreter is on, and compiles nothing"
)
HEAD = {"HEAD_DIM_V": 80, "BLOCK_DV": 128}
PLAIN = PrepareForm(
    **{"HAS_BIAS": True, "HAS_CONSTANTS": False, "IS_ZERO_BEYOND": False, "HEAD_DIM": 48, "BLOCK_D": 64},
    **HEAD,
    **{"HAS_DLSE": True, "SPLIT_LSE": False, "HAS_GATE": False, "IS_CUT": False},
)
GATED = PLAIN._replace(HAS_GATE=True, IS_CUT=True)
SPLIT = PLAIN._replace(HAS_CONSTANTS=True, IS_ZERO_BEYOND=True, HAS_DLSE=False, SPLIT_LSE=True)
FORMS = {
    "constants": (constants_kernel, {"BLOCK": BLOCK}),
    "fold": (fold_kernel, {"IS_ZERO_BEYOND": False, "BLOCK": BLOCK}),
    "fold, zeros": (fold_kernel, {"IS_ZERO_BEYOND": True, "BLOCK": BLOCK}),
    "prepare": (prepare_kernel, {"FORM": PLAIN, "BLOCK": BLOCK, "BLOCK_M": 64}),
    "prepare, split, constants, zeros": (prepare_kernel, {"FORM": SPLIT, "BLOCK": BLOCK, "BLOCK_M": 64}),
    "prepare, gate": (prepare_kernel, {"FORM": GATED, "BLOCK": BLOCK, "BLOCK_M": 64}),
    "combine": (combine_kernel, {**HEAD, "IS_PACKED": True, "BLOCK_S": 32}),
}
OF_TABLES = ("bias_ptr", "dbias_ptr")
FLOATS = ("unit", "limit")


def test_no_kernel_takes_more_than_25_arguments_and_no_helper_more_than_15():
    """What belongs together travels as one tuple."""
    functions = {
        x.__name__: len(x.params)
        for name, module in sys.modules.items()
        if name.startswith("triton_offset_bias.backends.triton.kernels.")
        for x in vars(module).values()
        if isinstance(x, triton.JITFunction)
    }
    assert len(functions) > 40
    too_long = {x: n for x, n in functions.items() if n > (25 if x.endswith("_kernel") else 15)}
    assert too_long == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORMS)
def test_a_small_kernel_compiles_for_every_target(name, target):
    """Tensors and tables are bfloat16, or tables are float64 with bounds of 64 bits."""
    kernel, named = FORMS[name]
    named = {x: PrepareForm(*constants(v)) if x == "FORM" else v for x, v in named.items()}
    of_rows = ("*fp32", "*fp32", "*fp32")
    strides = Strides("i32", "i32", "i32", "i32")
    tuples = {"rows": Rows(*of_rows), "parts": Parts(*of_rows), "outputs": Outputs("*bf16", *of_rows)}
    tuples |= {"results": Results("*bf16", "*bf16", *of_rows, "*bf16", "*fp32"), "out_strides": strides}
    tuples |= {"strides": ResultStrides(*[strides] * len(ResultStrides._fields))}
    for dtype, integer in (("bf16", "i32"), ("fp64", "i64"))[: 2 if name.startswith(("prepare", "fold")) else 1]:
        tuples["table"] = Table(f"*{dtype}", *of_rows)
        signature = {parameter.name: integer if parameter.name == "first" else "i32" for parameter in kernel.params}
        signature |= dict.fromkeys((x for x in signature if x.endswith("_ptr")), "*fp32")
        signature |= {x: f"*{dtype}" for x in OF_TABLES if x in signature}
        signature |= {x: "fp32" for x in FLOATS if x in signature}
        signature |= {x: "*i32" for x in ("cu_seqlens_q_ptr",) if x in signature}
        signature |= {x: tuples[x] for x in tuples if x in signature}
        signature |= dict.fromkeys(named, "constexpr")
        source = ASTSource(kernel, signature, named, {})
        compiled = triton.compile(source, target=gpu_target(target), options={"enable_fp_fusion": True})
        assert compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]
