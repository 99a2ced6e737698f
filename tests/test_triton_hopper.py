"""The forward kernel for Hopper alone: which calls it serves, how it is launched, and that it is specialised."""

import re

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of

from triton_offset_bias import offset_bias_attention

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench.compile_kernels import usage_of  # noqa: E402
from bench.kernel_variants import KERNELS, Variant, hopper_variants, target_of  # noqa: E402
from triton_offset_bias.backends.triton import configs, hopper, passes  # noqa: E402
from triton_offset_bias.backends.triton.kernels.arguments import Loops  # noqa: E402
from triton_offset_bias.backends.triton.target import interprets  # noqa: E402

COMPILES = isinstance(KERNELS["hopper_forward"], triton.JITFunction)
BF16, FP16 = torch.bfloat16, torch.float16
INTERPRETED = pytest.mark.skipif(not interprets(), reason="Triton's interpreter is off (TRITON_INTERPRET=1)")
CASES = [
    Case(
        "far on both sides, rest",
        (40, 560),
        (64, 64),
        batch=1,
        heads=(2, 1),
        columns=81,
        dtype=BF16,
        options={"query_start": 200},
    ),
    Case("head dim 128, even", (130, 128), (128, 128), batch=1, heads=(1, 1), columns=33, dtype=FP16),
    Case("no bias, window", (150, 170), (64, 64), batch=1, bias=None, dtype=BF16, options={"window_size": (60, 30)}),
    Case(
        "transposed, negative scale, causal",
        (90, 70),
        (64, 64),
        layout="transposed BLHD",
        dtype=BF16,
        options={"scale": -0.2, "is_causal": True},
    ),
]


@pytest.fixture
def launched(monkeypatch):
    """Asks for the kernel, and lists the call of each of its launches."""
    calls = []
    launch = hopper.launch_forward
    monkeypatch.setenv(hopper.HOPPER_VARIABLE, "1")
    monkeypatch.setattr(passes.hopper, "launch_forward", lambda *arguments: calls.append(launch(*arguments)))
    return calls


