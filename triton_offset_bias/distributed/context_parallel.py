"""Models whose attentions attend over ranks."""

import functools

from torch import nn

from triton_offset_bias.distributed.checking import check_method
from triton_offset_bias.distributed.functional import offset_bias_attention
from triton_offset_bias.distributed.spans import check_layout
from triton_offset_bias.distributed.world import Group, world_of
from triton_offset_bias.spreadable import SpreadableAttention


def parallelize_context(
    model: nn.Module, group: Group = None, *, layout: str = "contiguous", method: str = "gather"
) -> int:
    """Makes the attentions in `model` attend over the ranks of `group`, each of which has a part of every sequence.

    These are every `OffsetBiasAttention`, and the attentions of models of transformers that `enable_offset_bias` was
    called with before: MPNet, MPT, T5, mT5, UMT5, Switch Transformers, Pop2Piano.

    Every rank then calls the model with ``shard(x, 1, group, layout)`` of everything that has an axis of positions:
    tokens, masks, `position_ids`, targets. It gets its part of the result. Parts must be equally long. Parameters stay
    as they are, and their gradients are shares, which DDP or FSDP over the group average. Call it before DDP or FSDP
    wraps the model, and after copies are made, because a process group cannot be copied.

    Args:
        model: a module that is or holds some of these attentions. All its other modules must treat positions alike,
            as norms and feed-forward networks do.
        group: see `offset_bias_attention` here.
        layout: likewise.
        method: likewise.

    Returns:
        The number of modules that were changed.

    Raises:
        TypeError: `group` is no process group and no mesh.
        ValueError: `model` holds no such attention, or another argument is wrong.
        NotImplementedError: `model` holds an attention that cannot be spread: one with a `GatedBias`, an enabled one of
            windows of images, or one that counts a sequence's attended tokens from its first. Nothing is changed then.
    """
    check_layout(layout)
    check_method(method)
    ranks = world_of(group, method).size
    found = [module for module in model.modules() if isinstance(module, SpreadableAttention)]
    if not found:
        raise ValueError(
            f"`model` must hold an OffsetBiasAttention, or be enabled by enable_offset_bias, got {type(model).__name__}"
        )
    if refused := sorted({type(module).__name__ for module in found if not module.is_spreadable}):
        raise NotImplementedError(f"`model` must hold attentions that can be spread, got {', '.join(refused)}")
    attend = functools.partial(offset_bias_attention, group=group, layout=layout, method=method)
    for module in found:
        module._attend, module._ranks = attend, ranks
    return len(found)
