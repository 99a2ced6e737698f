"""The backward pass of the GPU kernels: one kernel for all gradients, or one for queries and one for keys."""

import pytest
import torch
from cases import Case, assert_matches_oracle, build, results_of
from conftest import AVAILABLE

from triton_offset_bias import offset_bias_attention_varlen

configs = pytest.importorskip("triton_offset_bias.backends.triton.configs", reason="Triton is not installed")
launch = pytest.importorskip("triton_offset_bias.backends.triton.launch", reason="Triton is not installed")
plan = pytest.importorskip("triton_offset_bias.backends.triton.plan", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="no GPU here, and Triton's interpreter is off (TRITON_INTERPRET=1)"
)
WAYS = {
    "one kernel": configs.Config(64, 128, 8, 2),
    "one kernel, square tiles": configs.Config(64, 64, 4, 2),
    "one kernel, small tiles": configs.Config(16, 32, 4, 2),
    "two kernels": None,
}
CASES = [
    Case("far tiles on both sides, ragged", (150, 190), columns=33),
    Case("tiles fill the lengths", (128, 256), columns=41, through_lse=True),
    Case("causal, grouped heads", (140, 140), heads=(4, 2), columns=61, options={"is_causal": True}),
    Case("a window, holes, odd head dims", (130, 140), (24, 40), mask="holes", options={"window_size": (50, 20)}),
    Case("the last keys do not fill a tile, large biases", (70, 70), mask="left padding", columns=5),
    Case("zero beyond, one row for all heads", (130, 90), bias="1N", columns=31, options={"beyond": "zero"}),
    Case("a table for each sequence", (70, 150), bias="BHN", columns=91),
    Case("no table", (130, 150), bias=None, options={"is_causal": True}),
    Case("dropout", (70, 130), columns=81, options={"dropout_p": 0.3}),
    Case("a negative scale, a slice", (90, 70), layout="slice of a packed qkv", options={"scale": -0.2}),
    Case("lengths", (70, 130), columns=41, options={"key_lengths": torch.tensor([130, 71]), "is_causal": True}),
]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, and without plans from calls before."""
    names, launch_it = [], launch.Launch.__call__

    def record(self, *arguments):
        names.append(self.kernel.__name__.removesuffix("_kernel"))
        return launch_it(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    monkeypatch.setattr(plan, "_plans", {})
    return names


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_both_ways_have_the_gradients_of_the_oracle(monkeypatch, launched, case, way):
    """One kernel adds dQ and the table's gradient to sums that start at zero."""
    monkeypatch.setattr(configs, "backward_config", lambda *_: WAYS[way])
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))
    assert ("dquery" in launched) == (way == "two kernels")


@pytest.mark.parametrize("way", ["one kernel", "two kernels"])
@pytest.mark.parametrize("keeps_sums", [False, True])
@pytest.mark.parametrize("folds_rows", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.reason)
def test_each_form_of_the_sums_along_diagonals(monkeypatch, launched, case, folds_rows, keeps_sums, way):
    """Targets and head dims choose between these forms. Here a small head has each of them."""
    monkeypatch.setattr(configs, "backward_config", lambda *_: WAYS[way])
    monkeypatch.setattr(configs, "folds_rows", lambda *_: folds_rows)
    monkeypatch.setattr(configs, "keeps_sums", lambda *_: keeps_sums)
    call = build(case)
    assert_matches_oracle(call, results_of(call, "triton"))
    assert ("dquery" in launched) == (way == "two kernels")


@pytest.mark.parametrize("way", WAYS)
def test_packed_sequences_do_not_add_to_one_another(monkeypatch, launched, way):
    """Tiles of queries end amid the tensor, where another sequence's rows follow; the values of one are NaN."""
    monkeypatch.setattr(configs, "backward_config", lambda *_: WAYS[way])
    lengths = [70, 0, 33, 130]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), 2, 16) for _ in range(3))
    v[70:103] = float("nan")
    leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.randn(2, 41, requires_grad=True)]
    gradients = []
    for backend in ("triton", "reference"):
        out = offset_bias_attention_varlen(*leaves, *2 * [bounds], *2 * [max(lengths)], is_causal=True, backend=backend)
        out = torch.cat([out[:70], out[103:]])  # no loss sees the sequence of NaN
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, expected in zip(*(of_way[:3] for of_way in gradients), strict=True):  # the table is the NaN's too
        torch.testing.assert_close(got[:70], expected[:70], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[103:], expected[103:], rtol=1e-4, atol=1e-4)
    assert ("dquery" in launched) == (way == "two kernels")


@pytest.mark.parametrize("options", [{"deterministic": True}, {"query_positions": torch.arange(40)}])
def test_sums_that_must_not_depend_on_the_order_and_gathered_tables_take_two_kernels(launched, monkeypatch, options):
    """One kernel adds atomically, and along diagonals."""
    monkeypatch.setattr(configs, "backward_config", lambda *_: WAYS["one kernel"])
    if "query_positions" in options:
        options = {**options, "key_positions": torch.arange(40)}
    call = build(Case("two", (40, 40), columns=9, options=options))
    assert_matches_oracle(call, results_of(call, "triton"))
    assert "dquery" in launched
