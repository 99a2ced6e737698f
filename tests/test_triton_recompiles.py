"""What the host does for the GPU kernels: how many kernels Triton compiles, and how many a call launches.

A driver that compiles and launches nothing counts them.
"""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench.fake_driver import Record, installed  # noqa: E402
from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen  # noqa: E402
from triton_offset_bias.backends.triton.target import interprets  # noqa: E402

pytestmark = pytest.mark.skipif(interprets(), reason="Triton's interpreter is on, and compiles nothing")
MOST = 8  # kernels of one head dim
LENGTHS = random.Random(0).choices(range(64, 601), k=150)


@pytest.fixture
def record():
    """A Hopper GPU that does nothing."""
    with installed(90) as made:
        yield made


def tensors(*shapes, **options):
    """Tensors on the CPU, where the driver that does nothing takes them."""
    return [torch.empty(*shape, dtype=torch.bfloat16, device="cpu", **options) for shape in shapes]


def train(len_q, len_k=None, columns=257, layout="BHLD", **options):
    """One step of training, with results that nobody writes."""
    shapes = [
        (2, length, 4, 64) if layout == "BLHD" else (2, 4, length, 64) for length in (len_q, *2 * [len_k or len_q])
    ]
    q, k, v = leaves = tensors(*shapes, requires_grad=True)
    if layout == "BLHD":
        q, k, v = (x.transpose(1, 2) for x in leaves)
    table = None if columns is None else torch.empty(4, columns, device="cpu", requires_grad=True)
    out = offset_bias_attention(q, k, v, table, backend="triton", **options)
    out.backward(torch.empty_like(out))


def decode(length, capacity=None):
    """One query against a cache: a view of a larger one, or one of its own."""
    q, k, v = tensors((1, 8, 1, 64), *2 * [(1, 8, capacity or length, 64)])
    table = torch.empty(8, 257, device="cpu")
    offset_bias_attention(q, k[:, :, :length], v[:, :, :length], table, is_causal=True, backend="triton")


def train_packed(lengths):
    """One step on packed sequences."""
    bounds = torch.tensor([0, *lengths], device="cpu").cumsum(0).int()
    q, k, v = tensors(*3 * [(sum(lengths), 4, 64)], requires_grad=True)
    table, longest = torch.empty(4, 257, device="cpu", requires_grad=True), max(lengths)
    out = offset_bias_attention_varlen(q, k, v, table, *2 * [bounds], *2 * [longest], is_causal=True, backend="triton")
    out.backward(torch.empty_like(out))


TRAINED = {
    "clamped": {},
    "clamped, causal": {"is_causal": True},
    "a table that covers all": {"columns": 2047},
    "no table": {"columns": None},
    "no table, causal": {"columns": None, "is_causal": True},
    "a window": {"window_size": (128, -1), "is_causal": True},
    "heads beside one another": {"layout": "BLHD", "is_causal": True},
}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_random_lengths_compile_few_kernels(record, options):
    """One of each kernel for lengths that tiles fill, and one for others."""
    for length in LENGTHS:
        train(length, **options)
    assert len(record.compiled) <= MOST, sorted(record.compiled)


@pytest.mark.parametrize("is_causal", [False, True])
def test_random_lengths_of_cross_attention_compile_few_kernels(record, is_causal):
    """Queries and keys have lengths of their own; where queries lie before all keys, some attend to nothing."""
    for length in LENGTHS:
        train(length, random.Random(length).randint(1, 600), is_causal=is_causal)
    assert len(record.compiled) <= MOST, sorted(record.compiled)


@pytest.mark.parametrize("capacity", [None, 4096])
def test_a_growing_cache_compiles_few_kernels(record, capacity):
    """From the first key to where keys are split among programs, and on."""
    for length in [*range(1, 1200, 7), *range(1, 4000, 256), 512, 1024, 4096]:
        decode(length, capacity)
    assert {"forward", "decode", "combine"} <= set(record.compiled)
    assert len(record.compiled) <= MOST, sorted(record.compiled)


@pytest.mark.parametrize(
    ("len_q", "expected"),
    [(1, ["prepare", "decode", "combine"]), (70, ["prepare", "forward"])],
    ids=["decode", "forward"],
)
def test_a_captured_step_serves_every_length_of_a_cache(record, monkeypatch, len_q, expected):
    """Calls with other `key_lengths` have one plan, and with it the same kernels, grids and numbers."""
    from triton_offset_bias.backends.triton import plan

    monkeypatch.setattr(plan, "_plans", {})
    q, k, v = tensors((2, 4, len_q, 64), *2 * [(2, 2, 2048, 64)])
    table = torch.empty(4, 257, device="cpu")
    for lengths in ([2048, 2048], [3, 0], [700, 1]):
        record.launches.clear()
        lengths = torch.tensor(lengths, device="cpu")
        offset_bias_attention(q, k, v, table, enable_gqa=True, key_lengths=lengths, backend="triton")
        assert record.launches == expected
    assert record.compiled == expected
    assert len(plan._plans) == 1


def test_packed_sequences_compile_few_kernels(record):
    """Six sequences, of other lengths in every step."""
    generator = random.Random(1)
    for _ in range(60):
        train_packed([generator.randint(10, 300) for _ in range(6)])
    assert len(record.compiled) <= MOST, sorted(record.compiled)


def launches(record: Record, call) -> list[str]:
    """The kernels that a call launches, when it is repeated."""
    call()
    record.launches.clear()
    call()
    return record.launches


@pytest.mark.parametrize(
    ("deterministic", "backward"),
    [(False, ["dkey_dvalue", "fold"]), (True, ["dquery", "dkey_dvalue", "dbias", "fold"])],
    ids=["", "deterministic"],
)
def test_a_call_launches_two_kernels_and_its_backward_pass_three(record, deterministic, backward):
    """A strip and the sweep; rows prepared, the sweep, and the table folded. Deterministic sums take more."""
    made = launches(record, lambda: train(128, deterministic=deterministic))
    assert made == ["prepare", "forward", "prepare", *backward]


class _Operators(TorchDispatchMode):
    """Notes the names of torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_beside_its_kernels_a_call_has_torch_only_allocate(record):
    """An operator that fills or copies memory would be one more launch."""
    with _Operators() as noted:
        train(128)
    allocating = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "view", "alias"}
    assert noted.names <= {*allocating, "mul", "attention", "attention_backward"}  # dQ is its sum times the scale
    assert record.launches.count("fold") == 1


def test_tensors_of_other_alignment_get_their_own_kernels(record):
    """The kernel that is kept for a layout loads 16 bytes at once; a tensor may begin elsewhere."""
    memory, table = (
        torch.empty(3 * 2 * 128 * 64 + 8, dtype=torch.bfloat16, device="cpu"),
        torch.empty(2, 257, device="cpu"),
    )
    for first in (0, 0, 1, 0, 1):
        q, k, v = memory[first : first + 3 * 2 * 128 * 64].view(3, 1, 2, 128, 64)
        offset_bias_attention(q, k, v, table, backend="triton")
    assert record.compiled.count("forward") == 2
    assert record.launches == ["prepare", "forward"] * 5


def test_plans_of_layouts_are_bounded(record, monkeypatch):
    """The oldest go."""
    from triton_offset_bias.backends.triton import plan

    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "MOST_PLANS", 5)
    for length in range(1, 20):
        train(length)
    assert len(plan._plans) == 5
