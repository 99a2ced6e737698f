"""Exact fused attention with a learnable bias per query-key offset, on GPUs and CPUs, for training."""

from triton_offset_bias import modules
from triton_offset_bias.dispatch import DenseFallbackWarning
from triton_offset_bias.functional import offset_bias_attention, offset_bias_attention_varlen

__version__ = "0.1.0"
__all__ = ["DenseFallbackWarning", "modules", "offset_bias_attention", "offset_bias_attention_varlen"]
