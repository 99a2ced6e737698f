"""The GPU kernels as compiled, executed without a GPU: values, races, bounds and uninitialised shared memory.

`make test-emulated` runs this file. The emulator raises at the first race, access out of bounds or read of shared
memory that nobody wrote.
"""

import os

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of

from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

pytestmark = [
    pytest.mark.skipif("PTXEMU" not in os.environ, reason="PTXEMU names no folder with the PTX emulator"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # files that the emulator leaves open
]

BF16, FP16 = torch.bfloat16, torch.float16
SCATTERED = {
    "query_positions": torch.arange(70) * 37 % 70,
    "key_positions": torch.stack([torch.arange(90) // 2, torch.arange(90) * 7 % 90]),
}
CASES = [
    Case("far tiles on both sides", (200, 200), (64, 64), batch=1, columns=81, dtype=BF16),
    Case("causal, longer keys", (150, 170), (64, 64), batch=1, dtype=BF16, options={"is_causal": True}),
    Case("even lengths", (256, 256), (64, 64), batch=1, columns=33, dtype=FP16, through_lse=True),
    Case("no bias, causal", (256, 256), (64, 64), batch=1, bias=None, dtype=BF16, options={"is_causal": True}),
    Case("no bias", (70, 300), (32, 64), batch=1, bias=None, dtype=BF16),
    Case(
        "grouped heads, window, holes, odd head dims",
        (150, 150),
        (80, 48),
        heads=(4, 2),
        dtype=BF16,
        mask="holes",
        options={"window_size": (60, 30)},
    ),
    Case("one query", (1, 130), (64, 64), bias="BHN", columns=21, dtype=BF16),
    Case(
        "zero beyond a shared head", (130, 100), (64, 64), bias="1N", columns=31, dtype=BF16, options={"beyond": "zero"}
    ),
    Case(
        "transposed, negative scale", (90, 70), (64, 64), layout="transposed BLHD", dtype=BF16, options={"scale": -0.2}
    ),
    Case("float32", (70, 90), (64, 64), batch=1, columns=41),
    Case("head dim 128", (130, 130), (128, 128), batch=1, columns=41, dtype=BF16),
    Case("head dim 256", (70, 130), (256, 256), batch=1, heads=(1, 1), columns=41, dtype=FP16),
    Case("positions, causal", (70, 90), (64, 64), columns=41, dtype=BF16, options={**SCATTERED, "is_causal": True}),
    Case("dropout", (100, 130), (64, 64), batch=1, columns=81, dtype=BF16, options={"dropout_p": 0.2}),
    Case(
        "lengths, causal, holes",
        (70, 192),
        (64, 64),
        heads=(2, 1),
        columns=41,
        dtype=BF16,
        mask="holes",
        options={"key_lengths": torch.tensor([129, 64], dtype=torch.int32), "is_causal": True},
    ),
    Case(
        "lengths, deterministic, none of one sequence",
        (100, 128),
        (64, 64),
        bias="BHN",
        columns=21,
        dtype=BF16,
        options={"key_lengths": torch.tensor([75, 0]), "deterministic": True},
    ),
    Case(
        "lengths, decoding",
        (1, 700),
        (64, 64),
        heads=(4, 1),
        columns=81,
        dtype=BF16,
        options={"key_lengths": torch.tensor([700, 301])},
    ),
    Case("decoding, shared key heads", (3, 700), (64, 64), heads=(4, 1), columns=81, dtype=BF16, mask="holes"),
]
DETERMINISTIC = [
    Case("a table for all", (200, 140), (64, 64), columns=21, dtype=FP16, options={"deterministic": True}),
    Case(
        "causal, grouped, a table a sequence",
        (100, 170),
        (64, 64),
        heads=(2, 1),
        bias="B1N",
        dtype=BF16,
        options={"deterministic": True, "is_causal": True},
    ),
    Case("dropout", (100, 90), (64, 64), dtype=BF16, options={"deterministic": True, "dropout_p": 0.2}),
]
FIXED = Case("positions", (70, 90), (64, 64), columns=41, dtype=BF16, options={**SCATTERED, "deterministic": True})


HOPPER = [
    Case("far tiles on both sides, rest", (200, 300), (64, 64), batch=1, columns=81, dtype=BF16),
    Case(
        "window without a bias, shared key heads, head dim 128",
        (300, 384),
        (128, 128),
        batch=1,
        heads=(2, 1),
        bias=None,
        dtype=FP16,
        options={"window_size": (60, 30)},
    ),
]


@pytest.fixture
def two_kernels(monkeypatch):
    """Makes the backward pass take a kernel for queries and one for keys."""
    from triton_offset_bias.backends.triton import configs, plan

    monkeypatch.setattr(configs, "backward_config", lambda *_: None)
    monkeypatch.setattr(plan, "_plans", {})


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [*CASES, *DETERMINISTIC, FIXED], ids=lambda case: case.reason)
def test_compiled_kernels_are_as_accurate_as_plain_pytorch(case):
    """The results are the output, the log-sum-exp and all gradients of the compiled code."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))


@pytest.mark.usefixtures("poisoned_memory", "two_kernels")
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=lambda case: case.reason)
def test_two_kernels_are_as_accurate(case):
    """Other GPUs than A100 and Hopper take two kernels for the backward pass."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))


@pytest.mark.skipif(os.environ.get("PTXEMU_ARCH") != "90", reason="the kernel is for Hopper alone")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", HOPPER, ids=lambda case: case.reason)
def test_specialised_warps_wait_for_one_another(monkeypatch, case):
    """The emulator lets a tile arrive as late as it may, and raises where a wait or a fence is missing."""
    import triton_offline

    monkeypatch.setenv("TRITON_OFFSET_BIAS_HOPPER", "1")
    call = build(case)

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return offset_bias_attention(
                call.q, call.k, call.v, call.bias, **call.options, return_lse=True, backend=backend
            )

    out, lse = run("reference")
    for seed in (None, 1, 2):
        triton_offline.LAUNCHES.clear()
        with triton_offline.options(seed=seed):
            got = run("triton")
        assert "hopper_forward_kernel" in [name for name, _ in triton_offline.LAUNCHES]
        torch.testing.assert_close(got[0], out, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(got[1], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*DETERMINISTIC, FIXED], ids=lambda case: case.reason)
def test_deterministic_results_do_not_depend_on_the_order_of_programs(case):
    """Programs run in two orders, with equal bits.

    Only integers are added atomically, and only where positions are given.
    """
    import triton_offline

    expected = results_of(build(case), "triton")
    for seed in (1, 2):
        triton_offline.LAUNCHES.clear()
        with triton_offline.options(seed=seed):
            got = results_of(build(case), "triton")
        for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
    added = {
        name for _, stats in triton_offline.LAUNCHES for name in stats.by_opcode if name.startswith(("red", "atom"))
    }
    assert {name.rsplit(".", 1)[-1] for name in added} == ({"u64"} if case is FIXED else set())


@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_sequences_equal_each_by_itself(deterministic):
    """Lengths differ, and one sequence has no queries.

    Deterministic results have the same bits in any order of programs.
    """
    import triton_offline

    lengths_q, lengths_k = [70, 0, 33], [130, 20, 33]
    q, k, v = (torch.randn(sum(n), 2, 64, dtype=BF16, requires_grad=True) for n in (lengths_q, lengths_k, lengths_k))
    bias, dout = torch.randn(2, 41, requires_grad=True), torch.randn(sum(lengths_q), 2, 64, dtype=BF16)
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k)]

    def run(name: str) -> list[torch.Tensor]:
        out = offset_bias_attention_varlen(
            q, k, v, bias, *bounds, max(lengths_q), max(lengths_k), deterministic=deterministic, backend=name
        )
        return [out, *torch.autograd.grad(out, [q, k, v, bias], dout)]

    got = run("triton")
    for value, wanted in zip(got, run("reference"), strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-2, atol=2e-2)
    with triton_offline.options(seed=1):
        again = run("triton")
    assert all(torch.equal(*pair) for pair in zip(got[: 5 if deterministic else 4], again, strict=False))


