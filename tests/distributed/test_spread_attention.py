"""Attention over 1 to 4 ranks: outputs, log-sum-exps and all gradients are those of one process."""

import itertools
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import AVAILABLE
from spread import run_ranks
from spread_cases import CASES, ON_REFERENCE, ON_TRITON, assert_right, built, spread_results
from torch.distributed.device_mesh import init_device_mesh

from triton_offset_bias import distributed
from triton_offset_bias.distributed.spans import LAYOUTS
from triton_offset_bias.distributed.world import METHODS

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]


def _has_tradable_heads(heads: tuple[int, int], ranks: int) -> bool:
    return heads[0] % ranks == 0 and (heads[1] % ranks == 0 or ranks % heads[1] == 0)


def _failures_of(rank: int, group: object, ways: list[tuple[str, str]], trading: int) -> list[str]:
    """What is wrong with which case, by each method and layout; `trading` ranks trade heads on a mesh."""
    failures = []
    for case, (method, layout) in itertools.product(CASES, ways):
        ranks = dist.get_world_size() if method == "all_to_all" else trading
        if not _has_tradable_heads(case.heads, ranks):
            continue
        for backend in ("cpp", "reference") if case.reason in ON_REFERENCE else ("cpp",):
            call = built(case)
            got = spread_results(call, distributed.offset_bias_attention, group, layout, method=method, backend=backend)
            if rank == 0:
                try:
                    assert_right(call, got)
                except AssertionError:
                    failures.append(f"{case.reason}, {method}, {layout}, {backend}: {traceback.format_exc(limit=1)}")
    return failures


def _all_methods(rank: int, world: int) -> None:
    failures = _failures_of(rank, None, [*itertools.product(METHODS, LAYOUTS)], 1)
    assert not failures, "\n".join(failures)


def _triton(rank: int, world: int) -> None:
    for case in [case for case in CASES if case.reason in ON_TRITON]:
        for method, layout in (("ring", "zigzag"), ("all_to_all", "contiguous")):
            call = built(case)
            attend = distributed.offset_bias_attention
            got = spread_results(call, attend, None, layout, method=method, backend="triton")
            if rank == 0:
                assert_right(call, got)


def _mesh(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
    failures = _failures_of(rank, mesh, [("ring", "zigzag"), ("gather", "contiguous")], 2)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_call_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    """Every case by every method in every layout."""
    run_ranks(_all_methods, world, tmp_path)


@pytest.mark.skipif("triton" not in AVAILABLE, reason="TRITON_INTERPRET=1 runs the kernels on CPU tensors")
def test_triton_kernels_serve_parts(tmp_path: Path) -> None:
    """Two ranks of a ring in zigzag, and two that trade heads."""
    run_ranks(_triton, 2, tmp_path)


def test_heads_and_keys_travel_at_once_on_a_mesh(tmp_path: Path) -> None:
    """Two ranks trade heads, two such pairs send keys."""
    run_ranks(_mesh, 4, tmp_path)
