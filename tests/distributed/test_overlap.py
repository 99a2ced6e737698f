"""The ring's messages travel while a rank attends, seen from the order of events on every rank."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread import run_ranks

from triton_offset_bias import distributed, parts

pytestmark = [pytest.mark.cpu_only, pytest.mark.needs_engine]


def _trace(rank: int, world: int) -> None:
    """Records when messages are posted, when they are waited for, and when parts are computed."""
    events: list[str] = []
    post, attend, differentiate = dist.batch_isend_irecv, parts.attend, parts.differentiate

    class Watched:
        def __init__(self, request: dist.Work, name: str) -> None:
            self.request, self.name = request, name

        def wait(self) -> None:
            events.append(f"wait {self.name}")
            self.request.wait()

    def posted(ops: list) -> list:
        name = "gradients" if ops[0].tensor.dtype == torch.float32 else "keys"
        events.append(f"post {name}")
        return [Watched(request, name) for request in post(ops)]

    def recorded(name: str, function):
        def call(*arguments, **options):
            events.append(name)
            return function(*arguments, **options)

        return call

    dist.batch_isend_irecv = posted
    parts.attend, parts.differentiate = recorded("compute", attend), recorded("compute", differentiate)
    inputs = [torch.randn(1, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = distributed.offset_bias_attention(*inputs, None, method="ring")
    forward, events[:] = _merged(events), []
    out.float().sum().backward()
    backward = _merged(events)
    step = ["post keys", "compute", "wait keys"]
    assert forward == [*step * (world - 1), "compute"], forward
    # The gradients of a step travel home while the next step computes. The last ones have nothing to hide behind.
    between = ["post keys", "compute", "post gradients", "wait keys"] * (world - 2)
    assert backward == [*step, *between, "compute", "post gradients", "wait gradients"], backward


def _merged(events: list[str]) -> list[str]:
    """Without repetitions: a step has several messages."""
    return [event for i, event in enumerate(events) if i == 0 or event != events[i - 1]]


@pytest.mark.parametrize("world", [2, 3])
def test_the_next_keys_and_the_last_gradients_travel_while_a_rank_computes(world: int, tmp_path: Path) -> None:
    """Messages are posted before a part is computed, and waited for after it."""
    run_ranks(_trace, world, tmp_path)
