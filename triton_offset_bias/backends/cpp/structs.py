"""The structs and numbers of `csrc_ref/engine.h` in Python, and their comparison with a compiled engine's.

An engine that was compiled from another `engine.h` would read and write the wrong memory.
"""

import ctypes
import itertools
import struct

import torch

from triton_offset_bias import table
from triton_offset_bias.backends.cpp.positions import LARGEST_SPREAD
from triton_offset_bias.backends.limits import MAX_HEAD_DIM, MAX_LENGTH, MAX_RANK

# Declarations as in C: a type, then its fields. A type is a letter of Python's `struct`, or the name of a struct above.
STRUCTS = {
    "tob_tensor": "P data, q stride_b stride_h stride_l stride_d",
    "tob_sequence": "q first_query first_key len_q len_k query_start",
    "tob_row_stats": "P row_max row_sum",
    "tob_problem": (
        "q dtype num_threads batch heads_q heads_kv len_q len_k dim dim_v min_offset max_offset, d scale,"
        "tob_tensor query key value, P sequences, q row_stride_b row_stride_h,"
        "P bias, q bias_batch bias_heads bias_columns bias_first, tob_tensor gate, q rank,"
        "P key_mask query_positions key_positions, q position_stride_q position_stride_k is_causal_by_index,"
        "q has_dropout, Q seed, I largest_dropped, d kept_scale,"
        "q dropout_query dropout_key dropout_head dropout_heads, q is_part"
    ),
}
FUNCTIONS = {"tob_forward": 4, "tob_backward": 10}  # numbers of arguments, each an address or the bytes of a struct
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ERROR_MEMORY = 1
NUMBERS = {
    "TOB_FLOAT32": DTYPES[torch.float32],
    "TOB_FLOAT64": DTYPES[torch.float64],
    "TOB_BFLOAT16": DTYPES[torch.bfloat16],
    "TOB_FLOAT16": DTYPES[torch.float16],
    "TOB_ERROR_MEMORY": ERROR_MEMORY,
    "TOB_MAX_DIM": MAX_HEAD_DIM,
    "TOB_MAX_RANK": MAX_RANK,
    "TOB_MAX_LENGTH": MAX_LENGTH,
    "TOB_MAX_SPREAD": LARGEST_SPREAD,
    "TOB_UNLIMITED": table.UNLIMITED,
}


def _fields(name: str) -> list[tuple[str, str]]:
    """The fields of a struct in their order, and the type of each."""
    declarations = (declaration.split() for declaration in STRUCTS[name].split(","))
    return [(field, kind) for kind, *fields in declarations for field in fields]


def _format(kind: str) -> str:
    """The format that Python's `struct` has for a type."""
    return "".join(_format(field_kind) for _, field_kind in _fields(kind)) if kind in STRUCTS else kind


TENSOR, ROW_STATS, PROBLEM = (struct.Struct(_format(f"tob_{name}")) for name in ("tensor", "row_stats", "problem"))


class LayoutEntry(ctypes.Structure):
    """The struct `tob_layout_entry` of `engine.h`."""

    _fields_ = (("name", ctypes.c_char_p), ("type", ctypes.c_char_p), ("value", ctypes.c_int64))


def layout() -> list[str]:
    """The layout that an engine must have, one line for each fact."""
    lines = []
    for name in STRUCTS:
        fields = _fields(name)
        lines.append(f"{name}: bytes {struct.calcsize(_format(name))}")
        for index, (field, kind) in enumerate(fields):
            end = struct.calcsize("".join(_format(before) for _, before in fields[: index + 1]))
            lines.append(f"{name}.{field}: {kind} {end - struct.calcsize(_format(kind))}")
    lines += [f"{name}: pointers {count}" for name, count in FUNCTIONS.items()]
    lines += [f"{name}: number {number}" for name, number in NUMBERS.items()]
    return lines


def layout_of(engine: ctypes.CDLL) -> list[str]:
    """The layout that an engine was compiled with.

    Raises:
        AttributeError: the engine does not tell its layout.
    """
    engine.tob_layout.restype = ctypes.POINTER(LayoutEntry)
    entries = itertools.takewhile(lambda entry: entry.name is not None, engine.tob_layout())
    return [f"{entry.name.decode()}: {entry.type.decode()} {entry.value}" for entry in entries]


def difference(engine: ctypes.CDLL) -> str | None:
    """Says, for people, where an engine's layout first differs from this package's; None if they are equal."""
    pairs = itertools.zip_longest(layout_of(engine), layout(), fillvalue="nothing")
    return next((f"it has {got!r} where {expected!r} was expected" for got, expected in pairs if got != expected), None)