def test_a_tile_adds_once_a_diagonal_not_once_a_score(two_kernels):
    """The dQ kernel has at most 1 / 32 atomic lanes per score. A kernel that adds every score has 1."""
    import triton_offline

    call = build(Case("covering", (512, 512), (64, 64), batch=1, heads=(1, 1), dtype=BF16))
    triton_offline.LAUNCHES.clear()
    results_of(call, "triton")
    ((_, stats),) = [launch for launch in triton_offline.LAUNCHES if launch[0] == "dquery_kernel"]
    lanes = sum(count for name, count in stats.lanes_by_class.items() if name.startswith(("red", "atom")))
    assert 0 < lanes <= 512 * 512 / 32


SHIFTED = torch.arange(49) // 7 * 13 + torch.arange(49) % 7 + 1000 * (torch.arange(49) // 28)
GATHERED = {
    "timestamps": ({"query_positions": torch.arange(70) * 1000, "key_positions": torch.arange(90) * 1000 + 7}, 41),
    "a shifted window": ({"query_positions": SHIFTED, "key_positions": SHIFTED, "window_size": (200, 200)}, 169),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("options", "columns"), GATHERED.values(), ids=GATHERED)
def test_gathered_gradients_add_once_a_pair_inside_the_table_and_once_an_end(options, columns, deterministic):
    """Pairs that are not attended to, and pairs at or beyond the ends of the table, take no atomic add of their own."""
    import triton_offline

    query_positions, key_positions = options["query_positions"], options["key_positions"]
    lengths = (len(query_positions), len(key_positions))
    case = Case(
        "counted", lengths, (32, 32), columns=columns, dtype=BF16, options={**options, "deterministic": deterministic}
    )
    call = build(case)
    triton_offline.LAUNCHES.clear()
    assert_matches_oracle(call, results_of(call, "triton"))
    ((_, stats),) = [launch for launch in triton_offline.LAUNCHES if launch[0] == "dquery_kernel"]
    lanes = sum(count for name, count in stats.lanes_by_class.items() if name.startswith(("red", "atom")))
    offsets = query_positions[:, None] - key_positions[None, :]
    heads, programs = 2 * 2, 2 * 2 * -(-lengths[0] // 64)
    assert lanes <= heads * (offsets.abs() < columns // 2).sum() + 2 * programs
    assert lanes > 0


def test_tuning_picks_the_cheapest_configuration_and_changes_no_result(monkeypatch, tmp_path):
    """`TRITON_OFFSET_BIAS_AUTOTUNE=1`: the emulator's clock is instructions; what candidates add to dbias goes."""
    import triton

    from triton_offset_bias.backends.triton import configs, launch, plan
    from triton_offset_bias.backends.triton.kernels.backward_keys import dkey_dvalue_kernel
    from triton_offset_bias.backends.triton.kernels.forward import forward_kernel

    case = Case("tuned", (100, 130), (32, 32), batch=1, heads=(1, 1), columns=41, dtype=FP16)
    square = [configs.Config(16, 16, 1, 1), configs.Config(32, 32, 4, 1)]
    monkeypatch.setattr(configs, "CANDIDATES", dict.fromkeys(("forward", "dquery", "dkey_dvalue"), square))
    monkeypatch.setenv(launch.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch._tuned.cache_clear()
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))
    tuned_kernels = ((forward_kernel, "len_k", None), (dkey_dvalue_kernel, "len_q", "sums"))
    for arguments in tuned_kernels:
        tuned = launch._tuned(*arguments)
        timings = tuned.configs_timings
        assert len(timings) == len(square)
        best = tuned.best_config
        assert timings[best] == min(timings.values())
    assert list(tmp_path.rglob("*.autotune.json"))
    best = launch._tuned(*tuned_kernels[0]).best_config
    launch._tuned.cache_clear()  # as in another process, which finds the results on disk
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(triton.runtime.Autotuner, "_bench", None)
    assert_matches_oracle(call, results_of(call, "triton"))
    assert launch._tuned(*tuned_kernels[0]).best_config == best
    launch._tuned.cache_clear()
