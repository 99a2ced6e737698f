"""Block sizes follow a device's compute capability and its shared memory, for known devices and for later ones."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench import compile_kernels  # noqa: E402
from bench.kernel_variants import CAPABILITIES, KERNELS, TARGETS, Variant, target_of  # noqa: E402
from triton_offset_bias.backends import triton as backend  # noqa: E402
from triton_offset_bias.backends.triton import configs, launch  # noqa: E402
from triton_offset_bias.backends.triton.target import KIB, Target  # noqa: E402

KINDS = [(dtype, block_d) for dtype in (torch.float16, torch.bfloat16, torch.float32) for block_d in (16, 64, 128, 256)]
COMPILES = isinstance(KERNELS["forward"], triton.JITFunction)


class _SharedMemory(Exception):
    """Ends a compilation once it is known, before the assembler."""


def shared_memory_of(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the compiled kernel takes."""

    def stop_early(backend=None, stages=None, *_):
        def stop(_, metadata):
            raise _SharedMemory(metadata["shared"])

        if stages is None:
            return "", ""
        stages["ptx"] = stop

    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", stop_early)
    with pytest.raises(_SharedMemory) as found:
        variant.compile()
    return found.value.args[0]


def choices(device: Target) -> list[configs.Config]:
    """Every configuration that a device may get."""
    functions = (configs.forward_config, configs.dquery_config, configs.dkey_dvalue_config)
    gathered = [configs.forward_config(device, *kind, has_positions=True) for kind in KINDS]
    return gathered + [function(device, *kind) for function in functions for kind in KINDS]


@pytest.mark.parametrize(
    ("name", "like"),
    {"sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120", "sm_87": "sm_80", "sm_89": "sm_86"}.items(),
)
def test_devices_of_a_family_with_as_much_memory_get_the_same_blocks(name, like):
    """B300 and Thor get the blocks of B200, DGX Spark those of GeForce's Blackwell, Orin those of A100."""
    assert choices(target_of(name)) == choices(target_of(like))
    for dtype in (torch.float16, torch.float32):
        assert configs.is_bias_in_acc(target_of(name), dtype, 0.1) == configs.is_bias_in_acc(
            target_of(like), dtype, 0.1
        )


@pytest.mark.parametrize("shared_kib", [48, 64, 99, 163, 227, 300])
@pytest.mark.parametrize("arch", [70, 75, 90, 100, 107, 120, 130, 200])
def test_tiles_of_any_device_leave_room_in_its_memory(arch, shared_kib):
    """A block of queries and a block of keys fit with their gradients, whatever memory the driver reports."""
    device = Target("cuda", arch, shared_kib * KIB)
    for function in (configs.dquery_config, configs.dkey_dvalue_config):
        for dtype, block_d in KINDS:
            config = function(device, dtype, block_d)
            needed = 2 * (config.block_m + config.block_n) * block_d * dtype.itemsize
            assert needed <= max(device.shared_memory, configs.least_shared_memory(dtype, block_d))


# The variants of each kind of target that take most; a capability's limit is in its name.
LARGEST = [
    ("dkey_dvalue", torch.float32, 256),
    ("dquery", torch.float16, 128),
    ("forward", torch.float16, 256),
]


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
@pytest.mark.parametrize("capability", [x for x in CAPABILITIES if x >= 80])
@pytest.mark.parametrize(("kernel", "dtype", "head_dim"), LARGEST)
def test_compiled_kernels_fit_into_shared_memory(monkeypatch, kernel, dtype, head_dim, capability):
    """The test takes every capability that has tensor cores for these dtypes.

    `make compile-kernels` takes the others.
    """
    variant = Variant(kernel, f"sm_{capability}", dtype, head_dim, changes={"PRECISION": "tf32"})
    assert shared_memory_of(variant, monkeypatch) <= target_of(f"sm_{capability}").shared_memory


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
@pytest.mark.parametrize("capability", [80, 86])
def test_the_most_decoding_rows_fit_into_shared_memory(monkeypatch, capability):
    """The case is float32 with the largest head dim. GeForce has less shared memory than data centres' devices."""
    target = target_of(f"sm_{capability}")
    config = configs.decode_config(target, torch.float32, 256, configs.MAX_DECODE_ROWS)
    variant = Variant("decode", f"sm_{capability}", torch.float32, 256, config=config)
    assert shared_memory_of(variant, monkeypatch) <= target.shared_memory


