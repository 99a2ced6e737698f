"""The recipes of docs/training.md, on two ranks of data parallelism, against the same training in one process."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from spread import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from triton_offset_bias.modules import KerpleBias, OffsetBias, OffsetBiasAttention

pytestmark = pytest.mark.cpu_only
PAGE = Path(__file__).parents[2] / "docs" / "training.md"
WIDTH, HEADS, LENGTH, LAYERS = 16, 4, 24, 2


class Block(nn.Module):
    """A layer of attention."""

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), OffsetBiasAttention(WIDTH, HEADS, bias, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) to the same."""
        return x + self.attention(self.norm(x))


class Model(nn.Module):
    """Layers with a bias each, or with one bias for all."""

    def __init__(self, biases: list[nn.Module], is_checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, biases))
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) to the same."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x


BIASES: dict[str, Callable[[], list[nn.Module]]] = {
    "a bias for each layer": lambda: [OffsetBias(HEADS, LENGTH, bidirectional=False) for _ in range(LAYERS)],
    "one bias": lambda: [OffsetBias(HEADS, LENGTH, bidirectional=False)] * LAYERS,
    "one KERPLE": lambda: [KerpleBias(HEADS)] * LAYERS,
}


def _biases_of(model: Model) -> list[nn.Module]:
    return list(dict.fromkeys(block.attention.bias for block in model.blocks))


def _in_copies(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: Model, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    for bias in _biases_of(model):
        fully_shard(bias)
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


WRAPPERS = {"DDP": _in_copies, "FSDP2": _sharded}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, by the names of the model without a wrapper."""
    found = {key.replace("module.", ""): x.grad for key, x in model.named_parameters()}
    return {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in found.items()}


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], share: float | None, name: str) -> None:
    """Within torch's tolerance of the dtype, or within a share of the largest number.

    Softmax does not see the bias of keys, whose gradient is 0 but for rounding, so numbers below 0.01 of all others'
    largest do not count.
    """
    assert got.keys() == expected.keys()
    smallest = 0.01 * max(x.abs().max().item() for x in expected.values())
    for key, x in expected.items():
        limits = {} if share is None else {"rtol": 0.0, "atol": share * max(x.abs().max().item(), smallest)}
        torch.testing.assert_close(got[key], x, **limits, msg=lambda text, key=key: f"{name}, {key}: {text}")


def _check_same_training(
    name: str, model: Model, wrapped: nn.Module, share: float | None = None, is_autocast: bool = False
) -> None:
    """Loss and every gradient of two steps, with this rank's part of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, wrapped)]
    for _ in range(2):
        x, y = torch.randn(2 * world, LENGTH, WIDTH), torch.randn(2 * world, LENGTH, WIDTH)
        losses = []
        for each, inputs, targets in ((model, x, y), (wrapped, x.chunk(world)[rank], y.chunk(world)[rank])):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                out = each(inputs)
            losses.append((out.float() - targets).square().mean())
            losses[-1].backward()
        mean = losses[1].detach().clone()
        dist.all_reduce(mean)
        _assert_close({"loss": mean / world}, {"loss": losses[0].detach()}, share, name)
        _assert_close(_gradients(wrapped), _gradients(model), share, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _filled(model: Model) -> Model:
    for bias in _biases_of(model):
        for parameter in bias.parameters():
            nn.init.uniform_(parameter)
    return model


def _models(bias: str) -> tuple[Model, Model]:
    model = _filled(Model(BIASES[bias]()))
    return model, copy.deepcopy(model)


def _recipes(_rank: int, _world: int, bias: str) -> None:
    torch.manual_seed(0)
    for wrapper, is_checkpointed in itertools.product(WRAPPERS, (False, True)):
        model, twin = _models(bias)
        twin.is_checkpointed = is_checkpointed
        name = f"{wrapper}, {bias}{', checkpointed' if is_checkpointed else ''}"
        _check_same_training(name, model, WRAPPERS[wrapper](twin))


@pytest.mark.parametrize("bias", BIASES)
def test_data_parallel_training_is_training_in_one_process(bias: str, tmp_path: Path) -> None:
    """DDP and FSDP2 of every layer, with and without activation checkpointing."""
    run_ranks(_recipes, 2, tmp_path, bias)


def _compiled(_rank: int, _world: int) -> None:
    torch.manual_seed(0)
    for wrapper, bias in itertools.product(WRAPPERS, BIASES):
        model, twin = _models(bias)
        for block in twin.blocks:
            block.compile(backend="aot_eager")
        _check_same_training(f"{wrapper}, {bias}, compiled", model, WRAPPERS[wrapper](twin))


def test_compiled_layers_train_alike(tmp_path: Path) -> None:
    """Each layer is compiled before it is wrapped."""
    run_ranks(_compiled, 2, tmp_path)


def _lower_precision(_rank: int, _world: int) -> None:
    torch.manual_seed(0)
    for wrapper, bias in itertools.product(WRAPPERS, BIASES):
        model, twin = _models(bias)
        _check_same_training(f"{wrapper}, {bias}, autocast", model, WRAPPERS[wrapper](twin), 0.03, is_autocast=True)
    for bias in BIASES:
        model, twin = _models(bias)
        wrapped = _sharded(twin, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        tables = []
        for module in _biases_of(twin):
            module.register_forward_hook(lambda _module, _inputs, table, tables=tables: tables.append(table))
        _check_same_training(f"{bias}, 16-bit parameters", model, wrapped, 0.03)
        assert len(tables) == 2 * LAYERS
        assert not torch.equal(tables[0], tables[0].bfloat16().float())


def test_layers_in_bfloat16_keep_the_bias_in_float32(tmp_path: Path) -> None:
    """Under autocast, and with FSDP2's mixed precision of all layers but of the bias."""
    run_ranks(_lower_precision, 2, tmp_path)


def _page(_rank: int, _world: int) -> None:
    (program,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
        if "init_process" in block
    )
    with mock.patch.object(dist, "destroy_process_group"):
        exec(compile(program, str(PAGE), "exec"), {"__name__": "__page__"})


def test_the_pages_program_runs_on_two_ranks(tmp_path: Path) -> None:
    """It compares gradients by itself."""
    run_ranks(_page, 2, tmp_path)
