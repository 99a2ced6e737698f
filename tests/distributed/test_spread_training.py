"""Training over ranks: DDP and FSDP2, checkpointing, compilation, packed sequences, equal bits, bytes that are sent."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import AVAILABLE
from spread import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from triton_offset_bias import distributed, offset_bias_attention, offset_bias_attention_varlen
from triton_offset_bias.distributed import travel
from triton_offset_bias.distributed.world import METHODS
from triton_offset_bias.modules import KerpleBias, LowRankOffsetBias, OffsetBias, OffsetBiasAttention

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
LENGTH, WIDTH, HEADS = 48, 24, 6
F64 = torch.float64


class Model(nn.Module):
    """One layer of causal attention with a bias module, in one process or over ranks."""

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), bias
        self.attend = offset_bias_attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) to the same."""
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        table = self.bias(-(LENGTH - 1), LENGTH - 1)
        return self.out(self.attend(q, k, v, table, is_causal=True).transpose(1, 2).flatten(2))


def _check_gradients(bias: nn.Module, wrapper: str, method: str, world: int) -> None:
    """The mean of local tokens' losses, as data parallelism has it, gives the gradients of one process."""
    torch.manual_seed(0)
    model = Model(bias).double()
    x, y = torch.randn(2, LENGTH, WIDTH, dtype=F64), torch.randn(2, LENGTH, WIDTH, dtype=F64)
    spread = copy.deepcopy(model)
    spread.attend = lambda *inputs, **options: distributed.offset_bias_attention(
        *inputs, layout="zigzag", method=method, **options
    )
    wrapped = DistributedDataParallel(spread) if wrapper == "ddp" else fully_shard(
        spread, mesh=init_device_mesh("cpu", (world,))
    )  # fmt: skip
    (model(x) - y).square().mean().backward()
    parts = [distributed.shard(z, 1, layout="zigzag") for z in (x, y)]
    (wrapped(parts[0]) - parts[1]).square().mean().backward()
    got = dict(wrapped.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = got[f"module.{name}" if wrapper == "ddp" else name].grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        # Modules give float32 tables, so each rank's share is rounded to float32.
        tolerance = 1e-8 if name.startswith("bias") else 1e-12
        torch.testing.assert_close(gradient, parameter.grad, rtol=tolerance, atol=tolerance)


def _whole(length: int = LENGTH) -> list[Tensor]:
    """Query, key, value, a table, and the output's gradient, equal on all ranks."""
    torch.manual_seed(1)
    shape = (1, HEADS, length, 8)
    return [*(torch.randn(shape, dtype=F64) for _ in range(3)), torch.randn(HEADS, 2 * length - 1, dtype=F64),
            torch.randn(shape, dtype=F64)]  # fmt: skip


def _gradients(attend, layout: str) -> list[Tensor]:
    """This rank's output and gradients; the table's is a share."""
    *inputs, table, dout = _whole()
    leaves = [*(distributed.shard(x, 2, layout=layout).requires_grad_() for x in inputs), table.requires_grad_()]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, distributed.shard(dout, 2, layout=layout))]


def _check_same_bits_checkpoint_and_compiler(method: str) -> None:
    def attend(q, k, v, table):
        return distributed.offset_bias_attention(q, k, v, table, is_causal=True, layout="zigzag", method=method)

    first = _gradients(attend, "zigzag")
    ways = {
        "again": attend,
        "checkpointed": lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False),
        "compiled": torch.compile(lambda q, *others: attend(q * 1.0, *others) * 1.0, backend="eager"),
    }
    for name, way in ways.items():
        for x, y in zip(first, _gradients(way, "zigzag"), strict=True):
            assert torch.equal(x, y), (name, method)


def _check_packed(method: str, layout: str, tables: bool, backend: str = "cpp", is_gated: bool = False) -> None:
    """Documents of 9, 0, 14, 17 and 8 tokens: outputs and gradients of the packed function in one process."""
    dtype, atol = (torch.float32, 1e-5) if backend == "triton" else (torch.float64, 1e-12)
    bounds = torch.tensor([0, 9, 9, 23, 40, 48], dtype=torch.int32)
    q, k, v, table, dout = ((x.squeeze(0).transpose(0, 1) if x.dim() == 4 else x).to(dtype).double() for x in _whole())
    table = torch.stack([table * (i + 1) for i in range(5)]) if tables else table
    options = {"is_causal": True, "window_size": (11, -1), "return_lse": True}
    gates = [q[..., 0] + k[..., 1]] if is_gated else []
    leaves = [x.clone().requires_grad_() for x in (q, k, v, table, *gates)]
    gate = leaves[4] if is_gated else None
    out, lse = offset_bias_attention_varlen(*leaves[:4], bounds, bounds, 17, 17, bias_gate=gate, **options)
    expected = [out, lse, *torch.autograd.grad((out, lse.sum()), leaves, (dout, torch.ones(()).double()))]
    mine = [distributed.shard(x, 0, layout=layout).to(dtype).requires_grad_() for x in (q, k, v)]
    mine.append(table.detach().to(dtype).requires_grad_())
    mine += [distributed.shard(x, 0, layout=layout).to(dtype).requires_grad_() for x in gates]
    ways = {"layout": layout, "method": method, "backend": backend}
    out, lse = distributed.offset_bias_attention_varlen(
        *mine[:4], bounds, bounds, 17, 17, bias_gate=mine[4] if is_gated else None, **ways, **options
    )
    gradients = torch.autograd.grad(
        (out, lse.sum()), mine, (distributed.shard(dout, 0, layout=layout).to(dtype), torch.ones((), dtype=dtype))
    )
    got = [distributed.unshard(x, dim, LENGTH, layout=layout)
           for x, dim in zip((out, lse, *gradients[:3]), (0, 1, 0, 0, 0), strict=True)]  # fmt: skip
    dist.all_reduce(gradients[3])
    got += [gradients[3], *(distributed.unshard(x, 0, LENGTH, layout=layout) for x in gradients[4:])]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y.detach().to(x.dtype), rtol=0, atol=atol)


