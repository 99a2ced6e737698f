"""Position biases as modules. Each gives a table for a range of offsets, which any attention call can use."""

from triton_offset_bias.modules.alibi import ALiBiBias, alibi_slopes
from triton_offset_bias.modules.attention import OffsetBiasAttention
from triton_offset_bias.modules.fire import FireBias
from triton_offset_bias.modules.gated import GatedBias, GatedOffsetBias
from triton_offset_bias.modules.inspection import dense_bias, plot_bias
from triton_offset_bias.modules.kerple import KerpleBias
from triton_offset_bias.modules.low_rank import LowRankOffsetBias
from triton_offset_bias.modules.offset_bias import OffsetBias
from triton_offset_bias.modules.offset_bias_2d import OffsetBias2d
from triton_offset_bias.modules.offset_bias_3d import OffsetBias3d
from triton_offset_bias.modules.relative_key import RelativeKeyBias
from triton_offset_bias.modules.sandwich import SandwichBias
from triton_offset_bias.modules.t5 import T5Bias, t5_buckets

__all__ = [
    "ALiBiBias",
    "FireBias",
    "GatedBias",
    "GatedOffsetBias",
    "KerpleBias",
    "LowRankOffsetBias",
    "OffsetBias",
    "OffsetBias2d",
    "OffsetBias3d",
    "OffsetBiasAttention",
    "RelativeKeyBias",
    "SandwichBias",
    "T5Bias",
    "alibi_slopes",
    "dense_bias",
    "plot_bias",
    "t5_buckets",
]
