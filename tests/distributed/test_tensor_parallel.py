"""Tensor parallelism: heads are sharded over ranks, and every gradient is that of one process."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spread import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from triton_offset_bias.distributed import HeadParallel
from triton_offset_bias.modules import (
    ALiBiBias,
    FireBias,
    KerpleBias,
    OffsetBias,
    OffsetBiasAttention,
    SandwichBias,
    T5Bias,
)

pytestmark = pytest.mark.cpu_only
WIDTH, HEADS, LENGTH = 16, 4, 12
BIASES: dict[str, Callable[[], nn.Module]] = {
    "OffsetBias": lambda: OffsetBias(HEADS, LENGTH),
    "T5": lambda: T5Bias(HEADS, 8, 20),
    "ALiBi": lambda: ALiBiBias(HEADS),
    "ALiBi, learnable": lambda: ALiBiBias(HEADS, learnable=True),
    "KERPLE": lambda: KerpleBias(HEADS),
    "FIRE": lambda: FireBias(HEADS, LENGTH, hidden_size=5),
    "Sandwich": lambda: SandwichBias(HEADS, 8),
}


def _plan(prefix: str = "") -> dict:
    projections = {f"{prefix}{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    return {**projections, f"{prefix}out_proj": RowwiseParallel(), f"{prefix}bias": HeadParallel()}


def _two_layers(make: Callable[[], nn.Module]) -> nn.Module:
    """Two layers that share a bias; the first has two key heads."""
    bias = make()
    return nn.Sequential(
        OffsetBiasAttention(WIDTH, HEADS, bias, num_kv_heads=2, is_causal=True),
        OffsetBiasAttention(WIDTH, HEADS, bias, is_causal=True),
    )


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _work(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for name, make in BIASES.items():
        torch.manual_seed(3)
        model = _two_layers(make)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
        spread = copy.deepcopy(model)
        parallelize_module(spread, mesh, _plan("0.") | _plan("1."))
        x = torch.randn(2, LENGTH, WIDTH)
        for each in (model, spread):
            each(x).square().sum().backward()
        torch.testing.assert_close(spread(x), model(x))
        got = dict(spread.named_parameters())
        for key, parameter in model.named_parameters():
            assert got[key].grad is not None, (name, key)
            gradient = _whole(got[key].grad)
            torch.testing.assert_close(
                gradient, parameter.grad, msg=lambda text, label=f"{name}, {key}": f"{label}: {text}"
            )
    weight = parallelize_module(OffsetBias(HEADS, LENGTH), mesh, HeadParallel()).weight
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)
    assert weight.to_local().shape == (HEADS // world, 2 * LENGTH - 1)
    with pytest.raises(ValueError, match="`num_heads` must be a multiple of the 2 ranks of the mesh, got 3"):
        parallelize_module(OffsetBias(3, LENGTH), mesh, HeadParallel())
    attention = OffsetBiasAttention(WIDTH, HEADS, None, num_kv_heads=1)
    parallelize_module(attention, mesh, {"k_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match="`k_proj` must give whole heads of 4 numbers, got 2 numbers"):
        attention(x)


def test_heads_are_sharded_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """Every bias module, shared by two layers, on two ranks."""
    run_ranks(_work, 2, tmp_path)
