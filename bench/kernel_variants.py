"""Every form in which the GPU kernels ship, as something that can be compiled without a GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_offset_bias import dropout
from triton_offset_bias.backends.triton import configs
from triton_offset_bias.backends.triton.backward import dquery_kernel
from triton_offset_bias.backends.triton.backward_bias import dbias_kernel
from triton_offset_bias.backends.triton.backward_keys import dkey_dvalue_kernel
from triton_offset_bias.backends.triton.decode import decode_kernel
from triton_offset_bias.backends.triton.forward import forward_kernel
from triton_offset_bias.backends.triton.target import KIB, Target

# KiB of shared memory that a program may have: by compute capability, "Technical Specifications per Compute Capability"
# in NVIDIA's CUDA C++ Programming Guide; by AMD's names, the local data share in the CDNA 3 and 4 ISA reference guides.
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
}
DECODE_ROWS = 8  # four queries of two heads that share a key head
CONFIGS = {
    "dquery": configs.dquery_config,
    "dkey_dvalue": configs.dkey_dvalue_config,
    "dbias": configs.dquery_config,
    "decode": lambda target, dtype, block_d: configs.decode_config(target, dtype, block_d, DECODE_ROWS),
}
_FLOATS = ("scale", "scale_log2", "kept_scale")
# Types of what pointers point at, where it is not the tensors' dtype.
_POINTED_AT = {
    **dict.fromkeys(("strip", "dstrip", "lse", "lse_bits", "log_sum", "delta"), "fp32"),
    **dict.fromkeys(("row_max", "row_sum", "parts", "fixed_unit", "part_acc", "part_max", "part_sum"), "fp32"),
    **dict.fromkeys(("query_positions", "key_positions", "seed"), "i64"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "i32"),
    "key_mask": "u8",
}
# Which of the loops far left | near | far right a bias needs.
SCHEDULES = {
    "none": {"HAS_BIAS": False, "FAR_LEFT": True, "NEAR": False, "FAR_RIGHT": False},
    "none, causal": {"HAS_BIAS": False, "FAR_LEFT": True, "NEAR": True, "FAR_RIGHT": False},
    "covering": {"HAS_BIAS": True, "FAR_LEFT": False, "NEAR": True, "FAR_RIGHT": False},
    "clamped": {"HAS_BIAS": True, "FAR_LEFT": True, "NEAR": True, "FAR_RIGHT": True},
    "clamped, causal": {"HAS_BIAS": True, "FAR_LEFT": True, "NEAR": True, "FAR_RIGHT": False},
}


def target_of(name: str) -> Target:
    """What "sm_90" or "gfx942" is, as documented; a launch asks the driver."""
    arch = int(name[3:]) if name.startswith("sm_") else name
    return Target("hip" if arch == name else "cuda", arch, SHARED_KIB[arch] * KIB)


def gpu_target(name: str) -> GPUTarget:
    """The same as Triton's compiler wants it."""
    target = target_of(name)
    return GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants, for one target.

    Attributes:
        kernel: key of `KERNELS`.
        target: "sm_" and a key of `SHARED_KIB`, or such a key.
        dtype: of the tensors.
        head_dim: of queries, keys and values.
        schedule: key of `SCHEDULES`: which tiles there are, and whether they have a bias.
        changes: constants that differ from the usual: all gradients, even lengths, no mask, nothing dropped.
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
        """Block sizes and options of the launch."""
        if self.config is not None:
            return self.config
        if self.kernel == "forward":
            return configs.forward_config(self.device, self.dtype, self.block_d, "HAS_POSITIONS" in self.changes)
        return CONFIGS[self.kernel](self.device, self.dtype, self.block_d)

    @property
    def device(self) -> Target:
        """What decides about the configuration."""
        return target_of(self.target)

    @property
    def form(self) -> str:
        """The changes in words."""
        named = {"IS_PACKED": "packed", "HAS_POSITIONS": "positions", "DROPOUT_ROUNDS": "dropout"}
        named = {**named, "HAS_MASK": "ragged, masked"}
        return ", ".join(word for constant, word in named.items() if self.changes.get(constant)) or "even"

    @property
    def block_d(self) -> int:
        """The head dim as tiles have it."""
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def _schedule(self) -> dict[str, bool]:
        chosen = SCHEDULES[self.schedule]
        if chosen["HAS_BIAS"] and configs.needs_far_loop(self.device) and not self.changes.get("HAS_POSITIONS"):
            return {**chosen, "FAR_LEFT": True, "FAR_RIGHT": True}
        return chosen

    def constants(self) -> dict[str, Any]:
        """The kernel's constexprs, and what a launch compiles in as if it were one."""
        config = self.launch
        values = {
            **{"HEAD_DIM": self.head_dim, "HEAD_DIM_V": self.head_dim, "BLOCK_D": self.block_d},
            **{"BLOCK_DV": self.block_d, "EVEN_M": True, "EVEN_N": True, "HAS_MASK": False},
            **{"HAS_DQ": True, "HAS_DK": True, "HAS_DV": True, "PRECISION": "ieee"},
            **{"HAS_POSITIONS": False, "IS_PACKED": False, "DROPOUT_ROUNDS": 0},
            "BIAS_IN_ACC": configs.is_bias_in_acc(self.device, self.dtype, self.head_dim**-0.5),
            "SPLIT_LSE": self.dtype == torch.float32,
            "USE_ASM": self.device.backend == "cuda",
            "WAIT": configs.needs_wait(self.device, self.dtype),
            "DBIAS": configs.DBIAS if SCHEDULES[self.schedule]["HAS_BIAS"] else "none",
            **{"BLOCK": config.block_m, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
            **self._schedule,
            **self.changes,
        }
        parameters = KERNELS[self.kernel].params
        row_strides = [p.name for p in parameters if p.name.startswith("stride_") and p.name[-1] in "mn"]
        unit_strides = [p.name for p in parameters if p.name.startswith("stride_") and p.name[-1] == "d"]
        return {
            **{p.name: values[p.name] for p in parameters if p.is_constexpr},
            **dict.fromkeys(row_strides, self.head_dim),
            **dict.fromkeys(unit_strides, 1),
            "group": 1,
        }

    def types(self) -> dict[str, str]:
        """Type of every other argument."""
        kernel, constants = KERNELS[self.kernel], self.constants()
        return {p.name: self._type(p.name) for p in kernel.params if p.name not in constants}

    def _type(self, name: str) -> str:
        if name.endswith("_ptr"):
            return f"*{_POINTED_AT.get(name.removesuffix('_ptr'), DTYPES[self.dtype])}"
        return "fp32" if name in _FLOATS else "i32"

    def divisible(self) -> list[str]:
        """Integer arguments that are multiples of 16, as they are for even lengths and aligned tensors."""
        strides = [n for n in self.types() if n.startswith("stride_") and not n.startswith(("stride_s", "stride_p"))]
        evens = {"EVEN_M": ["len_q", "rows_q"], "EVEN_N": ["len_k", "rows_k"]}
        constants = self.constants()
        return strides + [name for flag, names in evens.items() if constants.get(flag, True) for name in names]

    def compile(self):
        """Compiles it, and gives Triton's compiled kernel."""
        kernel, constants, types, even = KERNELS[self.kernel], self.constants(), self.types(), self.divisible()
        signature, attributes = {}, {}
        for i, parameter in enumerate(kernel.params):
            name = parameter.name
            signature[name] = "constexpr" if name in constants else types[name]
            if name.endswith("_ptr") or name in even:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=gpu_target(self.target), options=self.launch.options)


