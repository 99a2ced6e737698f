"""Every form in which the GPU kernels ship, for compilation without a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.kernels.arguments import (
    Dropout,
    Factors,
    Form,
    Inputs,
    Layout,
    Loops,
    Outputs,
    Parts,
    QueryGradients,
    Rows,
    Strides,
    StripStrides,
    Sums,
    TableRows,
    Wanted,
    constants,
)
from triton_offset_bias.backends.triton.kernels.backward_bias import dbias_kernel
from triton_offset_bias.backends.triton.kernels.backward_keys import dkey_dvalue_kernel
from triton_offset_bias.backends.triton.kernels.backward_queries import dquery_kernel
from triton_offset_bias.backends.triton.kernels.decode import decode_kernel
from triton_offset_bias.backends.triton.kernels.forward import forward_kernel
from triton_offset_bias.backends.triton.kernels.hopper.forward import hopper_forward_kernel
from triton_offset_bias.backends.triton.target import KIB, Target

# KiB of shared memory that a program may have. By compute capability: "Technical Specifications per Compute Capability"
# in NVIDIA's CUDA C++ Programming Guide. By AMD's names: the local data share in the CDNA 3 and 4 ISA reference guides.
SHARED_KIB: dict[int | str, int] = {
    **{75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99},
    **{"gfx942": 64, "gfx950": 160},
}
CAPABILITIES = tuple(arch for arch in SHARED_KIB if isinstance(arch, int))
TARGETS = (*(f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 120)), "gfx942", "gfx950")  # that have a budget
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = {
    "forward": forward_kernel,
    "dquery": dquery_kernel,
    "dkey_dvalue": dkey_dvalue_kernel,
    "dbias": dbias_kernel,
    "decode": decode_kernel,
    "hopper_forward": hopper_forward_kernel,
}
FOR_ALL = [name for name in KERNELS if name != "hopper_forward"]  # kernels for all targets
DECODE_ROWS = 8  # four queries of two heads that share a key head
CONFIGS = {
    "dquery": configs.dquery_config,
    "dkey_dvalue": configs.dkey_dvalue_config,
    "dbias": configs.dquery_config,
    "decode": lambda target, dtype, block_d: configs.decode_config(target, dtype, block_d, DECODE_ROWS),
}
# The types of arguments that are neither tuples, nor pointers to tensors, nor int32.
_SUMS = dict.fromkeys(("fixed_unit_ptr", "dstrip_ptr", "parts_ptr"), "*fp32")
# Kinds of schedules: whether there is a bias, and which loops a kernel has.
SCHEDULES = {
    "none": (False, Loops(FAR_LEFT=True, NEAR=False, FAR_RIGHT=False)),
    "none, causal": (False, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=False)),
    "covering": (True, Loops(FAR_LEFT=False, NEAR=True, FAR_RIGHT=False)),
    "clamped": (True, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=True)),
    "clamped, causal": (True, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=False)),
}


def target_of(name: str) -> Target:
    """The `Target` with a name such as "sm_90" or "gfx942", from documentation; a launch asks the driver."""
    arch = int(name[3:]) if name.startswith("sm_") else name
    return Target("hip" if arch == name else "cuda", arch, SHARED_KIB[arch] * KIB)


def gpu_target(name: str) -> GPUTarget:
    """The target in the form that Triton's compiler takes."""
    target = target_of(name)
    return GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants, for one target.

    Attributes:
        kernel: key of `KERNELS`.
        target: "sm_" and a key of `SHARED_KIB`, or such a key alone.
        dtype: dtype of the tensors.
        head_dim: head dim of queries, keys and values.
        schedule: key of `SCHEDULES`, which tells the kinds of tiles and whether they have a bias.
        changes: constants that differ from the usual ones (all gradients, no mask, no dropout); or IS_EVEN, whether
            tiles fill the lengths.
        config: the launch configuration, if it is not the shipped one.
    """

    kernel: str
    target: str
    dtype: torch.dtype
    head_dim: int
    schedule: str = "clamped"
    changes: dict[str, Any] = field(default_factory=dict)
    config: configs.Config | None = None

    @property
    def launch(self) -> configs.Config:
        """The launch configuration: block sizes and options."""
        if self.config is not None:
            return self.config
        if self.kernel == "forward":
            return configs.forward_config(self.device, self.dtype, self.block_d, "HAS_POSITIONS" in self.changes)
        if self.is_whole:
            whole = configs.backward_config(self.device, self.dtype, self.block_d)
            assert whole is not None, f"two kernels serve {self}"
            return whole
        if self.kernel == "hopper_forward":
            return configs.hopper_forward_config(self.block_d, self._loops())
        return CONFIGS[self.kernel](self.device, self.dtype, self.block_d)

    @property
    def device(self) -> Target:
        """The `Target`, which decides about the configuration."""
        return target_of(self.target)

    @property
    def form(self) -> str:
        """The changes in words."""
        named = {"IS_PACKED": "packed", "HAS_POSITIONS": "positions", "DROPOUT_ROUNDS": "dropout"}
        named = {**named, "HAS_MASK": "ragged, masked", "HAS_LENGTHS": "lengths"}
        named = {"IS_CUT": "gate, cut", "HAS_GATE": "gate", **named}
        even = "even" if self.changes.get("IS_EVEN", True) else "ragged"
        words = ", ".join(word for constant, word in named.items() if self.changes.get(constant)) or even
        return f"{words}, all gradients" if self.is_whole else words

    @property
    def block_d(self) -> int:
        """The padded head dim of tiles."""
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def constants(self) -> dict[str, Any]:
        """The values of the kernel's constexprs."""
        config = self.launch
        has_bias = SCHEDULES[self.schedule][0]
        values = {
            "FORM": Form(*constants(self._form())),
            "LOOPS": Loops(*constants(self._loops())),
            "HAS_DQ": True,
            "WANTED": Wanted(*constants(self._wanted())),
            "DBIAS": "diagonals" if has_bias else "none",
            **config.sizes,
            **self.changes,
        }
        return {p.name: values[p.name] for p in KERNELS[self.kernel].params if p.is_constexpr}

    def _wanted(self) -> Wanted:
        """All gradients if the kernel is the whole backward pass."""
        return Wanted(DQ=self.is_whole, DK=True, DV=True, DBIAS=self.is_whole and SCHEDULES[self.schedule][0])

    @property
    def is_whole(self) -> bool:
        """Whether the kernel is the whole backward pass."""
        return bool(self.changes.get("IS_WHOLE", False))

    def _form(self) -> Form:
        form = Form(
            HEAD_DIM=self.head_dim,
            HEAD_DIM_V=self.head_dim,
            BLOCK_D=self.block_d,
            BLOCK_DV=self.block_d,
            GROUP=1,
            HAS_BIAS=SCHEDULES[self.schedule][0],
            BIAS_IN_ACC=configs.is_bias_in_acc(self.device, self.dtype, self.head_dim**-0.5),
            HAS_GATE=False,
            IS_CUT=False,
            HAS_MASK=False,
            HAS_POSITIONS=False,
            OWN_QUERY_POSITIONS=False,
            OWN_KEY_POSITIONS=False,
            IS_PACKED=False,
            HAS_LENGTHS=False,
            HAS_STARTS=False,
            IS_CAUSAL_BY_INDEX=False,
            DROPOUT_ROUNDS=0,
            HAS_PLACE=False,
            SPLIT_LSE=self.dtype == torch.float32,
            USE_ASM=self.device.backend == "cuda",
            PRECISION="ieee",
            FOLD=configs.folds_rows(self.device, self.block_d),
            KEEP_SUMS=configs.keeps_sums(self.block_d),
            STACKED=self.device.is_asynchronous,
            COPY=configs.needs_copy(self.device, self.dtype),
            WAIT=configs.needs_wait(self.device, self.dtype, self.is_whole),
        )
        return form._replace(**{name: x for name, x in self.changes.items() if name in Form._fields})

    def _loops(self) -> Loops:
        has_bias, loops = SCHEDULES[self.schedule]
        loops = loops._replace(REST=not self.changes.get("IS_EVEN", True))
        needs_far_loop = configs.needs_far_loop(self.device) and self.kernel != "hopper_forward"
        if has_bias and needs_far_loop and not self.changes.get("HAS_POSITIONS"):
            return loops._replace(FAR_LEFT=True, FAR_RIGHT=True)
        return loops

    def _types(self) -> dict[str, Any]:
        """The type of every argument in a launch with aligned tensors; "constexpr" for values that are compiled in."""
        form, tensor = self._form(), f"*{DTYPES[self.dtype]}"
        types = {
            "inputs": Inputs(
                q=tensor,
                k=tensor,
                v=tensor,
                strip="*fp32" if form.HAS_BIAS else "constexpr",
                gate="*fp32" if form.HAS_GATE else "constexpr",
                key_mask="*u8" if form.HAS_MASK else "constexpr",
                **dict.fromkeys(("query_positions", "key_positions"), "*i64" if form.HAS_POSITIONS else "constexpr"),
                **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "*i32" if form.IS_PACKED else "constexpr"),
                key_lengths="*i32" if form.HAS_LENGTHS else "constexpr",
                query_starts="constexpr",
                seed="*i64" if form.DROPOUT_ROUNDS else "constexpr",
            ),
            "outputs": Outputs(tensor, "*fp32", "*fp32", "*fp32"),
            "parts": Parts("*fp32", "*fp32", "*fp32"),
            "gradients": QueryGradients(tensor, "*fp32" if form.HAS_GATE else "constexpr"),
            "row_ptrs": Rows("*fp32", "*fp32", "*fp32"),
            "factors": Factors("fp32", "fp32"),
            "dropout": Dropout("i32", "fp32", "constexpr"),
            "strides": self._layout(),
            "table_rows": TableRows("i32", "i32"),
            **_SUMS,
            "sums": Sums(
                dq="*fp32" if self.is_whole else "constexpr",
                dstrip="*fp32" if self.is_whole and form.HAS_BIAS else "constexpr",
            ),
        }
        if self.kernel == "dquery" and self.constants["DBIAS"] != "fixed":
            types["fixed_unit_ptr"] = "constexpr"
        if self.constants.get("DBIAS") == "none":
            types["dstrip_ptr"] = "constexpr"
        return {p.name: self._type_of(p, types, tensor) for p in KERNELS[self.kernel].params}

    def _layout(self) -> Layout:
        """The types of the strides of the tensors that the kernel gets."""
        others = {"forward": ["out"], "hopper_forward": ["out"], "decode": [], "dbias": ["dout"]}
        others |= {"dquery": ["dout", "dq"], "dkey_dvalue": ["dout", "dk", "dv"]}
        others["dkey_dvalue"] += ["dq"] if self.is_whole else []
        tensors = dict.fromkeys(["q", "k", "v", *others[self.kernel]], Strides("i32", "i32", "constexpr", "constexpr"))
        absent = dict.fromkeys(Layout._fields, "constexpr")
        return Layout(**{**absent, **tensors, "strip": StripStrides("i32", "i32", "i32")})

    @staticmethod
    def _type_of(parameter: Any, types: dict[str, Any], tensor: str) -> Any:
        if parameter.is_constexpr:
            return "constexpr"
        if parameter.name in types:
            return types[parameter.name]
        return tensor if parameter.name.endswith("_ptr") else "i32"

    def source(self) -> ASTSource:
        """The kernel with the types of its arguments, in the form that Triton's compiler takes."""
        kernel, types = KERNELS[self.kernel], self._types()
        compiled_in = {**self.constants, "row": self.head_dim, "d": 1}
        values, attributes = {}, {}
        for path, name, kind in _leaves((), types):
            if kind == "constexpr":
                values[path] = compiled_in.get(name)
            elif kind.startswith("*") or name in ("b", "h"):  # aligned tensors
                attributes[path] = [["tt.divisibility", 16]]
        return ASTSource(kernel, types, values, attributes)

    def compile(self):
        """Compiles the variant, and returns Triton's compiled kernel."""
        return triton.compile(self.source(), target=gpu_target(self.target), options=self.launch.options)


