"""What every backend serves: features by backends, from the backends' own reasons.

A feature is some sample calls; a backend has it if it has no reason against them. What no call can show, such as
memory, every backend states in its `PROPERTIES`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.checks.call import Options, checked_attention, checked_varlen
from triton_offset_bias.problem import Problem

LENGTH = 5


def feature_table() -> list[list[str]]:
    """The table: a header, then a row for each property and feature, with a cell for each backend."""
    rows = [["", *(f"`{name}`" for name in BACKENDS)]]
    rows += [[key, *(backend.PROPERTIES[key] for backend in BACKENDS.values())] for key in _properties()]
    for name, samples in SAMPLES.items():
        problems = [sample() for sample in samples]
        answers = [[reason for x in problems for reason in backend.problem_reasons(x)] for backend in BACKENDS.values()]
        rows.append([name, *(f"no: {'; '.join(reasons)}" if reasons else "yes" for reasons in answers)])
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    """The rows, of which the first is the header, as a table of Markdown."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body])


def _properties() -> list[str]:
    return list(next(iter(BACKENDS.values())).PROPERTIES)


def _padded(
    *,
    dtype: torch.dtype = torch.float32,
    dim: int = 8,
    bias: tuple[int, ...] | None = (2, 2 * LENGTH - 1),
    heads_kv: int = 2,
    is_transposed: bool = False,
    start: int | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    options: dict | None = None,
) -> Problem:
    """A sample of `offset_bias_attention`, as its checks give it."""
    shapes = ((2, heads, LENGTH, dim) for heads in (2, heads_kv, heads_kv))
    query, key, value = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes)
    if is_transposed:
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    return checked_attention(
        query,
        key,
        value,
        None if bias is None else torch.zeros(bias, device="cpu"),
        query_start=start,
        key_padding_mask=mask,
        query_positions=positions,
        key_positions=positions,
        options=_options(**(options or {})),
    )


def _packed() -> Problem:
    """A sample of `offset_bias_attention_varlen`, as its checks give it."""
    x, bounds = torch.zeros(LENGTH, 2, 8, device="cpu"), torch.tensor([0, 2, LENGTH], device="cpu")
    table = torch.zeros(2, 2 * LENGTH - 1, device="cpu")
    return checked_varlen(x, x, x, table, bounds, bounds, LENGTH, LENGTH, options=_options())


def _options(
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    bias_origin: int | None = None,
    beyond: str = "clamp",
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Options:
    return Options(
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        bias_origin=bias_origin,
        beyond=beyond,
        window_size=window_size,
        deterministic=deterministic,
    )


SAMPLES: dict[str, tuple[Callable[[], Problem], ...]] = {
    "float16, bfloat16, float32": tuple(
        partial(_padded, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ),
    "float64": (partial(_padded, dtype=torch.float64),),
    "head dims 1 to 256": (partial(_padded, dim=1), partial(_padded, dim=80), partial(_padded, dim=256)),
    "head dims above 256": (partial(_padded, dim=257),),
    "tables `(N,)`, `(H, N)`, `(B, H, N)`, or none": tuple(
        partial(_padded, bias=shape) for shape in ((9,), (2, 9), (2, 2, 9), None)
    ),
    "`bias_origin`, `beyond`": (
        partial(_padded, options={"bias_origin": -3}),
        partial(_padded, bias=(2, 3), options={"beyond": "zero"}),
        partial(_padded, options={"beyond": "error"}),
    ),
    "`is_causal`, `window_size`, `query_start`, `key_padding_mask`": (
        partial(_padded, options={"is_causal": True}),
        partial(_padded, options={"window_size": (2, 1)}),
        partial(_padded, start=3),
        lambda: _padded(mask=torch.ones(2, LENGTH, dtype=torch.bool, device="cpu")),
    ),
    "`enable_gqa`, any `scale`, any strides": (
        partial(_padded, heads_kv=1),
        partial(_padded, options={"scale": 0.0}),
        partial(_padded, is_transposed=True),
    ),
    "`query_positions`, `key_positions`": (lambda: _padded(positions=torch.tensor([4, 0, 9, 2, 2], device="cpu")),),
    "`dropout_p`": (partial(_padded, options={"dropout_p": 0.1}),),
    "packed sequences": (_packed,),
    "`return_lse`, differentiable": (_padded,),
    "`deterministic`": (partial(_padded, options={"deterministic": True}),),
}
