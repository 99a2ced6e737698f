"""Bias modules under tensor parallelism: each rank has the table of its own heads."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from triton_offset_bias.modules import OffsetBias


class HeadParallel(ParallelStyle):
    """The style of a bias module beside projections whose heads `ColwiseParallel` shards, for `parallelize_module`.

    The module then gives the table of this rank's heads, (H / ranks, offsets). `OffsetBias`, whose table is the
    parameter, keeps only these heads: its weight becomes a DTensor, sharded along the heads. Any other module keeps all
    of its few parameters, equal on all ranks. Its gradients are complete on every rank, so nothing is added up. All
    ranks start with rank 0's parameters.

        plan = {
            "q_proj": ColwiseParallel(), "k_proj": ColwiseParallel(), "v_proj": ColwiseParallel(),
            "out_proj": RowwiseParallel(), "bias": HeadParallel(),
        }
        parallelize_module(attention, mesh, plan)

    A module that several layers share is named once in the plan, or many times to the same effect.

    Raises:
        ValueError: the ranks do not divide the module's heads.

    Source: Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053), section 3.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if getattr(module, "_has_own_heads", False):
            return module
        heads, ranks = module.num_heads, device_mesh.size()
        if not isinstance(heads, int) or heads % ranks:
            raise ValueError(f"`num_heads` must be a multiple of the {ranks} ranks of the mesh, got {heads}")
        module._has_own_heads = True  # type: ignore[assignment]
        if isinstance(module, OffsetBias):
            weight = distribute_tensor(module.weight.detach(), device_mesh, [Shard(0)])
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            return module
        group = device_mesh.get_group()
        with torch.no_grad():
            for x in (*module.parameters(), *module.buffers()):
                dist.broadcast(x, group=group, group_src=0)
        module.register_forward_hook(lambda _module, _inputs, table: _OwnHeads.apply(table, group))
        return module


class _OwnHeads(torch.autograd.Function):
    """The rows of a table that are this rank's heads. Backward brings the gradients of all heads together."""

    @staticmethod
    def forward(ctx, table: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return table.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtable: Tensor) -> tuple[Tensor, None]:
        found = [torch.empty_like(dtable) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(found, dtable.contiguous(), group=ctx.group)
        return torch.cat(found), None
