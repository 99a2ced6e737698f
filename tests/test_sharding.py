"""Every module under `fully_shard` and `DistributedDataParallel`, with gloo, in one process and in two.

Each of two processes takes a part of the batch. The gradients must equal those of the whole batch in one process.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import (
    ALiBiBias,
    FireBias,
    KerpleBias,
    OffsetBias,
    OffsetBias2d,
    OffsetBias3d,
    OffsetBiasAttention,
    SandwichBias,
    T5Bias,
)

pytestmark = pytest.mark.cpu_only
HEADS, WIDTH, WINDOW = 4, 16, (3, 4)


class WindowAttention(nn.Module):
    """Attention within a window, on inputs that are queries, keys and values in one."""

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) to (B, HEADS, L, WIDTH / HEADS)."""
        q, k, v = self.proj(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        positions = {"query_positions": self.bias.query_positions(), "key_positions": self.bias.key_positions()}
        return offset_bias_attention(q, k, v, self.bias(), **positions)


def _attention(bias: nn.Module | None) -> nn.Module:
    return OffsetBiasAttention(WIDTH, HEADS, bias)


def _shared() -> nn.Module:
    bias = OffsetBias(HEADS, 12)
    return nn.Sequential(_attention(bias), _attention(bias))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "OffsetBias": lambda: _attention(OffsetBias(HEADS, 12)),
    "T5": lambda: _attention(T5Bias(HEADS, 8, 20)),
    "ALiBi": lambda: _attention(ALiBiBias(HEADS)),
    "ALiBi, learnable": lambda: _attention(ALiBiBias(HEADS, learnable=True)),
    "KERPLE, log": lambda: _attention(KerpleBias(HEADS, "log")),
    "KERPLE, power": lambda: _attention(KerpleBias(HEADS, "power")),
    "FIRE": lambda: _attention(FireBias(HEADS, 12, hidden_size=5)),
    "Sandwich": lambda: _attention(SandwichBias(HEADS, 8)),
    "no bias": lambda: _attention(None),
    "OffsetBias2d": lambda: WindowAttention(OffsetBias2d(HEADS, WINDOW)),
    "OffsetBias2d, class token": lambda: WindowAttention(OffsetBias2d(HEADS, (1, 11), class_token=True)),
    "OffsetBias3d": lambda: WindowAttention(OffsetBias3d(HEADS, (1, *WINDOW))),
    "one bias for two layers": _shared,
}


def _whole(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def _bias_apart(model: nn.Module) -> nn.Module:
    """The bias, which two layers may share, is gathered by itself."""
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Module) and not hasattr(module.bias, "unshard"):
            fully_shard(module.bias)
    return fully_shard(model)


WRAPPERS = {"whole": _whole, "the bias apart": _bias_apart, "ddp": DistributedDataParallel}


def _filled(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model


def _gathered(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _check(name: str, wrapper: str, rank: int, world: int) -> None:
    """Output, every gradient, and every parameter after a step, against the model in one process."""
    model = _filled(MODELS[name])
    wrapped = WRAPPERS[wrapper](copy.deepcopy(model))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, wrapped)]
    x = torch.randn(2 * world, WINDOW[0] * WINDOW[1], WIDTH)
    expected, got = model(x), wrapped(x.chunk(world)[rank])
    torch.testing.assert_close(got, expected.chunk(world)[rank])
    for out in (expected, got):
        out.square().mean().backward()
    parameters = dict((wrapped.module if wrapper == "ddp" else wrapped).named_parameters())
    for key, parameter in model.named_parameters():
        label = f"{name}, {wrapper}, {key}"
        torch.testing.assert_close(
            _gathered(parameters[key].grad), parameter.grad, msg=lambda text, label=label: f"{label}: {text}"
        )
    for optimizer in optimizers:
        optimizer.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(_gathered(parameters[key]), parameter)


def _work(rank: int, world: int, folder: str) -> None:
    """The work of one process of the world."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=world)
    init_device_mesh("cpu", (world,))
    for name in MODELS:
        for wrapper in WRAPPERS:
            _check(name, wrapper, rank, world)
    distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_every_module_trains_sharded_and_in_copies_as_in_one_process(world: int, tmp_path: Path) -> None:
    """`fully_shard` takes the whole model, or its bias by itself. `DistributedDataParallel` takes the whole model."""
    multiprocessing.spawn(_work, (world, str(tmp_path)), nprocs=world)
