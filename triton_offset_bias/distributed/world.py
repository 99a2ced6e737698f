"""The ranks among which a sequence is spread: a process group, or a mesh of two dimensions."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

METHODS = ("gather", "ring", "all_to_all")
MESH_NAMES = ("ring", "heads")
Group = dist.ProcessGroup | dist.DeviceMesh | None


class Side(NamedTuple):
    """One dimension of the world: this rank's process group in it, its place there, and the group's size."""

    group: dist.ProcessGroup | None  # None: it has this rank alone
    rank: int
    size: int


class World(NamedTuple):
    """The ranks of a call. Rank `ring.rank * heads.size + heads.rank` holds the part of that number.

    Ranks of one heads group trade parts of the sequence for heads. Ranks of one ring group send each other keys.
    """

    ring: Side
    heads: Side

    @property
    def rank(self) -> int:
        """This rank's place among all."""
        return self.ring.rank * self.heads.size + self.heads.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.ring.size * self.heads.size


_ALONE = Side(None, 0, 1)


def world_of(group: Group, method: str = "gather") -> World:
    """The world of a public function's `group`; a one-dimensional group is the side that `method` names.

    Raises:
        TypeError: `group` is no process group and no mesh.
        ValueError: the mesh has other dimensions, this rank is not in the group, or there is no group at all.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("`group` must be ready: call torch.distributed.init_process_group first")
    if isinstance(group, dist.DeviceMesh) and group.ndim != 1:
        names = group.mesh_dim_names
        if group.ndim != 2 or names is None or sorted(names) != sorted(MESH_NAMES):
            raise ValueError(
                f"`group` must be a process group, a one-dimensional mesh, or a mesh with the dimensions {MESH_NAMES}, "
                f"got a mesh with {group.ndim} dimensions named {names}"
            )
        return World(_side(group.get_group("ring")), _side(group.get_group("heads")))
    side = _side(group.get_group() if isinstance(group, dist.DeviceMesh) else group)
    return World(_ALONE, side) if method == "all_to_all" else World(side, _ALONE)


def _side(group: object) -> Side:
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"`group` must be a torch.distributed process group or DeviceMesh, got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("`group` must have this rank in it")
    return Side(group, rank, dist.get_world_size(group))


def gathered(x: Tensor, sizes: list[int], world: World) -> list[Tensor]:
    """Every rank's tensor, in the order of the ranks. `x` has the size ``sizes[rank]`` along its last axis."""
    padded = x.new_zeros(*x.shape[:-1], max(sizes))
    padded[..., : x.shape[-1]] = x
    found = [padded]
    for side in (world.heads, world.ring):
        if side.group is not None:
            mine = torch.stack(found)
            received = [torch.empty_like(mine) for _ in range(side.size)]
            dist.all_gather(received, mine, group=side.group)
            found = [y for one in received for y in one]
    return [y[..., :size] for y, size in zip(found, sizes, strict=True)]


def gathered_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    found = [value]
    for side in (world.heads, world.ring):
        if side.group is not None:
            received: list[Any] = [None] * side.size
            dist.all_gather_object(received, found, group=side.group)
            found = [y for one in received for y in one]
    return found


def broadcast(x: Tensor, world: World) -> None:
    """Gives all ranks the tensor of rank 0."""
    for side in (world.ring, world.heads):
        if side.group is not None:
            dist.broadcast(x, group=side.group, group_src=0)
