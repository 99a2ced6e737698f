"""Models whose `OffsetBiasAttention` modules attend over ranks."""

import functools

from torch import nn

from triton_offset_bias.distributed.checking import check_method
from triton_offset_bias.distributed.functional import offset_bias_attention
from triton_offset_bias.distributed.spans import check_layout
from triton_offset_bias.distributed.world import Group, world_of
from triton_offset_bias.modules import OffsetBiasAttention


def parallelize_context(
    model: nn.Module, group: Group = None, *, layout: str = "contiguous", method: str = "gather"
) -> int:
    """Makes every `OffsetBiasAttention` in `model` attend over the ranks of `group`, each of which has a part of `x`.

    Every rank then calls the model with ``shard(x, 1, group, layout)``, and gets its part of the result. Parts must be
    equally long. Parameters stay as they are, and their gradients are shares, which DDP or FSDP over the group average.
    Call it before DDP or FSDP wraps the model, and after copies are made, because a process group cannot be copied.

    Args:
        model: a module that is or holds some `OffsetBiasAttention`. All its other modules must treat positions alike,
            as norms and feed-forward networks do.
        group, layout, method: see `offset_bias_attention` here.

    Returns:
        The number of modules that were changed.

    Raises:
        TypeError: `group` is no process group and no mesh.
        ValueError: `model` holds no `OffsetBiasAttention`, or another argument is wrong.
    """
    check_layout(layout)
    check_method(method)
    ranks = world_of(group, method).size
    found = [module for module in model.modules() if isinstance(module, OffsetBiasAttention)]
    if not found:
        raise ValueError(f"`model` must hold an OffsetBiasAttention, got {type(model).__name__}")
    attend = functools.partial(offset_bias_attention, group=group, layout=layout, method=method)
    for module in found:
        module._attend, module._ranks = attend, ranks
    return len(found)
