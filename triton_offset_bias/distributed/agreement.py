"""All ranks ask for the same: a rank that does not makes all of them raise, before anything else is sent.

The first call of a kind compares a hash. Ranks whose arguments differ would otherwise wait for messages that nobody
sends. It is also the first communication in every group, which `batch_isend_irecv` must not be on NCCL.
"""

import hashlib
import weakref
from typing import Any

import torch

from triton_offset_bias.distributed.world import World, gathered, gathered_objects

_agreed: "weakref.WeakKeyDictionary[Any, set[tuple[Any, ...]]]" = weakref.WeakKeyDictionary()


def agree(arguments: dict[str, object], failure: Exception | None, world: World, device: torch.device) -> None:
    """Raises on all ranks unless all of them call with equal arguments, and none has failed.

    Args:
        arguments: what must be equal on all ranks, by name.
        failure: the error of this rank's own checks, which is raised here.
        world: the ranks.
        device: the device of the call's tensors, on which the group communicates.

    Raises:
        RuntimeError: another rank has failed, or has other arguments.
    """
    key = (world, tuple(arguments.items()))
    # A group may be destroyed and made anew with the same ranks: every group remembers its own agreements.
    known = [_agreed.setdefault(side.group, set()) for side in world if side.group is not None]
    if failure is None and all(key in agreements for agreements in known):
        return
    text = repr(key[1]) if failure is None else f"failed: {failure!r}"
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    found = [int(x) for x in gathered(mine, [1] * world.size, world)]
    if len(set(found)) == 1 and failure is None:
        for agreements in known:
            agreements.add(key)
        return
    everyone = gathered_objects((arguments, None if failure is None else repr(failure)), world)
    if failure is not None:
        raise failure
    raise RuntimeError(_difference(arguments, everyone, world.rank))


def _difference(arguments: dict[str, object], everyone: list[tuple[dict[str, object], str | None]], rank: int) -> str:
    """Says which rank failed, or which argument differs between which ranks."""
    for other, (theirs, failure) in enumerate(everyone):
        if failure is not None:
            return f"rank {other} failed, so this call cannot be served: {failure}"
        for name, value in arguments.items():
            if theirs.get(name) != value:
                return (
                    f"`{name}` must be equal on all ranks of the group, "
                    f"got {value} on rank {rank} and {theirs.get(name)} on rank {other}"
                )
    raise AssertionError("the ranks' hashes differ, their arguments do not")
