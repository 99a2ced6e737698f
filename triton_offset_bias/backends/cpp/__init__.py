"""The call into the compiled CPU engine (`csrc_ref/`) through ctypes. `csrc_ref/engine.h` is the engine's contract.

`library` decides which build is called. A process that was forked after the import works with one thread.
"""

import ctypes
import os

import torch
from torch import Tensor

from triton_offset_bias import dropout, table
from triton_offset_bias.backends.cpp import library, positions, structs
from triton_offset_bias.backends.cpp.library import BUILD_VARIABLE as BUILD_VARIABLE
from triton_offset_bias.backends.cpp.library import BUILDS as BUILDS
from triton_offset_bias.backends.cpp.library import FOLDER_VARIABLE as FOLDER_VARIABLE
from triton_offset_bias.backends.limits import exceeded_limits
from triton_offset_bias.problem import Problem

PROPERTIES = {
    "serves": "CPU tensors; float16, bfloat16, float32, float64; head dims 1 to 256",
    "options and packed sequences": "all",
    "runs on": "CPUs: AVX2, AVX-512, AVX512_BF16, AMX, any other with GCC or Clang",
    "memory": "O(Lq + Lk)",
    "few queries against a long key cache": "keys split among threads, read where they lie",
    "same bits in repeated runs": "yes, for any number of threads",
    "`torch.compile(fullgraph=True)`, `torch.export`, autocast, checkpointing": "yes",
    "second derivatives, forward mode, `torch.func`": "no (a clear error)",
}
DEVICES: tuple[str, ...] = ("cpu",)

_ENGINE, _REASON, BUILD, RUNNABLE = library.load()
_PROCESS = os.getpid()


def build_description() -> str:
    """Says, for people, what the engine here is built for, and why this build was chosen."""
    if _ENGINE is None:
        return "not built"
    found = ", ".join(build for build in BUILDS if library.path_of(build))
    return f"{BUILD} ({_ENGINE.tob_build_description().decode()}), {_REASON}; installed builds: {found}"


def unavailable_reasons() -> list[str]:
    """The reasons why this backend cannot serve any call here."""
    return [_REASON] if _ENGINE is None else []


def unsupported_reasons(problem: Problem) -> list[str]:
    """The reasons why this backend cannot serve `problem` here."""
    reasons = unavailable_reasons()
    if problem.query.device.type != "cpu":
        reasons.append(f"serves CPU tensors, got {problem.query.device.type}")
    return reasons + exceeded_limits(problem)


