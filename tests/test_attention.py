"""Output, log-sum-exp and every gradient of every backend against the oracle, over a listed handful of calls."""

import os

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE
from oracle import NAMES, oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LARGE_SCALE = Case("large scale: nearly one key a query", options={"scale": 8.0})
SHAPES = [
    Case("one query, one key", (1, 1), (1, 1), batch=1, heads=(1, 1), through_lse=True),
    Case("one query, many keys: a decoding step", (1, 37), heads=(3, 3)),
    Case("many queries, one key", (37, 1)),
    Case("primes everywhere", (13, 17), (7, 11), batch=3, heads=(5, 5), through_lse=True),
    Case("a block of 12 queries less one", (11, 13)),
    Case("a block of 12 queries", (12, 12), options={"is_causal": True}),
    Case("a block of 12 queries and one", (13, 11)),
    Case("fewer queries than keys, causal: bottom-right aligned", (70, 211), options={"is_causal": True}),
    Case("more queries than keys, causal: the first see nothing", (211, 70), options={"is_causal": True}),
    Case("causal, the first key of a block of 32 seen by one query", (64, 65), options={"is_causal": True}),
    Case("the last key of a block of 64 seen by one query", (129, 129), options={"window_size": (65, -1)}),
    Case("long", (1031, 1033), (32, 32), batch=1, heads=(1, 1)),
    Case("long, causal", (1031, 1031), batch=1, heads=(1, 1), options={"is_causal": True}, through_lse=True),
    Case("long against short", (1201, 45), batch=1),
    Case("short against long, the table much shorter", (45, 1201), batch=1, columns=65),
]
ENGINE_BLOCKS = [
    Case("a block of 96 less one, many heads so that blocks are whole", (95, 97), batch=4, heads=(8, 8)),
    Case("a block of 96 and one, causal", (97, 95), batch=4, heads=(8, 8), options={"is_causal": True}),
    Case("exactly a block of 96, causal", (96, 96), batch=4, heads=(8, 8), options={"is_causal": True}),
    Case("192 keys less one, causal", (193, 191), batch=2, heads=(8, 8), options={"is_causal": True}),
    Case("exactly 192 keys", (192, 192), batch=2, heads=(8, 8)),
    Case("192 keys and one, causal", (191, 193), batch=2, heads=(8, 8), options={"is_causal": True}),
]
HEAD_DIMS = [
    Case("head dims 1 and 256", dims=(1, 256)),
    Case("head dims 256 and 1", dims=(256, 1)),
    Case("head dims 7 and 33", dims=(7, 33)),
    Case("head dims 33 and 7", dims=(33, 7)),
    Case("head dims 64 and 80", (61, 103), dims=(64, 80)),
    Case("head dims 80 and 64, causal", (103, 103), dims=(80, 64), options={"is_causal": True}),
    Case("the largest head dims", (101, 99), dims=(256, 256)),
    Case("grouped-query attention", (50, 50), heads=(6, 2), through_lse=True),
    Case("multi-query attention, causal", (40, 61), heads=(5, 1), options={"is_causal": True}),
]
TABLES = [
    Case("a table for all heads", bias="N"),
    Case("a table for all heads, two axes", bias="1N", heads=(4, 2)),
    Case("a table per sequence and head", bias="BHN", batch=3, options={"is_causal": True}),
    Case("a table per sequence", bias="B1N", batch=3),
    Case("no table", bias=None, options={"is_causal": True}),
    Case("no table, nothing masked, lse differentiated", (60, 50), bias=None, through_lse=True),
    Case("one column", columns=1, through_lse=True),
    Case("an even number of columns: the default origin is (N - 1) // 2", columns=10),
    Case("origin inside, off the middle", columns=20, options={"bias_origin": 3}),
    Case("origin left of the table", columns=20, options={"bias_origin": -4}),
    Case("origin right of the table, nothing beyond it", columns=20, options={"bias_origin": 24, "beyond": "zero"}),
    Case("every offset beyond the table, clamped", columns=5, options={"bias_origin": -100}),
    Case("every offset beyond the table, no bias", columns=5, options={"bias_origin": 100, "beyond": "zero"}),
    Case("no bias beyond a short table", columns=9, options={"beyond": "zero"}, through_lse=True),
    Case(
        "a causal table that just suffices",
        (31, 31),
        columns=31,
        options={"is_causal": True, "bias_origin": 0, "beyond": "error"},
    ),
    Case("offsets that are never attended to", columns=61, forbidden=(20, 30, 31, 60)),
    Case("the table ends two offsets inside of a block, on both sides", (200, 200), columns=133),
    Case("both clamped ends -inf: a window by the table", (200, 200), columns=31, forbidden=(0, 30)),
    Case("a table that forbids everything", columns=1, forbidden=(0,), through_lse=True),
    Case("bfloat16 table", bias_dtype=torch.bfloat16),
    Case("float64 table", bias_dtype=torch.float64),
]
MASKS = [
    Case("window to the left", (120, 120), options={"window_size": (17, -1)}),
    Case("window to the right", (120, 120), options={"window_size": (-1, 9)}),
    Case("window to both sides", (250, 230), options={"window_size": (40, 30)}, through_lse=True),
    Case("each query sees one key", options={"window_size": (0, 0)}),
    Case("window wider than the sequences", options={"window_size": (1000, 1000)}),
    Case("causal window: the right side is cut at 0", (120, 120), options={"window_size": (17, 5), "is_causal": True}),
    Case("queries from position 3 on, causal", options={"query_start": 3, "is_causal": True}),
    Case("queries from position -12 on, causal", options={"query_start": -12, "is_causal": True}, through_lse=True),
    Case("queries far after the keys", options={"query_start": 100_000}),
    Case("queries far before the keys", options={"query_start": -100_000, "beyond": "zero"}),
    Case("queries far before the keys, causal: nothing", options={"query_start": -500, "is_causal": True}),
    Case("queries past the window: nothing", options={"query_start": 500, "window_size": (9, 9)}, through_lse=True),
    Case("right padding", (100, 100), mask="right padding"),
    Case("left padding, causal: the first see nothing", (100, 100), mask="left padding", options={"is_causal": True}),
    Case("holes, shared heads", (110, 230), heads=(4, 2), mask="holes", through_lse=True),
    Case("a mask that is not contiguous", (60, 70), mask="holes, not contiguous"),
    Case(
        "holes, a window and a table per sequence",
        (230, 210),
        bias="BHN",
        mask="holes",
        options={"window_size": (33, 7)},
    ),
    Case("one key in the first and the last panel", (40, 100), mask="a key to each side of panels of 16"),
    Case("a sequence without keys", mask="one sequence has no key", through_lse=True),
    Case("scale 0: the table alone", options={"scale": 0.0}),
    Case("negative scale", options={"scale": -0.7}),
    LARGE_SCALE,
]
DTYPES = [
    Case("float16", (61, 67), (64, 64), dtype=torch.float16, through_lse=True),
    Case("float16, all masks", (130, 130), dtype=torch.float16, mask="holes", options={"window_size": (50, 20)}),
    Case("float16, the table much shorter", (45, 201), (32, 32), dtype=torch.float16, columns=33),
    Case("bfloat16, causal", (130, 130), (32, 24), dtype=torch.bfloat16, options={"is_causal": True}),
    Case("bfloat16 throughout", (50, 50), heads=(4, 1), dtype=torch.bfloat16, bias_dtype=torch.bfloat16),
    Case("float64", (53, 61), (20, 12), dtype=torch.float64, bias_dtype=torch.float64, through_lse=True),
    Case(
        "float64, causal, all masks",
        (210, 200),
        heads=(4, 2),
        dtype=torch.float64,
        bias_dtype=torch.float64,
        mask="holes",
        options={"is_causal": True, "window_size": (60, 0)},
    ),
    Case("float64 with a float32 table", dtype=torch.float64, bias="BHN", columns=21),
]
DETERMINISTIC = [
    Case("deterministic", (29, 31), through_lse=True, options={"deterministic": True}),
    Case(
        "deterministic, causal, grouped heads, a clamped table",
        (150, 130),
        heads=(4, 2),
        columns=41,
        options={"deterministic": True, "is_causal": True},
    ),
    Case(
        "deterministic, holes, a window inside of blocks, a table per sequence",
        (130, 150),
        bias="BHN",
        columns=31,
        mask="holes",
        options={"deterministic": True, "window_size": (40, 21), "beyond": "zero"},
    ),
]
LAYOUTS = [
    Case("transposed views", (40, 50), heads=(6, 2), layout="transposed BLHD"),
    Case("slices of a packed qkv", (40, 40), layout="slice of a packed qkv"),
    Case("slices of a packed qkv, negative scale", (40, 40), layout="slice of a packed qkv", options={"scale": -0.3}),
    Case("head dim not innermost", layout="last stride not 1", dims=(12, 20)),
    Case("gaps between elements", layout="every other element", dtype=torch.bfloat16),
    Case("one head's memory for all", heads=(4, 4), layout="heads of stride 0"),
    Case("a view with the negative bit", layout="negated view"),
    Case(
        "indices beyond 2**31",
        (37, 41),
        batch=1,
        heads=(1, 1),
        dtype=torch.bfloat16,
        layout="rows 2**26 elements apart",
    ),
]
CASES = [*SHAPES, *ENGINE_BLOCKS, *HEAD_DIMS, *TABLES, *MASKS, *DTYPES, *DETERMINISTIC, *LAYOUTS]