def shipped_variants(target: str) -> Iterator[Variant]:
    """The variants that are held against the budget: every kernel, dtype, size of head dim and kind of schedule."""
    ragged = {"EVEN_M": False, "EVEN_N": False, "HAS_MASK": True}
    packed = {"EVEN_M": False, "EVEN_N": False, "IS_PACKED": True}
    dropping = {"DROPOUT_ROUNDS": dropout.ROUNDS}
    gathered = {"EVEN_M": False, "EVEN_N": False, "HAS_POSITIONS": True, "DBIAS": "elements"}
    for kernel in KERNELS:
        for head_dim in (64, 128, 256):
            yield Variant(kernel, target, torch.bfloat16, head_dim)
        yield Variant(kernel, target, torch.bfloat16, 80, changes=ragged)
        yield Variant(kernel, target, torch.float16, 64)
        yield Variant(kernel, target, torch.float32, 64)
        yield Variant(kernel, target, torch.float32, 128)
        yield Variant(kernel, target, torch.bfloat16, 64, changes=packed)
        if kernel != "decode":
            yield Variant(kernel, target, torch.bfloat16, 64, changes=dropping)
        if kernel != "dbias":
            yield Variant(kernel, target, torch.bfloat16, 64, "none")
            yield Variant(kernel, target, torch.bfloat16, 64, "covering")
            yield Variant(kernel, target, torch.bfloat16, 64, "none, causal", changes=ragged)
            yield Variant(kernel, target, torch.bfloat16, 64, "covering", changes=gathered)
