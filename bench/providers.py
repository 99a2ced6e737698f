"""The providers: every way to compute the same attention from the same inputs.

A provider's `prepare` does the work that a model would do once (indices, masks, compilation). It is not timed. It
returns the function that is timed, from (q, k, v, table) to the output.
"""

from bench import own, peers
from bench.cases import FORWARD
from bench.eager import eager_gated
from bench.provider import Provider

PROVIDERS = {
    "ours": Provider("ours", own.ours),
    "ours_no_bias": Provider("ours, no bias", own.ours_no_bias, uses_table=False),
    "ours_ungated": Provider("ours, no gate", own.ours_ungated, is_ungated=True),
    "eager_gated": Provider("dense, eager", eager_gated, is_dense=True),
    "ours_vectors": Provider("ours, avx512_bf16", own.ours_vectors, context=own.vectors),
    "ours_atomics": Provider(
        "ours, atomic per score",
        own.ours_atomics,
        cpu_modes=(),
        why_not="it is about GPU kernels",
        context=own.atomics_of_scores,
    ),
    "ours_hopper": Provider(
        "ours, Hopper's forward",
        own.ours_hopper,
        cpu_modes=(),
        why_not="it is about GPU kernels",
        context=own.hopper_kernels,
    ),
    "flash_attn": Provider(
        "flash-attn, no bias",
        peers.flash_attn,
        uses_table=False,
        cpu_modes=(),
        why_not="flash-attn is for GPUs",
    ),
    "sdpa_no_bias": Provider("SDPA, no bias", peers.sdpa_no_bias, uses_table=False),
    "sdpa_flash": Provider("SDPA flash, no bias", peers.sdpa_flash, uses_table=False),
    "sdpa_cudnn": Provider(
        "SDPA cuDNN, no bias", peers.sdpa_cudnn, uses_table=False, cpu_modes=(), why_not="cuDNN is for NVIDIA GPUs"
    ),
    "sdpa_efficient": Provider(
        "SDPA efficient + bias[:, index]",
        peers.sdpa_efficient,
        is_dense=True,
        cpu_modes=(),
        why_not="SDPA's efficient attention is for GPUs",
    ),
    "sdpa_index": Provider("SDPA + bias[:, index]", peers.sdpa_index, is_dense=True),
    "sdpa_strided": Provider("SDPA + strided view", peers.sdpa_strided, is_dense=True),
    "sdpa_strided_copy": Provider("SDPA + copied view", peers.sdpa_strided_copy, is_dense=True),
    "t5_eager": Provider("T5-style, eager", peers.t5_eager, is_dense=True),
    "t5_compiled": Provider("T5-style, compiled", peers.t5_compiled, is_dense=True, is_compiled=True),
    "flex_compiled": Provider(
        "FlexAttention, compiled",
        peers.flex_compiled,
        is_compiled=True,
        cpu_modes=(FORWARD,),
        why_not="FlexAttention has no backward on a CPU",
    ),
    "flex_no_bias": Provider(
        "FlexAttention, no bias",
        peers.flex_no_bias,
        uses_table=False,
        is_compiled=True,
        cpu_modes=(FORWARD,),
        why_not="FlexAttention has no backward on a CPU",
    ),
}
EXPERIMENTAL = ("ours_hopper",)  # this package's kernels that are behind a switch
SDPA_WITH_BIAS = ("sdpa_index", "sdpa_strided", "sdpa_strided_copy")
TRAINABLE_PEERS = (*SDPA_WITH_BIAS, "t5_eager", "t5_compiled")
