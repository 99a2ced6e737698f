"""Mistakes in what is Python on every machine."""

from mutants.mutant import mutants_in

# File: what is wrong; the tests that see it, by file and by pytest's -k; the text that is there once, and the mistake.
PACKAGE = mutants_in("triton_offset_bias", {
    "table.py": [
        ("the default origin is the right one of two middles", "test_table.py", "origin",
         "return (num_columns - 1) // 2",
         "return num_columns // 2"),
        ("the window to the right is one too narrow", "test_table.py", "interval",
         "-UNLIMITED if right < 0 else -right",
         "-UNLIMITED if right < 0 else 1 - right"),
        ("offsets above the table see the last column but one", "test_table.py", "per_offset",
         "columns.clamp(0, bias.shape[-1] - 1)]",
         "columns.clamp(0, max(bias.shape[-1] - 2, 0))]"),
        ("the offset's sign", "test_table.py", "dense",
         "query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)",
         "key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1)"),
        ("the gradient has strides that tracing does not expect", "test_ops.py", "backward_operator",
         "grad[..., 1:-1].clone(memory_format=torch.contiguous_format)",
         "grad[..., 1:-1]"),
    ],
    "data_checks.py": [
        ("a graph may call for other lengths than it was traced for", "test_ops.py", "constants or do_not_fit",
         "if problem.cu_seqlens_q is None and lengths != (problem.max_seqlen_q, problem.max_seqlen_k):",
         "if False:"),
    ],
    "positions.py": [
        ("packed sequences are aligned at their first queries", "test_varlen.py", "cpp and causal",
         "(*rows, rows[3] - rows[2])",
         "(*rows, 0)"),
        ("the offset's sign at contiguous positions", "test_decode.py", "cpp and differently",
         "queries[..., 0] - keys[..., 0]",
         "keys[..., 0] - queries[..., 0]"),
    ],
    "ops.py": [
        ("tracing takes the output's head dim from the query", "test_ops.py", "own_checks",
         "query, _, value = args[:3]",
         "query, _, value = args[0], args[1], args[0]"),
        ("a second derivative is a wrong answer, not an error", "test_gradients.py", "second_derivative",
         "    def backward(ctx, *_):\n        raise",
         "    def backward(ctx, *_):\n        return [None] * len(ctx.needs_input_grad)\n        raise"),
    ],
    "checks.py": [
        ("causality is aligned at the first query", "test_attention.py", "fewer and reference",
         "query_start=len_k - len_q if query_start is None",
         "query_start=0 if query_start is None"),
    ],
    "validators.py": [
        ("a scale of 0 is replaced", "test_attention.py", "scale and reference",
         "if scale is None:",
         "if not scale:"),
    ],
    "dispatch.py": [
        ("a named backend falls back", "test_dispatch.py", "named",
         'list(BACKENDS) if name == "auto" else [name]',
         'list(BACKENDS) if name == "auto" else [name, "reference"]'),
    ],
    "backends/cpp.py": [
        ("every sequence has the first one's positions", "test_positions.py", "cpp and accurate",
         "return 0 if positions is None or positions.dim() == 1 else positions.stride(0)",
         "return 0"),
        ("the seed is lost", "test_dropout.py", "cpp and listed",
         "0 if problem.seed is None else int(problem.seed) % 2**64",
         "0"),
        ("the gradient of a table goes by another dtype", "test_gradients.py", "cpp",
         "dbias = torch.empty_like(call.bias)",
         "dbias = torch.empty_like(call.bias, dtype=torch.float64)"),
    ],
    "backends/reference.py": [
        ("a query head reads another key head", "test_attention.py", "grouped and reference",
         "key = problem.key.to(compute).repeat_interleave(groups, dim=1)",
         "key = problem.key.to(compute).repeat(1, groups, 1, 1)"),
    ],
    "modules/t5.py": [
        ("T5's sign of the offset", "test_bias_modules.py", "formula",
         "(offsets < 0).long()",
         "(offsets > 0).long()"),
    ],
    "modules/alibi.py": [
        ("slopes beyond a power of 2 take the other half", "test_public_biases.py", "slopes",
         "2 * (heads - power) + 1)",
         "2 * (heads - power) + 2)"),
    ],
    "modules/fire.py": [
        ("FIRE serves queries beyond its threshold", "test_bias_modules.py", "bad_argument",
         "abs(offset) > self.threshold",
         "offset > self.threshold"),
    ],
    "modules/kerple.py": [
        ("the power is not held below 2", "test_bias_modules.py", "formula",
         "2.0 * raw.sigmoid()",
         "raw.exp()"),
    ],
    "modules/offset_bias_2d.py": [
        ("rows are as far apart as the window is high", "test_public_biases.py", "swin",
         "rows[:, None] * (2 * self.width - 1)",
         "rows[:, None] * (2 * self.height - 1)"),
    ],
    "integrations/transformers/t5.py": [
        ("encoders' tables begin at offset 0", "integrations/test_transformers_seq2seq.py", "gradient and t5",
         "            -self.table_origin,\n",
         "            0,\n"),
    ],
    "integrations/transformers/alibi.py": [
        ("MPT's penalties run backwards", "integrations/test_transformers_decoders.py", "gradient and mpt",
         "-key.shape[2] :].flip(-1)",
         "-key.shape[2] :]"),
    ],
    "integrations/x_transformers.py": [
        ("the table's origin is a column off", "integrations/test_x_transformers.py", "shared",
         "bias_origin=q.shape[2] - 1",
         "bias_origin=q.shape[2]"),
    ],
})  # fmt: skip
