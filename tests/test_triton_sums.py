"""Sums of the backward pass over many programs of the GPU kernels: copies of a small table's gradient."""

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE

configs = pytest.importorskip("triton_offset_bias.backends.triton.configs", reason="Triton is not installed")
needs_kernels = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)


@needs_kernels
@pytest.mark.parametrize("deterministic", [False, True])
def test_programs_that_share_a_small_gathered_table_add_to_copies_of_it(monkeypatch, deterministic):
    """Six programs add to 16 copies. The gradient is the sum of all copies."""
    monkeypatch.setattr(configs, "_MIN_COPIED_QUERIES", 6 * 13)
    positions = {"query_positions": torch.arange(13) * 5 % 13, "key_positions": torch.arange(17) * 3 % 17}
    options = {**positions, "deterministic": deterministic}
    call = build(Case("shared", (13, 17), batch=3, bias="N", columns=21, options=options))
    assert_matches_oracle(call, results_of(call, "triton"))