def forward(problem: Problem, out: Tensor, lse: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Writes the output and the rows' statistics; see `tob_forward`."""
    call = _Call(problem)
    stats = structs.ROW_STATS.pack(row_max.data_ptr(), row_sum.data_ptr())
    _check_status(_engine().tob_forward(call.problem, call.tensor(out), lse.data_ptr(), stats))


def backward(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    dgate: Tensor | None,
    needs_dbias: bool,
) -> Tensor | None:
    """Writes the gradients that are not None, and returns the table's gradient if it is needed; see `tob_backward`.

    The rows' statistics and `dlse` are contiguous.
    """
    call = _Call(problem)
    stats = structs.ROW_STATS.pack(row_max.data_ptr(), row_sum.data_ptr())
    dbias = torch.empty_like(call.bias) if needs_dbias and call.bias is not None else None
    status = _engine().tob_backward(
        *(call.problem, call.tensor(out), stats, call.tensor(dout), _address(dlse)),
        *(call.tensor(dquery), call.tensor(dkey), call.tensor(dvalue), call.tensor(dgate), _address(dbias)),
    )
    _check_status(status)
    for gradient in (dkey, dvalue):
        if gradient is not None and problem.key_lengths is not None:
            call.clear_beyond(gradient)
    return None if dbias is None else call.fold(dbias)


def forward_part(problem: Problem, acc: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """Adds the keys of `problem` to the softmax of rows that may have attended to other keys; see `tob_forward`."""
    call = _Call(problem, row_max)
    stats = structs.ROW_STATS.pack(row_max.data_ptr(), row_sum.data_ptr())
    _check_status(_engine().tob_forward(call.problem, call.tensor(acc), 0, stats))


def backward_part(
    problem: Problem,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dbias: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Adds a part's gradients to the last five tensors; see `tob_backward`."""
    call = _Call(problem, row_max)
    stats = structs.ROW_STATS.pack(row_max.data_ptr(), row_sum.data_ptr())
    part = None if dbias is None or call.bias is None else torch.empty_like(call.bias)
    status = _engine().tob_backward(
        *(call.problem, call.tensor(out), stats, call.tensor(dout), _address(dlse)),
        *(call.tensor(dquery), call.tensor(dkey), call.tensor(dvalue), call.tensor(dgate), _address(part)),
    )
    _check_status(status)
    if dbias is not None and part is not None:
        dbias.add_(call.fold(part))


class _Call:
    """The C struct of a problem, and the tensors that its pointers point into.

    `part_rows` is a statistic of the rows if the problem is a part. Its strides are those of all statistics.
    """

    def __init__(self, problem: Problem, part_rows: Tensor | None = None) -> None:
        self._source = problem
        query, key, value = problem.query, problem.key, problem.value
        heads_q, rows_q = query.shape[1:3]
        placed = positions.placed(problem)
        self.bias, bias_first = self._clamped_table()
        self._gate = None if problem.bias_gate is None else problem.bias_gate.to(self._real())
        rank = 1 if self._gate is None else self._gate.shape[3]
        mask = problem.key_padding_mask
        mask = None if mask is None else mask[:, : placed.longest_k].contiguous()
        self._placed, self._mask = placed, mask
        is_dropping = problem.seed is not None
        row_strides = (heads_q * rows_q, rows_q) if part_rows is None else part_rows.stride()[:2]
        self.problem = structs.PROBLEM.pack(
            *(structs.DTYPES[query.dtype], _num_threads(), problem.num_sequences, heads_q, key.shape[1]),
            *(problem.max_seqlen_q, placed.longest_k, query.shape[3], value.shape[3]),
            *(problem.min_offset, problem.max_offset, problem.scale),
            *(*self._tensor(query), *self._tensor(key), *self._tensor(value)),
            placed.sequences.buffer_info()[0],
            *(0 if problem.cu_seqlens_q is not None else row_strides[0], row_strides[1]),
            _address(self.bias),
            *self._table_sizes(),
            bias_first,
            *self._tensor(self._gate),
            rank,
            *(_address(mask), _address(placed.query_positions), _address(placed.key_positions)),
            *(_stride_between(placed.query_positions), _stride_between(placed.key_positions)),
            problem.is_causal_by_index,
            is_dropping,
            0 if problem.seed is None else int(problem.seed) % 2**64,
            dropout.largest_dropped(problem.dropout_p) if is_dropping else 0,
            dropout.kept_scale(problem.dropout_p) if is_dropping else 1.0,
            *(problem.dropout_place or (0, 0, 0, heads_q)),
            part_rows is not None,
        )

    def _clamped_table(self) -> tuple[Tensor | None, int]:
        """The table as the engine takes it (contiguous, of type `real`), and the offset of its first column."""
        bias = self._source.bias
        if bias is None:
            return None, 0
        bias, first = table.extended(bias, self._source.bias_origin, self._source.beyond)
        return bias.to(self._real()).contiguous(), first

    def _real(self) -> torch.dtype:
        return torch.float64 if self._source.query.dtype == torch.float64 else torch.float32

    def _table_sizes(self) -> tuple[int, ...]:
        """The batch size, the number of heads and the number of columns of the engine's table."""
        if self.bias is None:
            return 1, 1, 1
        axes = self.bias.shape if self._gate is None else (*self.bias.shape[:-2], self.bias.shape[-1])
        return (1, 1, *axes)[-3:]

    def tensor(self, tensor: Tensor | None) -> bytes:
        """The C struct of a tensor with the rows of this call."""
        return structs.TENSOR.pack(*self._tensor(tensor))

    def _tensor(self, tensor: Tensor | None) -> tuple[int, ...]:
        """The tensor's address and strides. Packed sequences lie in one batch element."""
        if tensor is None:
            return 0, 0, 0, 0, 0
        batch, *strides = tensor.stride()
        return tensor.data_ptr(), 0 if self._source.cu_seqlens_q is not None else batch, *strides

    def clear_beyond(self, gradient: Tensor) -> None:
        """Sets the gradients of keys or values beyond each sequence's last key to 0. The engine does not write them."""
        for sequence, length in zip(gradient, self._placed.sequences[3::5], strict=True):
            sequence[:, length:].zero_()

    def fold(self, dbias: Tensor) -> Tensor:
        """The gradient of the caller's table, made from the gradient of the engine's table."""
        bias = self._source.bias
        assert bias is not None
        return table.trimmed(dbias, self._source.beyond).to(bias.dtype)


def _engine() -> ctypes.CDLL:
    assert _ENGINE is not None
    return _ENGINE


def _num_threads() -> int:
    """The number of threads: torch's, or 1 in a forked process.

    Threads do not survive a fork. GCC's OpenMP runtime would wait for the parent's threads forever.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stride_between(positions: Tensor | None) -> int:
    """The stride from one sequence's positions to the next's; 0 where all sequences share them."""
    return 0 if positions is None or positions.dim() == 1 else positions.stride(0)


def _check_status(status: int) -> None:
    if status == structs.ERROR_MEMORY:
        raise MemoryError("the CPU engine could not allocate its scratch memory")
    if status:
        raise RuntimeError(f"the CPU engine refused the call (status {status})")
