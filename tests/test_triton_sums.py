"""Sums of the backward pass over many programs of the GPU kernels: copies of a small table's gradient."""

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE

configs = pytest.importorskip("triton_offset_bias.backends.triton.configs", reason="Triton is not installed")
launch = pytest.importorskip("triton_offset_bias.backends.triton.launch", reason="Triton is not installed")
passes = pytest.importorskip("triton_offset_bias.backends.triton.passes", reason="Triton is not installed")
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


SPLIT = {
    "a table for all heads and sequences": (
        "dbias",
        Case("shared", (130, 100), batch=2, heads=(3, 3), bias="N", options={"deterministic": True}),
        [1, 7, 1000],
    ),
    "one key head": (
        "dkey_dvalue",
        Case("one key head", (40, 70), (16, 24), heads=(5, 1), mask="holes", options={"deterministic": True}),
        [1, 1000],
    ),
    "one key head, one kernel": ("dkey_dvalue", Case("one key head", (40, 70), heads=(5, 1), dtype=torch.float16), [4]),
}


@needs_kernels
@pytest.mark.parametrize(("kernel", "case", "devices"), SPLIT.values(), ids=SPLIT)
def test_sums_in_one_order_are_split_until_a_device_has_two_programs_for_each_multiprocessor(
    monkeypatch, kernel, case, devices
):
    """There are no more splits than addends. The same device has the same bits each time."""
    programs, launch_it = [], launch.Launch.__call__

    def record(self, *arguments):
        if self.kernel.__name__ == f"{kernel}_kernel":
            programs.append(self._programs)
        return launch_it(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    call = build(case)
    for number in devices:
        monkeypatch.setattr(passes, "multiprocessors", lambda _, number=number: number)
        first, again = (results_of(call, "triton") for _ in range(2))
        assert_matches_oracle(call, first)
        names = ("dk", "dv", "dbias") if case.options.get("deterministic") else ("dk", "dv")
        assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in names)
    whole, *split = programs[::2]
    addends = 3 * 2 if kernel == "dbias" else 5  # tiles of all heads in a sequence, or heads
    if len(devices) > 1:
        assert split == [whole * min(-(-2 * n // whole), addends) for n in devices[1:]]
    else:
        assert whole >= 2 * devices[0]
