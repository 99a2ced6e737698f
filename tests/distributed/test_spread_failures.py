"""Ranks that fail or disagree: all of them raise, with a message, within the group's timeout."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from triton_offset_bias import distributed, offset_bias_attention
from triton_offset_bias.distributed.world import METHODS

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]
LENGTH, TIMEOUT = 24, 6.0


def _inputs(rank: int, world: int, length: int | None = None) -> tuple[Tensor, ...]:
    """This rank's part of query, key and value, or parts of another length, and a table."""
    torch.manual_seed(0)
    whole = [torch.randn(1, 4, LENGTH, 8) for _ in range(3)]
    parts = [torch.randn(1, 4, length, 8) for _ in whole] if length else [distributed.shard(x, 2) for x in whole]
    return *(x.requires_grad_() for x in parts), torch.randn(4, 2 * LENGTH - 1, requires_grad=True)


def _error_of(call: Callable[[], object]) -> str:
    """The type and the text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _texts(text: str) -> list[str]:
    """What every rank says."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, text)
    return found


def _disagreements(rank: int, world: int) -> None:
    """One rank's arguments differ, or are wrong; each rank says so at once."""
    attend, is_last = distributed.offset_bias_attention, rank == world - 1
    mine, longer = _inputs(rank, world), _inputs(rank, world, LENGTH // world + is_last)
    lengths = (LENGTH, LENGTH)
    table = mine[3][:, :-1].detach() if is_last else mine[3]
    half = tuple(x.half() if is_last else x for x in mine[:3])
    frozen = mine[0].detach() if is_last else mine[0]
    calls = {
        "method": (lambda: attend(*mine, method="ring" if is_last else "gather"), "`method` must be equal on all"),
        "layout": (lambda: attend(*mine, layout="zigzag" if is_last else "contiguous"), "`layout` must be equal"),
        "scale": (lambda: attend(*mine, scale=0.5 + is_last), "`scale` must be equal on all ranks"),
        "lengths": (lambda: attend(*longer), "`lengths` must be equal on all ranks"),
        "table": (lambda: attend(*mine[:3], table), "`bias` must be equal on all ranks"),
        "dtype": (lambda: attend(*half, mine[3]), "`query` must be equal on all ranks"),
        "gradient": (lambda: attend(frozen, *mine[1:]), "`query` must be equal on all ranks"),
        "one has another part": (lambda: attend(*longer, lengths=lengths),
                                 r"`query` must have length \d+ on rank \d"),
        "one raises": (lambda: attend(*mine, beyond="clump" if is_last else "clamp"), "`beyond` must be one of"),
        "offsets": (lambda: attend(*mine[:3], mine[3][:, :9], beyond="error"), "`bias` must cover every attended"),
    }  # fmt: skip
    for name, (call, message) in calls.items():
        begin = time.monotonic()
        texts = _texts(_error_of(call))
        assert time.monotonic() - begin < TIMEOUT, f"{name}: the ranks waited for one another"
        for text in texts:
            assert re.search(message, text), f"{name}: {texts}"
    out = attend(*mine)  # the group still works
    out.sum().backward()


def test_ranks_that_disagree_raise_at_once_and_say_why(tmp_path: Path) -> None:
    """Nothing is sent but the comparison. A rank whose own checks fail tells the others."""
    for world in (2, 3):
        run_ranks(_disagreements, world, tmp_path, timeout=10 * TIMEOUT)


def _absence(rank: int, world: int, method: str, folder: str) -> None:
    """The last rank makes one call, and is then away while the others wait for it."""
    mine = _inputs(rank, world)
    distributed.offset_bias_attention(*mine, method=method)
    done = [Path(folder) / f"{method} {other}" for other in range(world)]
    if rank < world - 1:
        begin = time.monotonic()
        text = _error_of(lambda: distributed.offset_bias_attention(*mine, method=method).sum().backward())
        assert text.startswith(("RuntimeError", "DistBackendError")), text
        assert len(text) > 30, text
        assert time.monotonic() - begin < 3 * TIMEOUT
    done[rank].touch()
    while not all(path.exists() for path in done):
        time.sleep(0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_stays_away_makes_the_others_fail_within_the_timeout(method: str, tmp_path: Path) -> None:
    """The arguments were agreed on before, so only the messages themselves can fail."""
    run_ranks(_absence, 2, tmp_path, method, str(tmp_path), timeout=TIMEOUT)


def _unused(rank: int, world: int) -> None:
    """The last rank's loss multiplies its output by 0: gradients are those of the other ranks' losses alone."""
    whole = [torch.randn(1, 4, LENGTH, 8, dtype=torch.float64) for _ in range(3)]
    for x in whole:
        dist.broadcast(x, 0)
    used = LENGTH * (world - 1) // world
    leaves = [x.clone().requires_grad_() for x in whole]
    offset_bias_attention(*leaves, None)[:, :, :used].sum().backward()
    for method in METHODS:
        mine = [distributed.shard(x, 2).requires_grad_() for x in whole]
        out = distributed.offset_bias_attention(*mine, None, method=method)
        (out.sum() * (rank < world - 1)).backward()
        for x, leaf in zip(mine, leaves, strict=True):
            torch.testing.assert_close(x.grad, distributed.shard(leaf.grad, 2), rtol=0, atol=1e-12)


def test_a_rank_whose_loss_does_not_use_its_output(tmp_path: Path) -> None:
    """It goes backward with zeros, and the others get what they need from it."""
    run_ranks(_unused, 2, tmp_path)


def _refusals(rank: int, world: int) -> None:
    q, k, v, table = _inputs(rank, world)
    mesh = init_device_mesh("cpu", (world,))
    cases = [
        (lambda: distributed.offset_bias_attention(q, k, v, distribute_tensor(table.detach(), mesh, [Replicate()])),
         "TypeError: `bias` must be a plain tensor, got a DTensor .*grad_placements"),
        (lambda: distributed.offset_bias_attention(distribute_tensor(q.detach(), mesh), k, v, table),
         "TypeError: `query` must be a plain tensor, got a DTensor"),
        (lambda: distributed.offset_bias_attention(q, k, v, table, method="rings"),
         r"ValueError: `method` must be one of 'gather', 'ring', 'all_to_all', got 'rings'"),
        (lambda: distributed.offset_bias_attention(q, k, v, table, layout="stripes"), "ValueError: `layout` must be"),
        (lambda: distributed.offset_bias_attention(q, k, v, table, group="world"), "TypeError: `group` must be"),
        (lambda: distributed.offset_bias_attention(q, k, v, table, lengths=9), "TypeError: `lengths` must be a pair"),
        (lambda: distributed.offset_bias_attention(q[:, :3], k[:, :3], v[:, :3], None, method="all_to_all"),
         "ValueError: `query` and `key` must have numbers of heads that divide among the 2 ranks"),
        (lambda: distributed.offset_bias_attention(q, k, v, table, group=init_device_mesh("cpu", (1, 2))),
         r"ValueError: `group` must be .* a mesh with the dimensions \('ring', 'heads'\)"),
        (lambda: distributed.unshard(q, 2, LENGTH + 5), "ValueError: `x` must have size"),
    ]  # fmt: skip
    for call, message in cases:
        text = _error_of(call)
        assert re.match(message, text), text
    out = distributed.offset_bias_attention(q, k, v, table)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(gradient.sum(), k)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    """DTensors would give wrong gradients without a word. A second derivative would, too."""
    run_ranks(_refusals, 2, tmp_path)


def test_without_a_group_there_is_an_error():
    """`init_process_group` was not called."""
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="`group` must be ready"):
        distributed.offset_bias_attention(q, q, q, None)
