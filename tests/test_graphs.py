"""CUDA graphs of calls, and `torch.compile` with them: replays give what calls give."""

import pytest
import torch
from conftest import DEVICE

from triton_offset_bias import offset_bias_attention

pytestmark = pytest.mark.skipif(torch.device(DEVICE).type != "cuda", reason="captures a CUDA graph: TEST_DEVICE=cuda")


def step(q, k, v, table):
    """Output and gradients, bit for bit the same in every run."""
    out = offset_bias_attention(q, k, v, table, is_causal=True, deterministic=True, backend="triton")
    return [out, *torch.autograd.grad(out, (q, k, v, table), torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_step_of_training_is_repeated_on_other_numbers(dtype):
    """Forward and backward in one graph, without a wait or a number read on the host."""
    inputs = [torch.randn(2, 3, 150, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(3, 81, requires_grad=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*inputs)
    for _ in range(3):
        with torch.no_grad():
            for x in inputs:
                x.normal_()
        graph.replay()
        replayed = [x.clone() for x in results]
        assert all(torch.equal(*pair) for pair in zip(step(*inputs), replayed, strict=True))


def test_compiled_steps_with_graphs_give_what_calls_give():
    """`mode="reduce-overhead"`, for as many steps as it takes to record and to replay."""
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(5):
        inputs = [torch.randn(2, 3, 150, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        inputs.append(torch.randn(3, 81, requires_grad=True))
        torch.compiler.cudagraph_mark_step_begin()
        out = offset_bias_attention(*inputs, is_causal=True, backend="triton")
        torch.testing.assert_close(compiled(*inputs)[0], out)
