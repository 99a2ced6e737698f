"""Part 5: one tiny call of each kind, forward and backward, for compute-sanitizer to look at."""

from typing import Any

import torch

from bench.gpu_report.part import DEVICE, IS_DRY
from triton_offset_bias import offset_bias_attention, offset_bias_attention_varlen

LENGTH, BATCH, HEADS, COLUMNS = 70 if IS_DRY else 200, 2, 2, 101


def main() -> None:
    """Runs the calls, and prints the name of each that has ended."""
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    kinds = ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))
    for head_dim, dtype in ((16, torch.float32),) if IS_DRY else kinds:
        leaves = [torch.randn(BATCH, HEADS, LENGTH, head_dim, dtype=dtype).requires_grad_() for _ in range(3)]
        leaves.append(torch.randn(HEADS, COLUMNS).requires_grad_())
        for name, options in _options().items():
            out = offset_bias_attention(*leaves, **options, backend="triton")
            torch.autograd.grad(out, leaves, torch.randn_like(out))
            print(f"{dtype}, D={head_dim}: {name}")
        _decode(leaves)
        _packed(leaves)
    if torch.device(DEVICE).type == "cuda":
        torch.cuda.synchronize()
    print("all have ended")


def _options() -> dict[str, dict[str, Any]]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, LENGTH // 2 :] = False
    positions = torch.arange(LENGTH) * 37 % LENGTH
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"key_padding_mask": mask},
        "window": {"window_size": (40, 3)},
        "dropout": {"dropout_p": 0.1},
        "deterministic": {"deterministic": True},
        "positions": {"query_positions": positions, "key_positions": positions},
    }


def _decode(leaves: list[torch.Tensor]) -> None:
    with torch.no_grad():
        q, k, v, table = leaves
        keys, values = (x.repeat(1, 1, 512 // LENGTH + 1, 1) for x in (k, v))
        offset_bias_attention(q[:, :, :1], keys, values, table, is_causal=True, backend="triton")
    print("decoding")


def _packed(leaves: list[torch.Tensor]) -> None:
    bounds = torch.tensor([0, LENGTH // 3, LENGTH], dtype=torch.int32)
    rows = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in leaves[:3]]
    table = leaves[3]
    longest = LENGTH - LENGTH // 3
    out = offset_bias_attention_varlen(*rows, table, bounds, bounds, longest, longest, is_causal=True, backend="triton")
    torch.autograd.grad(out, [*rows, table], torch.randn_like(out))
    print("packed")


if __name__ == "__main__":
    main()