def _packed_on_triton(rank: int, world: int) -> None:
    for method, layout in (("ring", "zigzag"), ("gather", "contiguous"), ("all_to_all", "contiguous")):
        _check_packed(method, layout, tables=True, backend="triton")


@pytest.mark.skipif("triton" not in AVAILABLE, reason="TRITON_INTERPRET=1 runs the kernels on CPU tensors")
def test_triton_kernels_serve_documents_that_are_cut(tmp_path: Path) -> None:
    """A table for each document, two ranks."""
    run_ranks(_packed_on_triton, 2, tmp_path)


def _training(rank: int, world: int) -> None:
    biases = {"OffsetBias": lambda: OffsetBias(HEADS, LENGTH, bidirectional=False), "KERPLE": lambda: KerpleBias(HEADS)}
    for make, wrapper, method in itertools.product(biases.values(), ("ddp", "fsdp2"), METHODS):
        torch.manual_seed(2)
        _check_gradients(make(), wrapper, method, world)
    for method in METHODS:
        _check_same_bits_checkpoint_and_compiler(method)
        for layout, tables in itertools.product(("contiguous", "zigzag"), (False, True)):
            _check_packed(method, layout, tables)
            _check_packed(method, layout, tables, is_gated=True)
    assert torch.equal(distributed.unshard(distributed.positions(50, layout="zigzag"), 0, 50, layout="zigzag"),
                       torch.arange(50))  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_training_over_ranks_is_training_in_one_process(world: int, tmp_path: Path) -> None:
    """DDP and FSDP2 over the context group, with a free and a parametrised table, by every method."""
    run_ranks(_training, world, tmp_path)


# Bytes that all ranks send, forward and backward, in units of the whole keys and values, at most; four ranks, float32.
MOST_SENT = {
    ("full", "ring", "contiguous"): (3.0, 6.0),
    ("full", "gather", "contiguous"): (3.0, 6.0),
    ("full", "all_to_all", "contiguous"): (1.5, 1.5),
    ("causal", "ring", "zigzag"): (2.25, 4.5),
    ("causal", "ring", "contiguous"): (1.5, 3.0),
    ("window", "ring", "contiguous"): (0.375, 0.75),
    ("window", "ring", "zigzag"): (0.75, 1.5),
    ("window", "gather", "contiguous"): (0.375, 0.75),
}
OPTIONS = {"full": {}, "causal": {"is_causal": True}, "window": {"is_causal": True, "window_size": (16, -1)}}


def _check_two_dimensions() -> None:
    """Two groups of two ranks: groups have different sequences, the ranks of a group have parts of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    torch.manual_seed(4)
    bias, gated = OffsetBias(4, LENGTH, bidirectional=False), LowRankOffsetBias(16, 4, rank=3, extent=9)
    model = nn.Sequential(*(OffsetBiasAttention(16, 4, each, is_causal=True) for each in (bias, gated)))
    nn.init.normal_(bias.weight)
    nn.init.normal_(gated.weight)
    x = torch.randn(4, LENGTH, 16)
    expected = model(x)
    expected.square().mean().backward()
    for method, wrapper in itertools.product(METHODS, ("ddp", "fsdp2")):
        spread = copy.deepcopy(model)
        for parameter in spread.parameters():
            parameter.grad = None
        assert distributed.parallelize_context(spread, mesh["context"], layout="zigzag", method=method) == 2
        wrapped = DistributedDataParallel(spread) if wrapper == "ddp" else fully_shard(
            spread, mesh=mesh._flatten("all")
        )  # fmt: skip
        part = distributed.shard(x.chunk(2)[mesh.get_local_rank("data")], 1, mesh["context"], "zigzag")
        wrapped(part).square().mean().backward()
        got = dict(wrapped.named_parameters())
        for name, parameter in model.named_parameters():
            gradient = got[f"module.{name}" if wrapper == "ddp" else name].grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(gradient, parameter.grad)
    with pytest.raises(ValueError, match=r"`model` must hold an OffsetBiasAttention, .* got Linear"):
        distributed.parallelize_context(nn.Linear(2, 2))


def _bytes(rank: int, world: int) -> None:
    _check_two_dimensions()
    length = 128
    *inputs, table, _ = (x[..., :4, :] if x.dim() == 2 else x[:, :4] for x in _whole(length))
    unit = 2 * inputs[0].numel() * 4
    for (name, method, layout), most in MOST_SENT.items():
        mine = [distributed.shard(x, 2, layout=layout).float().requires_grad_() for x in inputs]
        call = {"layout": layout, "method": method, **OPTIONS[name]}
        distributed.offset_bias_attention(*mine, table.float(), **call)  # all ranks agree
        before = travel.sent_bytes
        out = distributed.offset_bias_attention(*mine, table.float(), **call)
        middle = travel.sent_bytes
        out.sum().backward()
        sent = torch.tensor([middle - before, travel.sent_bytes - middle], dtype=torch.float64)
        dist.all_reduce(sent)
        for got, allowed in zip((sent / unit).tolist(), most, strict=True):
            assert got <= allowed * 1.02, (name, method, layout, (sent / unit).tolist())


def test_four_ranks_train_on_two_dimensions_and_send_only_what_is_reached(tmp_path: Path) -> None:
    """Data parallelism x context parallelism. Windows send the halo alone; a later span goes to ranks that reach it."""
    run_ranks(_bytes, 4, tmp_path)