# What tuning need not try: a kernel, and a configuration that lacks room in 16 bits at a head dim on a target.
WITHOUT_ROOM = [
    ("forward", "sm_86", 128, configs.Config(64, 128, 4, 3)),
    ("dkey_dvalue", "sm_90", 256, configs.Config(128, 64, 8, 3)),
]


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
@pytest.mark.parametrize(("kernel", "target", "head_dim", "config"), WITHOUT_ROOM)
def test_candidates_that_tuning_leaves_out_do_not_fit(monkeypatch, kernel, target, head_dim, config):
    """They are compiled here to show it. The smallest candidate stays for every kind of input."""
    assert config in configs.CANDIDATES[kernel]
    device = target_of(target)
    assert not configs.may_fit(kernel, config, device, torch.bfloat16, head_dim)
    assert all(configs.may_fit(kernel, configs.CANDIDATES[kernel][0], device, *kind) for kind in KINDS)
    variant = Variant(kernel, target, torch.bfloat16, head_dim, config=config)
    assert shared_memory_of(variant, monkeypatch) > device.shared_memory


def test_tuning_tries_what_may_fit_alone(monkeypatch):
    """Of two candidates for GeForce, the one with three stages of 128 keys of head dim 128 is left out."""
    fits, lacks = ({"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": stages} for stages in (2, 3))
    candidates = [
        triton.Config({name: x for name, x in one.items() if name.isupper()}, one["num_warps"], one["num_stages"])
        for one in (fits, lacks)
    ]
    monkeypatch.setattr(launch, "current_target", lambda: target_of("sm_86"))
    arguments = {"inputs": SimpleNamespace(q=torch.empty(0, dtype=torch.bfloat16))}
    form = SimpleNamespace(BLOCK_D=triton.language.constexpr(128))
    assert launch._with_room("forward", candidates, arguments, FORM=form, LOOPS=None) == candidates[:1]


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
@pytest.mark.parametrize("kernel", ["forward", "dquery", "dkey_dvalue"])
def test_no_product_of_hopper_is_serialised(kernel):
    """The installed Triton and ptxas compile them. `make compile-kernels` takes the other head dims and forms."""
    assert compile_kernels.usage_of(Variant(kernel, "sm_90", torch.bfloat16, 64))["serialised"] == 0


@pytest.mark.parametrize(("version", "expected"), [((3, 6), True), ((3, 8), True), ((3, 9), False), ((3, 10), False)])
def test_only_hopper_and_only_older_tritons_are_helped(monkeypatch, version, expected):
    """For other targets the compiled code stays as it was."""
    monkeypatch.setattr(configs, "TRITON", version)
    assert configs.needs_wait(target_of("sm_90"), torch.bfloat16) == expected
    assert not configs.needs_wait(target_of("sm_90"), torch.float32)
    others = [name for name in TARGETS if name != "sm_90"]
    assert not any(configs.needs_wait(target_of(name), torch.bfloat16) for name in others)


def test_a_device_with_too_little_memory_says_so(monkeypatch):
    """The launch would fail otherwise. Other dtypes and head dims are served."""
    from cases import Case, build

    from triton_offset_bias import offset_bias_attention

    monkeypatch.setattr(backend, "shared_memory", lambda: 64 * KIB)
    monkeypatch.setattr(backend, "target", lambda: "cuda:75")
    monkeypatch.setattr(backend, "device_types", lambda: (torch.get_default_device().type,))
    call = build(Case("wide", (5, 5), (256, 256)))
    with pytest.raises(
        NotImplementedError, match="in float32 need 66560 bytes of shared memory, this device has 65536"
    ):
        offset_bias_attention(call.q, call.k, call.v, call.bias, backend="triton")


def test_every_target_with_a_budget_is_described():
    """A target's memory is known without a driver."""
    assert all(target_of(name).shared_memory >= 64 * KIB for name in TARGETS)