def _leaves(path: tuple[int, ...], types: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """The place, name and type of every argument, and of every member of tuples among them."""
    for i, (name, kind) in enumerate(types.items()):
        if isinstance(kind, tuple):
            yield from _leaves((*path, i), kind._asdict())
        else:
            yield (*path, i), name, kind


RAGGED = {"IS_EVEN": False, "HAS_MASK": True}
PACKED = {"IS_EVEN": False, "IS_PACKED": True}


def shipped_variants(target: str) -> Iterator[Variant]:
    """The variants that must stay within the budget: every kernel, dtype, size of head dim and kind of schedule."""
    lengths = {"IS_EVEN": False, "HAS_LENGTHS": True}
    dropping = {"DROPOUT_ROUNDS": dropout.ROUNDS}
    gathered = {"IS_EVEN": False, "HAS_POSITIONS": True, "DBIAS": "elements"}
    yield from main_variants(target)
    for kernel in FOR_ALL:
        yield Variant(kernel, target, torch.bfloat16, 256)
        yield Variant(kernel, target, torch.float16, 64)
        yield Variant(kernel, target, torch.float32, 64)
        yield Variant(kernel, target, torch.float32, 128)
        yield Variant(kernel, target, torch.bfloat16, 64, changes=lengths)
        yield Variant(kernel, target, torch.bfloat16, 64, changes={"HAS_GATE": True, "IS_CUT": True})
        if kernel != "decode":
            yield Variant(kernel, target, torch.bfloat16, 64, changes=dropping)
        if kernel != "dbias":
            yield Variant(kernel, target, torch.bfloat16, 64, "covering", changes=gathered)


def whole_variants(target: str) -> Iterator[Variant]:
    """The forms of `dkey_dvalue_kernel` as the whole backward pass, where it is that."""
    whole = {"IS_WHOLE": True}
    for head_dim in (64, 128):
        if configs.backward_config(target_of(target), torch.bfloat16, head_dim) is not None:
            yield Variant("dkey_dvalue", target, torch.bfloat16, head_dim, changes=whole)
            yield Variant("dkey_dvalue", target, torch.bfloat16, head_dim, "none", changes=whole)
            yield Variant("dkey_dvalue", target, torch.bfloat16, head_dim - 16, changes={**RAGGED, **whole})
            yield Variant("dkey_dvalue", target, torch.bfloat16, head_dim, "covering", changes={**PACKED, **whole})


def main_variants(target: str) -> Iterator[Variant]:
    """The variants that every version of Triton compiles: bfloat16, head dims of 64 and 128, masked, and packed."""
    for kernel in FOR_ALL:
        yield Variant(kernel, target, torch.bfloat16, 64)
        yield Variant(kernel, target, torch.bfloat16, 128)
        yield Variant(kernel, target, torch.bfloat16, 80, changes=RAGGED)
        yield Variant(kernel, target, torch.bfloat16, 64, changes=PACKED)
        if kernel != "dbias":
            yield Variant(kernel, target, torch.bfloat16, 64, "none")
            yield Variant(kernel, target, torch.bfloat16, 64, "covering")
            yield Variant(kernel, target, torch.bfloat16, 64, "none, causal", changes=RAGGED)
    yield from whole_variants(target)
    if target == "sm_90":
        yield from hopper_variants()


def hopper_variants() -> Iterator[Variant]:
    """The forms of `hopper_forward_kernel`: one to three loops of tiles, with and without a rest."""
    ragged = {"IS_EVEN": False}
    yield Variant("hopper_forward", "sm_90", torch.bfloat16, 64, "clamped", ragged)
    yield Variant("hopper_forward", "sm_90", torch.bfloat16, 64, "none")
    yield Variant("hopper_forward", "sm_90", torch.bfloat16, 128, "clamped", ragged)
    yield Variant("hopper_forward", "sm_90", torch.bfloat16, 128, "none", ragged)
    yield Variant("hopper_forward", "sm_90", torch.float16, 128, "covering")
