"""Tools that transform a call: `torch.export`, the transforms of `torch.func`, forward mode, data parallelism."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from triton_offset_bias import offset_bias_attention
from triton_offset_bias.modules import OffsetBias, OffsetBiasAttention

FUSED = pytest.mark.parametrize("name", ["auto", "cpp"])
pytestmark = pytest.mark.cpu_only


def _model() -> OffsetBiasAttention:
    bias = OffsetBias(2, max_length=40)
    nn.init.normal_(bias.weight)
    return OffsetBiasAttention(16, 2, bias)


def test_an_exported_model_serves_every_length_and_batch_with_equal_results():
    """The table's range follows the length, which stays symbolic."""
    model = _model()
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}}
    exported = torch.export.export(model, (torch.randn(2, 33, 16),), dynamic_shapes=sizes).module()
    for batch, length in ((2, 33), (3, 90), (1, 7)):
        x = torch.randn(batch, length, 16)
        assert torch.equal(exported(x), model(x))


def _squares(name: str, q: Tensor, bias: Tensor) -> Tensor:
    return offset_bias_attention(q, q, q, bias, backend=name).square().sum()


@pytest.mark.needs_engine
@FUSED
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacfwd], ids=lambda f: f.__name__)
def test_a_transform_of_torch_func_is_refused_with_the_way_out(name, transform):
    """There is no silent loop over the batch, and no tangent of zeros."""
    q, tables = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 17)
    table = tables if transform is torch.func.vmap else tables[0]
    with pytest.raises(NotImplementedError, match=r"torch\.func .*into the batch.*backend='reference'"):
        transform(lambda bias: _squares(name, q, bias))(table)


def test_the_reference_serves_the_transforms():
    """The gradients of tables under vmap equal those of autograd, table by table."""
    q, tables = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 17)
    got = torch.func.vmap(torch.func.grad(lambda bias: _squares("reference", q, bias)))(tables)
    for table, gradient in zip(tables.requires_grad_().unbind(), got, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(_squares("reference", q, table), table)[0])


@pytest.mark.needs_engine
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tangent_is_refused_and_a_call_without_one_is_served(requires_grad):
    """It is refused even when nothing asks for a gradient, where torch itself would drop it."""
    q = torch.randn(1, 2, 9, 8, requires_grad=requires_grad)
    bias = torch.randn(2, 17)
    expected = offset_bias_attention(q, q, q, bias)
    with forward_ad.dual_level():
        assert torch.equal(offset_bias_attention(q, q, q, bias), expected)
        dual = forward_ad.make_dual(bias, torch.ones_like(bias))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative on the fused backends"):
            offset_bias_attention(q, q, q, dual)


@pytest.fixture
def one_process(tmp_path):
    """A group of processes that has one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # as does every nn.Linear
@pytest.mark.parametrize("wrap", [DistributedDataParallel, _sharded], ids=["DDP", "FSDP"])
def test_under_data_parallelism_a_table_is_a_parameter_like_any_other(wrap):
    """The gradients that are gathered, or scattered, are those of the module alone."""
    alone, x = _model(), torch.randn(2, 33, 16)
    parallel = wrap(copy.deepcopy(alone))
    for model in (alone, parallel):
        model(x).square().mean().backward()
    for wanted, parameter in zip(alone.parameters(), parallel.parameters(), strict=True):
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(gradient, wanted.grad, rtol=0.0, atol=0.0)