def _is_served(backend: str, case: Case) -> bool:
    """GPU kernels have no float64.

    Triton's interpreter rounds twice where hardware has a fused multiply-add, and takes too long over the many heads
    that the engine's blocks need.
    """
    left_to_gpus = INTERPRETED and (case is LARGE_SCALE or case in ENGINE_BLOCKS)
    return backend != "triton" or not (case.dtype == torch.float64 or left_to_gpus)


SERVED = [
    pytest.param(
        backend,
        case,
        id=f"{backend}-{case.reason}",
        marks=[pytest.mark.large_memory(20)] if case.layout == "rows 2**26 elements apart" else [],
    )
    for backend in AVAILABLE
    for case in CASES
    if _is_served(backend, case)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "case"), SERVED)
def test_every_result_is_as_accurate_as_plain_pytorch(backend, case):
    """The results are the output, the log-sum-exp, and the gradients of query, key, value and table."""
    call = build(case)
    assert_matches_oracle(call, results_of(call, backend))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_a_float32_tables_gradient_is_right_to_a_hundred_thousandth(backend, options):
    """The largest element is the unit. Offsets lie inside the table and far beyond it."""
    call = build(Case("float32", (200, 210), (64, 64), columns=61, options=options))
    truth = oracle(call.q, call.k, call.v, call.bias, **options, dout=call.dout).dbias
    error = (results_of(call, backend).dbias.double() - truth).abs().max()
    assert error <= 1e-5 * truth.abs().max()