def run(len_q: int = 5, len_k: int = 7, head_dim: int = 64) -> None:
    """The forward pass of a small call that the kernel serves."""
    q, k, v = (torch.randn(1, 1, length, head_dim, dtype=BF16) for length in (len_q, len_k, len_k))
    offset_bias_attention(q, k, v, None, backend="triton")


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"triton, {case.reason}")
def test_it_is_as_accurate_as_plain_pytorch(launched, case):
    """Output and log-sum-exp, and the gradients, which follow from its row statistics."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))
    assert len(launched) == 1


UNSERVED = {
    "float32": (Case("", (9, 9), (64, 64)), "serves float16 and bfloat16, got torch.float32"),
    "head dim": (Case("", (9, 9), (32, 32), dtype=BF16), r"serves head dims 64 and 128, .*, got \(32, 32\)"),
    "two head dims": (Case("", (9, 9), (64, 128), dtype=BF16), r"serves head dims .*, got \(64, 128\)"),
    "mask": (Case("", (9, 9), (64, 64), dtype=BF16, mask="holes"), "serves no key_padding_mask"),
    "dropout": (Case("", (9, 9), (64, 64), dtype=BF16, options={"dropout_p": 0.5}), "serves no seed"),
    "strides": (
        Case("", (9, 9), (64, 64), dtype=BF16, layout="every other element"),
        r"the query must begin at a multiple of 16 bytes, .* strides \(2304, 1152, 128, 2\)",
    ),
}


@INTERPRETED
@pytest.mark.parametrize(("case", "reason"), UNSERVED.values(), ids=(f"triton, {name}" for name in UNSERVED))
def test_other_calls_take_the_kernel_for_all(launched, monkeypatch, case, reason):
    """The first reason says what was expected and what came."""
    found = []
    decide = hopper.unserved_reasons
    monkeypatch.setattr(hopper, "unserved_reasons", lambda *call: found.extend(decide(*call)) or found)
    results_of(build(case), "triton")
    assert not launched
    assert re.match(reason, found[0])


@INTERPRETED
def test_triton_users_keep_their_allocator(monkeypatch, launched):
    """During the launch it is torch's; after it, the user's again."""
    from triton.runtime import _allocation

    seen = []
    launch = hopper._launch_with_memory

    def record(*arguments):
        launch(*arguments)
        seen.append(_allocation._allocator.get())

    monkeypatch.setattr(hopper, "_launch_with_memory", record)
    before = _allocation._allocator.get()
    run()
    assert seen == [hopper._allocate]
    assert _allocation._allocator.get() is before


@INTERPRETED
def test_triton_takes_it_only_where_it_is_asked_for(monkeypatch, launched):
    """The variable is 1, or nothing changes."""
    monkeypatch.setenv(hopper.HOPPER_VARIABLE, "0")
    run()
    assert not launched


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
def test_its_warps_are_specialised_and_its_products_asynchronous():
    """Two groups of four warps multiply, one loads. `make compile-kernels` takes every form."""
    variant = next(iter(hopper_variants()))
    assert variant.schedule == "clamped"
    compiled = variant.compile()
    assert "ttg.warp_specialize" in compiled.asm["ttgir"]
    assert compiled.metadata.num_warps == 12
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    usage = usage_of(variant)
    assert (usage["spills"], usage["serialised"]) == (0, 0)


@pytest.mark.skipif(not COMPILES, reason="Triton's interpreter is on, and compiles nothing")
@pytest.mark.parametrize("changes", [{}, {"IS_EVEN": False}], ids=["even", "rest"])
def test_its_buffers_fit_where_head_dims_are_large(changes):
    """One loop has buffers for 128 keys; with a rest, or with near and far tiles, each loop has them for 64."""
    compiled = Variant("hopper_forward", "sm_90", BF16, 128, "none", changes).compile()
    assert compiled.metadata.shared <= target_of("sm_90").shared_memory


@pytest.mark.parametrize(
    ("version", "block_d", "loops", "keys"),
    [
        ((3, 9), 64, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=True, REST=True), 128),
        ((3, 8), 64, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=True, REST=True), 64),
        ((3, 8), 64, Loops(FAR_LEFT=True, NEAR=False, FAR_RIGHT=True), 128),
        ((3, 9), 128, Loops(FAR_LEFT=True, NEAR=False, FAR_RIGHT=True), 128),
        ((3, 9), 128, Loops(FAR_LEFT=False, NEAR=True, FAR_RIGHT=False), 128),
        ((3, 9), 128, Loops(FAR_LEFT=False, NEAR=True, FAR_RIGHT=False, REST=True), 64),
        ((3, 9), 128, Loops(FAR_LEFT=True, NEAR=True, FAR_RIGHT=False), 64),
    ],
)
def test_tiles_have_fewer_keys_where_two_loops_of_large_head_dims_need_buffers(
    monkeypatch, version, block_d, loops, keys
):
    """Far tiles of both sides share a loop. Triton 3.8 compiles several loops for 64 keys alone."""
    monkeypatch.setattr(configs, "TRITON", version)
    assert configs.hopper_forward_config(block_d, loops).block_n == keys


@INTERPRETED
@pytest.mark.parametrize(
    ("len_q", "len_k", "keys"),
    [(16, 128, 128), (16, 144, 64), (5, 128, 64)],
    ids=["triton, even", "triton, rest of keys", "triton, odd queries"],
)
def test_its_launch_knows_of_a_rest(monkeypatch, launched, len_q, len_k, keys):
    """Where the kernel has a loop for one, a head dim of 128 takes tiles of 64 keys."""
    seen = []
    choose = configs.hopper_forward_config
    monkeypatch.setattr(configs, "hopper_forward_config", lambda *given: seen.append(choose(*given)) or seen[-1])
    run(len_q, len_k, 128)
    assert [config.block_n for config in seen] == [keys]
