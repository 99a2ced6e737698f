"""The attention of this rank's queries to the keys of all ranks, as one node of autograd."""

import torch

from triton_offset_bias import parts
from triton_offset_bias.distributed.call import Call, Part
from triton_offset_bias.distributed.travel import Keys
from triton_offset_bias.parts import Gradients, Rows, arithmetic_dtype


class Attention(torch.autograd.Function):
    """The output, and perhaps the log-sum-exp, of this rank's queries. The table's gradient is this rank's share."""

    @staticmethod
    def forward(ctx, query, key, value, bias, gate, call: Call):  # noqa: D102
        traded = call.to_heads(query, 0), call.to_heads(key, 1), call.to_heads(value, 1)
        table = constants = factors = None
        if bias is not None:
            table, constants = parts.counted_table(call.table(bias), query, call.problem.beyond, call.has_gate)
        if gate is not None:
            factors = call.to_heads(gate.detach().to(arithmetic_dtype(query.dtype)), 0)
        rows = parts.new_rows(traded[0], value.shape[3])
        for runs in Keys(call.plan, call.world.ring, *traded[1:], with_gradients=False).runs(call.method):
            for run in runs:
                for part in call.parts(traded[0], factors, table, run):
                    parts.attend(part.problem, rows.narrow(part.row, part.num_rows), call.backend, part.reach)
        out, lse = rows.finish(None if constants is None else call.constants_of_rows(constants))
        out = out.to(query.dtype)
        ctx.save_for_backward(*traded, bias, gate, table, factors, out, rows.row_max, rows.row_sum)
        ctx.call = call
        ctx.set_materialize_grads(False)
        out = call.to_sequence(out, 0)
        return (out, call.to_sequence(lse.unsqueeze(-1), 0).squeeze(-1)) if call.returns_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):  # noqa: D102
        return *_AttentionBackward.apply(dout, dlse, ctx.needs_input_grad[3:5], ctx.call, *ctx.saved_tensors), None


class _AttentionBackward(torch.autograd.Function):
    """The backward pass as a node of its own, so that a second derivative is an error and not a wrong answer."""

    @staticmethod
    def forward(ctx, dout, dlse, needs, call, *saved):
        query, key, value, bias, gate, table, factors, out, row_max, row_sum = saved
        dtype = arithmetic_dtype(query.dtype)
        dout = torch.zeros_like(out) if dout is None else call.to_heads(dout, 0)
        dlse = None if dlse is None else call.to_heads(dlse.to(dtype).unsqueeze(-1), 0).squeeze(-1).contiguous()
        rows = Rows(out, row_max, row_sum)
        dquery = torch.zeros_like(query, dtype=dtype)
        dtable, dfactors = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) if is_needed else None
            for x, is_needed in zip((table, factors), needs, strict=True)
        )
        keys = Keys(call.plan, call.world.ring, key, value, with_gradients=True)
        _differentiate(call, query, factors, table, rows, dout, dlse, keys, (dquery, dtable, dfactors))
        del rows, out, dout, dlse  # what was traded takes memory, too
        gradients = [dquery, *keys.gradients]
        del dquery, keys
        dgate = None if dfactors is None else call.to_sequence(dfactors, 0).to(gate.dtype)
        return *_sent_home(gradients, call, query.dtype), _gradient_of(bias, dtable, call), dgate

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "distributed.offset_bias_attention has no second derivative; triton_offset_bias.offset_bias_attention with "
            "backend='reference' has derivatives of every order"
        )


def _differentiate(call: Call, query, gate, table, rows: Rows, dout, dlse, keys: Keys, sums):
    """Adds the gradients of all keys that this rank's queries reach; `sums` are dquery, dtable and dgate."""
    dquery, dtable, dgate = sums
    for runs in keys.runs(call.method):
        for run in runs:
            for part in call.parts(query, gate, table, run):
                assert part.keys.gradients is not None
                dkey, dvalue = part.keys.gradients
                dbias = None if dtable is None else dtable[part.tables]
                totals = Gradients(_rows_of(part, dquery), dkey, dvalue, dbias, _rows_of(part, dgate))
                incoming = _rows_of(part, dout), _rows_of(part, dlse)
                those = rows.narrow(part.row, part.num_rows)
                parts.differentiate(part.problem, those, *incoming, totals, call.backend, part.reach)


def _rows_of(part: Part, x):
    """The rows of a part in a tensor of all rows, if there is one."""
    return None if x is None else x.narrow(2, part.row, part.num_rows)


def _gradient_of(bias, dtable, call: Call):
    """The gradient of the whole table: 0 for the heads of other ranks."""
    if dtable is None:
        return None
    dbias = torch.zeros_like(bias, dtype=dtable.dtype)
    call.table(dbias).copy_(dtable)
    return dbias.to(bias.dtype)


def _sent_home(gradients, call: Call, dtype: torch.dtype):
    """The gradients of this rank's own queries, keys and values; the list is emptied on the way."""
    # Ranks that share a key head add its gradients up, in the dtype of the arithmetic.
    is_shared = call.heads[1] % call.world.heads.size != 0
    for side in (0, 1, 1):
        gradient = gradients.pop(0)
        gradient = gradient if side == 1 and is_shared else gradient.to(dtype)
        yield call.to_sequence(gradient, side).to(dtype)