TWO_WITNESSES = (
    "primes everywhere",
    "grouped-query attention",
    "no bias beyond a short table",
    "window to both sides",
    "holes, shared heads",
)


@pytest.mark.parametrize("reason", TWO_WITNESSES)
def test_the_oracles_gradients_are_those_of_autograd(reason):
    """The truth has two witnesses: its formulas for the gradients, and torch's derivative of its forward."""
    (case,) = (case for case in (*SHAPES, *HEAD_DIMS, *TABLES, *MASKS) if case.reason == reason)
    call = build(case)
    inputs = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v, call.bias)]
    dlse = torch.zeros(call.dout.shape[:3]) if call.dlse is None else call.dlse
    ref64 = oracle(*inputs, **call.options, dout=call.dout, dlse=dlse)
    derivatives = torch.autograd.grad([ref64.out, ref64.lse], inputs, [call.dout.double(), dlse.double()])
    for name, derivative in zip(NAMES[2:], derivatives, strict=True):
        torch.testing.assert_close(getattr(ref64, name).detach(), derivative, rtol=1e-10, atol=1e-12)


EDGES = [
    *({"query_start": start, "is_causal": True} for start in range(-1, 17)),
    *({"query_start": start, "window_size": (60, 37)} for start in range(12)),
    {},
]


@pytest.mark.parametrize("options", EDGES, ids=str)
def test_no_table_is_a_table_of_zeros_wherever_the_masks_edge_falls_in_a_block(backend, options):
    """Without a table whole blocks skip the mask. No such block may reach past the mask's edge, forward or backward."""
    call = build(Case("no table", (205, 215), (8, 8), batch=1, heads=(1, 1), bias=None, options=options))
    got = results_of(call, backend)
    call.bias = torch.zeros(1, requires_grad=True)
    expected = results_of(call, backend)
    for name in NAMES[:-1]:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
