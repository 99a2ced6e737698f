"""One call on all ranks: its checks, what has to be gathered before it, and the call itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from triton_offset_bias.distributed import checking
from triton_offset_bias.distributed.agreement import agree
from triton_offset_bias.distributed.attention import Attention
from triton_offset_bias.distributed.call import Call
from triton_offset_bias.distributed.plan import Layout, Plan, plan_of
from triton_offset_bias.distributed.sharding import in_order
from triton_offset_bias.distributed.spans import Span, check_layout, size_of
from triton_offset_bias.distributed.world import Group, World, broadcast, gathered, world_of
from triton_offset_bias.problem import Problem


def plan_for(
    problem: Problem,
    world: World,
    layout: str,
    lengths: tuple[int, int],
    start: int,
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> Plan:
    """The plan of a call that this rank has checked, and whose tensors fit it."""
    check_layout(layout)
    plan = plan_of(
        Layout(
            lengths=lengths,
            ring=world.ring.size,
            heads=world.heads.size,
            name=layout,
            start=start,
            min_offset=problem.min_offset,
            max_offset=problem.max_offset,
            bounds=bounds,
            has_positions=problem.query_positions is not None,
        )
    )
    checking.check_parts(problem.query, problem.key, plan, world)
    return plan


@torch.compiler.disable
def attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    check: Callable[[World], tuple[Problem, Plan]],
    ways: tuple[Group, str],
    backend: str,
    beyond: str,
    returns_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Checks a call on all ranks, and makes it. Compiled code breaks its graph here: messages are in no graph."""
    group, method = ways
    checking.check_method(method)
    world = world_of(group, method)
    failure: Exception | None = None
    arguments: dict[str, object] = {}
    try:
        problem, plan = check(world)
        chosen = checking.checked_backend(problem, plan, world, backend)
        arguments = _arguments(problem, plan, method, chosen, beyond)
    except (TypeError, ValueError, NotImplementedError) as error:
        failure = error
    device = tensors[0].device if isinstance(tensors[0], Tensor) else torch.device("cpu")
    agree(arguments, failure, world, device)
    sizes = [[size_of(spans) for spans in side] for side in plan.parts]
    mask, positions = problem.key_padding_mask, None
    if mask is not None:
        mask = in_order(gathered(mask.to(torch.uint8), sizes[1], world), plan.parts[1]).bool()
    if problem.query_positions is not None and problem.key_positions is not None:
        sides = zip((problem.query_positions, problem.key_positions), sizes, plan.parts, strict=True)
        query_positions, key_positions = (in_order(gathered(x.long(), n, world), held) for x, n, held in sides)
        positions = query_positions, key_positions
    if beyond == "error" and problem.bias is not None:
        checking.check_reach(problem, plan, mask, positions, problem.bias.shape[-1])
    if problem.seed is not None:
        broadcast(problem.seed, world)
    here = None if positions is None else _cut(positions[0], plan.queries[world.ring.rank])
    none = tensors[0].new_empty(0)  # the call would keep its tensors as long as the graph lives
    call = Call(
        problem=problem._replace(
            query=none,
            key=none,
            value=none,
            bias=None,
            bias_gate=None if problem.bias_gate is None else none,
            query_positions=here,
        ),
        plan=plan,
        world=world,
        method="ring" if method == "ring" else "gather",
        backend=chosen,
        key_padding_mask=mask,
        key_positions=None if positions is None else positions[1],
        heads=(problem.query.shape[1], problem.key.shape[1]),
        returns_lse=returns_lse,
    )
    results: Tensor | tuple[Tensor, Tensor] = Attention.apply(*tensors, problem.bias, problem.bias_gate, call)
    return results


def _cut(x: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([x[..., span.start : span.stop] for span in spans] or [x[..., :0]], -1)


def _arguments(problem: Problem, plan: Plan, method: str, backend: str, beyond: str) -> dict[str, object]:
    """The arguments that must be equal on all ranks, by their public names."""
    layout = plan.layout
    names = ("scale", "dropout_p", "bias_origin", "deterministic")
    return {
        "method": method,
        "backend": backend,
        "layout": layout.name,
        "lengths": layout.lengths,
        **{name: checking.described(getattr(problem, name)) for name in ("query", "key", "value", "bias_gate")},
        "bias": None if problem.bias is None else (problem.bias.shape[-1], checking.described(problem.bias)),
        "query_start": layout.start,
        "window_size and is_causal": (layout.min_offset, layout.max_offset),
        "cu_seqlens_q": None if layout.bounds is None else layout.bounds[0],
        "cu_seqlens_k": None if layout.bounds is None else layout.bounds[1],
        "beyond": beyond,
        **{name: getattr(problem, name) for name in names},
        **{name: getattr(problem, name) is not None for name in ("key_padding_mask", "query_positions")},
    }
