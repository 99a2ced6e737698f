"""Position biases as modules: each gives a table for a range of offsets, to be used by any attention call."""

from triton_offset_bias.modules.attention import OffsetBiasAttention
from triton_offset_bias.modules.offset_bias import OffsetBias

__all__ = ["OffsetBias", "OffsetBiasAttention"]
